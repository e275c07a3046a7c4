"""Whether the libraries can be imported, are those that raymed needs, and are the same on every node."""

import importlib
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping

from raymed.doctor import there
from raymed.doctor.finding import Finding, failure, ok
from raymed.doctor.nodes import answers, probes, told
from raymed.doctor.place import Place

_IMPORTED = ("torch", "torchvision", "ray", "deepspeed", "mlflow", "boto3")
_INSTALL = "pip install 'raymed[all]' (make install) in this environment, or make install OFFLINE=DIR"


def this_machine(place: Place) -> Finding:
    """Every library is imported; every requirement of raymed is met."""
    problems = [*_broken(), *_unmet()]
    if problems:
        return failure("; ".join(problems), _INSTALL)
    found = [f"{name} {importlib.metadata.version(name)}" for name in _IMPORTED]
    return ok(f"python {platform.python_version()}, {', '.join(found)}")


def on_nodes(place: Place) -> Finding:
    """Every node has the versions of this machine, and the same files of raymed."""
    mine = there.versions()
    with probes(as_jobs=True) as nodes:
        found, late = answers({name: node.versions.remote() for name, node in nodes.items()})
    problems = [line for name, theirs in found.items() for line in differences(name, theirs, mine)]
    if problems or late:
        advice = "install the same on every node, into the environment that `ray start` runs in"
        return failure("; ".join([*problems, *told(late)]), advice)
    return ok(f"{len(found)} node(s) have what this machine has: {', '.join(f'{k} {v}' for k, v in mine.items())}")


def differences(node: str, theirs: Mapping[str, str], mine: Mapping[str, str]) -> list[str]:
    """Lines on the libraries of a node that are not this machine's. A torch for CPUs ("+cpu") and one for GPUs are the
    same: a head without a GPU has another build than its workers."""
    return [
        f"{library} {theirs[library]} on {node}, {mine[library]} here"
        for library in mine
        if _release(library, theirs) != _release(library, mine)
    ]


def _release(library: str, versions: Mapping[str, str]) -> str:
    """Its version, of torch without the build."""
    return versions[library].partition("+")[0] if library == "torch" else versions[library]


def _broken() -> Iterator[str]:
    for name in _IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken library does when it is imported
            yield f"import {name} fails ({type(error).__name__}: {error})"[:300]


def _unmet() -> Iterator[str]:
    """Requirements of raymed's own and for training that what is installed does not meet."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("raymed") or []
    except importlib.metadata.PackageNotFoundError:
        return  # it runs from its sources
    for line in lines:
        needed = Requirement(line)
        if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in ("", "train")):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{needed.name} is not installed"
            continue
        if not needed.specifier.contains(version, prereleases=True):
            yield f"{needed.name} {version} is installed and raymed needs {needed.specifier}"
