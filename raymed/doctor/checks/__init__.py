"""Every check, in the order in which they are told: what the others stand on comes first.

A check is a function of a `Place` that does the thing and returns a `Finding`. A UserError says the remedy itself; any
other error is told as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

from raymed.doctor.checks import (
    between,
    clocks,
    connection,
    gpus,
    memory,
    network,
    storage,
    sweep,
    tls,
    tracking,
    versions,
)
from raymed.doctor.finding import Finding
from raymed.doctor.place import Place


@dataclass(frozen=True)
class Check:
    """One check.

    seconds: after which it is ended. when: whether a place has what it looks at. on_ray: whether it needs a Ray
    cluster that answers.
    """

    name: str
    look: Callable[[Place], Finding]
    seconds: float = 60
    when: Callable[[Place], bool] = lambda place: True
    on_ray: bool = False


def _nodes(name: str, look: Callable[[Place], Finding], seconds: float = 120) -> Check:
    return Check(f"nodes: {name}", look, seconds, lambda place: place.nodes and place.ray is not None, on_ray=True)


CHECKS = (
    Check("proxies", network.this_machine, 120),
    Check("certificates", tls.trusted),
    Check("versions", versions.this_machine, 180),
    Check("GPUs", gpus.this_machine, 120),
    Check("shared memory", memory.this_machine),
    Check("storage", storage.tried, when=lambda place: place.has_storage),
    Check("disk space", storage.space, when=lambda place: place.has_storage),
    Check("MLflow", tracking.written, 120, lambda place: place.has_way),
    Check("clock", clocks.of_services, 60, lambda place: bool(place.services())),
    Check("Ray", connection.connects, 60, lambda place: place.ray is not None),
    Check("Ray's token", connection.asks_for_token, 90, lambda place: place.ray is not None, on_ray=True),
    _nodes("versions", versions.on_nodes),
    _nodes("ways", network.between_nodes),
    _nodes("clocks", clocks.on_nodes),
    _nodes("object store", memory.on_nodes),
    _nodes("storage", storage.on_nodes, 180),
    _nodes("GPUs", gpus.on_nodes),
    _nodes("all-reduce", between.reduced, 240),
    Check("sweep", sweep.fits, 90, lambda place: place.sweep.trials > 0),
)
