"""Whether the processes of one training find each other: an all-reduce over gloo, and over NCCL where GPUs are.

Where the host's name resolves to 127.0.0.1, or a machine has several networks, a library may offer the others an
address that they cannot reach. The interface here is the one that jobs take.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from raymed.doctor.finding import Finding, Level, failure, ok, warning
from raymed.doctor.nodes import answers, probes, told
from raymed.doctor.place import Place

_SECONDS = 45.0  # for the others to come
_REMEDY = (
    "set {name} to the interface that has the node's address ({interfaces}), in the environment of each node's "
    "`ray start`, and open all ports between the nodes"
)


def reduced(place: Place) -> Finding:
    """One process a node, two where there is one node only, add up their ranks."""
    with probes(cpus_only=True, as_jobs=True, at_least=2) as nodes:
        if not nodes:
            return ok("no node has CPUs for work now, so nothing was tried")
        gloo = _reduce(nodes, "gloo")
    if gloo.level == "failure":
        return gloo
    with probes(gpus=1, as_jobs=True) as nodes:
        if not nodes:
            return gloo
        nccl = _reduce(nodes, "nccl")
    worse = max(gloo, nccl, key=lambda finding: get_args(Level).index(finding.level))
    return dataclasses.replace(worse, found=f"{gloo.found}; {nccl.found}")


def _reduce(nodes: Mapping[str, Any], backend: str) -> Finding:
    met, late = answers({name: node.rendezvous.remote() for name, node in nodes.items()})
    busy = [name for name, problem in late.items() if problem.startswith("no answer")]
    broken = told({name: problem for name, problem in late.items() if name not in busy})
    if broken:
        return failure(f"{backend}: {'; '.join(broken)}", "see the logs of these nodes' raylets (`ray logs`)")
    if busy:
        found = f"{backend}: in use, so not tried: {', '.join(busy)}"
        return warning(found, "run the doctor again when the cluster is less busy")
    where, port, _ = next(iter(met.values()))
    asked = {
        name: node.reduced.remote(backend, rank, len(nodes), (where, port), _SECONDS)
        for rank, (name, node) in enumerate(nodes.items())
    }
    found, late = answers(asked, 2.2 * _SECONDS)
    problems = [f"{n} over {_interface(f)}: {f['problem']}" for n, f in found.items() if f["problem"]] + told(late)
    if problems:
        interfaces = _by_node({name: interface for name, (_, _, interface) in met.items()})
        remedy = _REMEDY.format(name=f"{backend.upper()}_SOCKET_IFNAME", interfaces=interfaces)
        return failure(f"{backend}: {'; '.join(problems)}", remedy)
    return ok(f"{backend}: {len(nodes)} processes over {_interfaces(list(found.values()))}")


def _by_node(interfaces: Mapping[str, str]) -> str:
    """Which node has which interface, in words; one name where all have the same. "" is one that is not known."""
    if "" in interfaces.values():
        return "`ip -br address` lists them"
    if len(set(interfaces.values())) == 1:
        return next(iter(interfaces.values()))
    return ", ".join(f"{interface} on {name}" for name, interface in interfaces.items())


def _interfaces(found: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(dict.fromkeys(_interface(one) for one in found))


def _interface(found: Mapping[str, str]) -> str:
    return found["interface"] or "an interface of its own choice"
