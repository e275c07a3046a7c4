"""Whether Ray's object store has the memory that it takes for granted."""

import os
import shutil
import tempfile
from pathlib import Path

from raymed.doctor.finding import Finding, failure, ok, warning
from raymed.doctor.nodes import answers, probes, told
from raymed.doctor.place import Place

SHARED = Path("/dev/shm")
_STORE = 200 * 2**20  # what a job's own Ray takes
_OBJECT = 32 * 2**20
_FULL = 95.0  # percent of a disk; beyond it Ray does not spill
_ADVICE = (
    "give more shared memory: docker run --shm-size=8g, in Kubernetes an emptyDir of medium Memory at /dev/shm, on a "
    "machine `mount -o remount,size=8g /dev/shm`"
)


def this_machine(place: Place) -> Finding:
    """As many bytes as a job's own Ray takes are taken from /dev/shm, and given back."""
    try:
        with tempfile.TemporaryFile(dir=SHARED) as file:
            os.posix_fallocate(file.fileno(), 0, _STORE)
    except OSError as error:
        return failure(f"{SHARED} does not give {_STORE >> 20} MiB ({error.strerror}): {_free()}", _ADVICE)
    return ok(f"{SHARED} gives {_STORE >> 20} MiB; {_free()}")


def on_nodes(place: Place) -> Finding:
    """An object of each node's store arrives on the next node; the stores lie in memory and can spill to a disk."""
    with probes() as nodes:
        held, amiss = answers({name: node.put.remote(_OBJECT) for name, node in nodes.items()})
        others = list(held.values())
        asked = {name: nodes[name].got.remote(others[(number + 1) % len(others)]) for number, name in enumerate(held)}
        sizes, late = answers(asked)
        stores, silent = answers({name: node.memory.remote() for name, node in nodes.items()})
    lost = [f"{name} got {size} bytes of {_OBJECT}" for name, size in sizes.items() if size != _OBJECT]
    lost += told(amiss | late | silent)
    if lost:
        advice = "open all ports between the nodes, and see the logs of their raylets (`ray logs`)"
        return failure("; ".join(lost), advice)
    full = [f"{n}: {s['disk_used']:.0f} % of the disk of {s['spills_to']}" for n, s in stores.items() if _is_full(s)]
    if full:
        return failure(f"Ray cannot spill, in use are on {'; '.join(full)}", "make room, or move Ray with --temp-dir")
    slow = [f"{name}: {store['folder']}" for name, store in stores.items() if store["folder"] != str(SHARED)]
    if slow:
        found = f"the object store is on a disk, since {SHARED} is smaller than it: {'; '.join(slow)}"
        return warning(found, f"{_ADVICE}, or start the node with a smaller --object-store-memory")
    return ok(f"{_OBJECT >> 20} MiB went from node to node ({len(nodes)}); the stores lie in {SHARED}")


def _is_full(store: dict) -> bool:
    return store["disk_used"] > _FULL


def _free() -> str:
    if not SHARED.is_dir():
        return "it is not there"
    usage = shutil.disk_usage(SHARED)
    return f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB are free"
