"""Whether the processes of one training find each other: an all-reduce over gloo, and over NCCL where GPUs are.

Where the host's name resolves to 127.0.0.1, or a machine has several networks, a library may offer the others an
address that they cannot reach. The interface here is the one that jobs take.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from raymed.doctor.finding import Finding, failure, ok, warning
from raymed.doctor.nodes import answers, probes, told
from raymed.doctor.place import Place

_SECONDS = 45.0  # for the others to come
_REMEDY = (
    "set {name} to the interface that has the node's address on every node (`ip -br address` lists them; where nodes "
    "differ, in the environment of each `ray start`), and open all ports between the nodes"
)


def reduced(place: Place) -> Finding:
    """One process a node, two where there is one node only, add up their ranks."""
    with probes(cpus_only=True, as_jobs=True, at_least=2) as nodes:
        gloo = _reduce(nodes, "gloo")
    if gloo.level == "failure":
        return gloo
    with probes(gpus=1, as_jobs=True) as nodes:
        if not nodes:
            return gloo
        nccl = _reduce(nodes, "nccl")
    return nccl if nccl.level == "failure" else ok(f"{gloo.found}; {nccl.found}")


def _reduce(nodes: Mapping[str, Any], backend: str) -> Finding:
    first = next(iter(nodes))
    met, late = answers({first: nodes[first].rendezvous.remote()})
    if late:
        return warning(f"{backend}: {'; '.join(told(late))}", "run the doctor again when the cluster is less busy")
    asked = {
        name: node.reduced.remote(backend, rank, len(nodes), met[first], _SECONDS)
        for rank, (name, node) in enumerate(nodes.items())
    }
    found, late = answers(asked, 2.2 * _SECONDS)
    problems = [f"{n} over {_interface(f)}: {f['problem']}" for n, f in found.items() if f["problem"]] + told(late)
    if problems:
        return failure(f"{backend}: {'; '.join(problems)}", _REMEDY.format(name=f"{backend.upper()}_SOCKET_IFNAME"))
    return ok(f"{backend}: {len(nodes)} processes over {_interfaces(list(found.values()))}")


def _interfaces(found: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(dict.fromkeys(_interface(one) for one in found))


def _interface(found: Mapping[str, str]) -> str:
    return found["interface"] or "an interface of its own choice"
