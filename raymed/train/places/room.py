"""Room for a group of workers on a cluster whose nodes come and go.

Ray reserves the place of a group as a placement group, which is also what its autoscaler starts nodes for. What it
cannot place waits for ever; here, waiting is told of, and ends.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

from raymed.config import UserError
from raymed.train.places.growth import WHO_KNOWS, growth

Bundle = dict[str, float]

_TELL_AFTER = 3.0  # seconds: what has just ended is free a moment later
_TRY = 2.0  # seconds in which a place that is there is found, and in which Ray counts what has become free
_LOOK = 0.5  # seconds between two looks


def patience(stated: float | None) -> float:
    """Seconds that a training waits for nodes: as stated (compute.node_patience), else what the cluster's nodes were
    started with ($RAYMED_NODE_PATIENCE), else 600."""
    return float(os.environ.get("RAYMED_NODE_PATIENCE", 600)) if stated is None else stated


class NoRoom(UserError):
    """The cluster has no room for a training, and may have some later: nothing is wrong with the training itself."""


@contextmanager
def place(bundle: Bundle, count: int):
    """Within: a placement group of so many bundles, which waits for its place or has it."""
    from ray.util import placement_group, remove_placement_group

    group = placement_group([bundle] * count)
    try:
        yield group
    finally:
        remove_placement_group(group)


def await_room(
    bundle: Bundle, sizes: Sequence[int], seen: "Nodes", over: Callable[[], bool], longest: float
) -> int | None:
    """The largest of `sizes` (descending) that the cluster has free room for, or None as soon as `over` says so.

    Where there is no room for the smallest, a line tells of it. What others use is waited for until they have done;
    NoRoom says so after nodes have been missing for `longest` seconds.
    """
    began = enough = time.monotonic()  # when there were enough nodes last
    told: bool | None = None
    while not (size := _largest(bundle, sizes, over)):
        if over():
            return None
        with place(bundle, sizes[-1]) as group:
            while not group.wait(_LOOK):
                if over():
                    return None
                in_use = _there(bundle) >= sizes[-1]
                enough = time.monotonic() if in_use else enough
                if (missing := time.monotonic() - enough) > longest:
                    raise NoRoom(
                        f"{seen.shortage(bundle, sizes[-1])}; waited {missing:.0f} s (--compute.node-patience "
                        "SECONDS changes that). Start a node, or lower --compute.workers or --compute.min-workers; the "
                        "same command continues"
                    )
                if time.monotonic() - began > _TELL_AFTER and told is not in_use:
                    most = "for other work to end" if in_use else f"{longest:g} s at most"
                    print(f"waiting, {most}: {seen.shortage(bundle, sizes[-1])}", flush=True)
                    told = in_use
    if told is not None:
        print(f"room for {size} workers, after {time.monotonic() - began:.0f} s: it goes on", flush=True)
    return size


def _largest(bundle: Bundle, sizes: Sequence[int], over: Callable[[], bool]) -> int | None:
    """The largest group that finds its place at once; None if there is none, or `over` says so. Only those are tried
    that the free resources would suffice for, all nodes taken together."""
    until = time.monotonic() + _TRY
    while (most := _free(bundle)) < sizes[0] and time.monotonic() < until and not over():
        time.sleep(0.1)
    for size in (size for size in sizes if size <= most):
        with place(bundle, size) as group:
            if over():
                return None
            if group.wait(_TRY):
                return size
    return None


def _free(bundle: Bundle) -> int:
    """How many bundles the free resources of all nodes would make."""
    import ray

    free = ray.available_resources()
    return min(int(free.get(kind, 0) / amount + 1e-6) for kind, amount in bundle.items())


def _there(bundle: Bundle) -> int:
    """How many bundles the nodes have room for that stay, were nobody else at work."""
    import ray

    leaving = draining()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return sum(min(int(node.get(kind, 0) / amount + 1e-6) for kind, amount in bundle.items()) for node in nodes)


class Nodes:
    """What has happened to the nodes of the cluster since this was made."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._lost: dict[str, str] = {}
        self.look()

    def look(self) -> list[str]:
        """Look at the cluster; returns the nodes that have been lost since the last look, each as "NAME at TIME"."""
        import ray

        lost = []
        for node in ray.nodes():
            name, key = node["NodeName"] or node["NodeManagerAddress"], node["NodeID"]
            if node["Alive"]:
                self._known[key] = f"{name} ({key[:8]})"
            elif key in self._known and key not in self._lost:
                self._lost[key] = f"{self._known[key]} at {time.strftime('%H:%M:%S')}"
                lost.append(self._lost[key])
        return lost

    def shortage(self, bundle: Bundle, count: int) -> str:
        """What a group of so many bundles needs and what the cluster has, in words."""
        import ray

        self.look()
        leaving = draining()
        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
        free = ray.available_resources()
        total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in bundle}
        has = ", ".join(f"{total[kind]:g} {kind} ({min(free.get(kind, 0), total[kind]):g} free)" for kind in bundle)
        needs = ", ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
        lost = f"; lost: {', '.join(self._lost.values())}" if self._lost else ""
        gone = f"; {len(leaving)} node(s) are being taken away" if leaving else ""
        more = growth(nodes).most
        come = f"; it may start {more} more node(s): {WHO_KNOWS}" if more else ""
        return f"this needs {count} x {needs}; the cluster has {has} on {len(nodes)} node(s){lost}{gone}{come}"


def draining() -> set[str]:
    """Ids of the nodes that will be taken away (a spot notice, `ray drain-node`)."""
    from ray._private.state import state  # Ray has no public way outside its workers

    return set(state.get_draining_nodes())


def placement_groups() -> set[str]:
    """Ids of the placement groups that stand, of this driver."""
    import ray

    job = ray.get_runtime_context().get_job_id()
    groups: dict[str, Any] = ray.util.placement_group_table()
    return {key for key, group in groups.items() if key.endswith(job) and group["state"] != "REMOVED"}


def remove_placement_groups(keys: set[str]) -> None:
    """Free their places. One whose creator was killed stays until the driver ends."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for key in keys:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(key))))
