"""The Ray cluster that a job runs on: the one it was submitted to, or one of its own on this machine."""

import logging
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from raymed.config import UserError
from raymed.train.places.growth import WHO_KNOWS, Growth, growth
from raymed.train.places.room import NoRoom, draining

DRIVER = "raymed_driver"
"""Custom resource that drivers of trainings take, so that they never take the place of their workers: start the head
node with --resources '{"raymed_driver": 1000}'."""

_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # two seconds else
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # for its place alone, which was free a moment ago
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver watches the nodes itself
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would resolve an environment in every worker
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: it saves the state first
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints every line twice
    "RAY_AIR_NEW_OUTPUT": "0",  # progress is ours to print
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials are recorded in our own journal
}


_SETTINGS = ("AWS_", "MLFLOW_", "RAYMED_", "GLOO_", "NCCL_")  # names of variables that follow the work to every node
_OF_A_NODE = ("RAYMED_LOCAL", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Where its own disk is, and its own network interface; whoever has none of these gets the driver's."""
_IN_USE = "the rest is in use by other work on this cluster"
_SETTLES = 2.0  # seconds after which what has just ended is free
_RUN_ID = "MLFLOW_RUN_ID"  # would make every process log to one run


def is_submitted() -> bool:
    """Whether this process is a driver of a cluster that is there already, as `ray job submit` starts it: on a head
    that may have neither GPUs nor CPUs for work, so nothing is to be trained in it."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def connected(num_cpus: int | None = None) -> Iterator[None]:
    """Within: Ray is up. $RAY_ADDRESS (set by `ray job submit`) names the cluster; without it, one is started on this
    machine alone (`num_cpus`: None = all) and ended with the block. An open connection is used as it is.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    import ray

    for chatty in ("ray._private.authentication", "ray.tune"):  # what they have to say, the journal and our lines say
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    with ExitStack() as stack:
        handler = signal.getsignal(signal.SIGTERM)
        if os.environ.get("RAY_ADDRESS"):
            hook = {"worker_process_setup_hook": _preparation()}
            ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env=hook)
        else:
            _start(num_cpus, stack.enter_context(TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)))
        stack.callback(ray.shutdown)
        # Ray has put its own in the place of ours, which lets the run stop after a checkpoint.
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        yield


def _start(num_cpus: int | None, folder: str) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": _preparation()},
        _temp_dir=folder,
        object_store_memory=200 * 2**20,
    )


def _preparation() -> Callable[[], None]:
    """What every process of Ray's runs first, on whatever node: it gets this process's settings of S3, MLflow, raymed
    and of the network. They travel inside the function, since runtime environments are shown on Ray's dashboard."""
    settings = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS) and name != _RUN_ID}

    def prepare_worker() -> None:
        _prepare_worker(settings)

    return prepare_worker


def _prepare_worker(settings: Mapping[str, str]) -> None:
    import ray

    own = {name: os.environ[name] for name in _OF_A_NODE if name in os.environ}
    os.environ.update({**settings, **own})
    # Where several clusters run on one machine, Ray Train's helpers would not know theirs.
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    # Ray Train warns each second that a cluster without a dashboard has no dashboard.
    cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(cleaner).setLevel(logging.ERROR)
    logging.getLogger("botocore").setLevel(logging.WARNING)  # which says where its endpoint comes from
    # Where the host's name resolves to 127.0.0.1, gloo would offer that to other nodes.
    interface = interface_of(ray.util.get_node_ip_address())
    if interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an IP address, or None."""
    import psutil

    found = (name for name, at in psutil.net_if_addrs().items() if any(a.address == address for a in at))
    return next(found, None)


def fetched(reference: Any) -> Any:
    """What a Ray task returned. A UserError that it raised is raised as it was, without Ray's traceback."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def gpus_of(device: str) -> int:
    """GPUs of one worker: one where compute.device is cuda, or auto and the cluster has any or could add one. Needs a
    connected Ray."""
    if device != "auto":
        return int(device == "cuda")
    live = _live()
    return int(any(node.get("GPU", 0) >= 1 for node in [*live, *growth(live).best(lambda node: node.get("GPU", 0))]))


def cpus_for(stated: int, gpus: int = 0, count: int = 1) -> int:
    """CPUs of one of `count` trainings side by side: `free_cpus`, or those of nodes that nobody used, where there is no
    room now; no more than the smallest node has that has room for one, since a training may have to run again on any of
    them. Needs a connected Ray."""
    every = _rooms(_live_by_id(), stated, gpus)
    share = free_cpus(stated, gpus, count) or _share(every, gpus, count)
    return max(stated, min([share, *(int(cpus) for cpus, _ in every)]))


def free_cpus(stated: int, gpus: int = 0, count: int = 1) -> int:
    """CPUs that each of `count` trainings could have now: as stated, or more where every node that has room for one has
    more than enough for all of them. A lone one takes what is free on the best node, but with one GPU of several only
    its share of the node's CPUs. 0 where there is no room. Needs a connected Ray.
    """
    from ray._private.state import available_resources_per_node  # Ray has no public way

    until = time.monotonic() + _SETTLES
    most = _share(_rooms(_live_by_id(), stated, gpus), gpus, count)
    while True:
        rooms = _rooms(available_resources_per_node(), stated, gpus)
        share = _share(rooms, gpus, count)
        if share >= most or time.monotonic() > until:
            return max(stated, share) if rooms else 0
        time.sleep(0.1)


def _rooms(free: Mapping[str, Mapping[str, float]], stated: int, gpus: int) -> list[tuple[float, Mapping[str, float]]]:
    """Of each live node that stays and has room for a training: its free CPUs, and its resources. free: by the nodes'
    ids."""
    need, leaving = {"CPU": stated, "GPU": gpus}, draining()
    live = {key: node for key, node in _live_by_id().items() if key not in leaving}
    return [(node["CPU"], live[key]) for key, node in free.items() if key in live and _slots(node, need)]


def _share(rooms: Sequence[tuple[float, Mapping[str, float]]], gpus: int, count: int) -> int:
    """CPUs of one of `count` trainings."""
    shares = [min(cpus, node["CPU"] / max(1, gpus * node.get("GPU", 0))) for cpus, node in rooms]
    best = max(shares, default=0) if count == 1 else min(shares, default=0)
    return int(best) // count


def gpu_share(trainings: int) -> float:
    """The part of a GPU to ask for when so many trainings share one. Ray rounds to four digits: 7 x 0.1429 is more than
    one GPU, and the seventh would wait for ever."""
    return math.floor(1e4 / trainings) / 1e4


def require(
    cpus: int,
    gpus: float = 0,
    *,
    memory: int = 0,
    workers: int = 1,
    driver: float = 0,
    at_least: int = 1,
    at_most: int | None = None,
    advice: str,
) -> int:
    """How many trainings the cluster can run at a time, at most `at_most`, with the nodes that it could add.

    A training has `workers` workers, each with so many CPUs, GPUs and bytes of memory on one node, and a driver, which
    takes so much of the resource "raymed_driver" where the cluster has it, and else of a node's CPUs.

    Raises NoRoom when that is below `at_least`, where Ray would wait without a word. What is in use by others now is
    counted as free: a line says so where it has to be waited for.
    """
    live = _live()
    more = growth(live)
    needs = {"CPU": cpus, "GPU": gpus, "memory": memory}
    nodes = [*live, *more.best(lambda node: _slots(node, needs))]
    fits = _room(nodes, needs, workers, driver)
    if fits < at_least:
        have = " and ".join(_resources(node, memory, driver) for node in live)
        alone = {kind: _room(nodes, {kind: need}, workers, 0) for kind, need in needs.items() if need}
        short = [f"its {kind} is enough for {room}" for kind, room in alone.items() if room < at_least]
        raise NoRoom(
            f"this needs {at_least} x {_needed(needs, workers, driver)} at a time, and the cluster has {have} on "
            f"{len(live)} node(s){_told(more)} ({', '.join(short) or 'no node has enough of all at once'}): {advice}"
        )
    _tell_of_waiting({kind: at_least * workers * need for kind, need in needs.items()}, more)
    return fits if at_most is None else min(fits, at_most)


def _live() -> list[dict[str, float]]:
    """Resources of the live nodes."""
    return list(_live_by_id().values())


def _live_by_id() -> dict[str, dict[str, float]]:
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _told(more: Growth) -> str:
    """What may come, in words, kind by kind; nothing where nothing may."""
    kinds = Counter(_resources(node, 0, 0) for node in more.nodes)
    shown = " or ".join(f"{min(count, more.most)} of {kind}" for kind, count in kinds.items())
    return f", and may get {more.most} more: {shown}" if more.most else ""


def _room(nodes: Sequence[Mapping[str, float]], needs: Mapping[str, float], workers: int, driver: float) -> int:
    """How many trainings fit on the nodes; nothing is shared between two nodes but the drivers' resource."""
    most = sum(_slots(node, needs) for node in nodes) // workers
    drivers = sum(node.get(DRIVER, 0) for node in nodes)
    if not driver:
        return most
    if drivers:
        return min(most, _times(drivers, driver))
    return next(n for n in range(most, -1, -1) if _slots_beside(nodes, needs, n, driver) >= n * workers)


def _slots_beside(nodes: Sequence[Mapping[str, float]], needs: Mapping[str, float], n: int, driver: float) -> int:
    """Workers that fit beside n drivers, each of which goes where it takes the place of the fewest workers."""
    left = [dict(node) for node in nodes]
    for _ in range(n):
        with_driver = [node | {"CPU": node.get("CPU", 0) - driver} for node in left]
        loss = [
            _slots(node, needs) - _slots(less, needs) if less["CPU"] >= 0 else math.inf
            for node, less in zip(left, with_driver, strict=True)
        ]
        place = loss.index(min(loss))
        if loss[place] == math.inf:
            return -1
        left[place] = with_driver[place]
    return sum(_slots(node, needs) for node in left)


def _slots(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """Workers that fit on a node."""
    return min(_times(node.get(kind, 0), need) for kind, need in needs.items() if need)


def _times(have: float, need: float) -> int:
    return int(have / need + 1e-6)  # a third of a GPU is there three times


def _needed(needs: Mapping[str, float], workers: int, driver: float) -> str:
    """What one training takes, in words."""
    memory = f", {needs['memory'] / 1e9:.1f} GB memory" if needs["memory"] else ""
    each = f"{needs['CPU']:g} CPUs, {needs['GPU']:g} GPUs{memory}"
    if driver:
        return f"({workers} x ({each}) and {driver:g} {DRIVER} or CPUs for its driver)"
    return each if workers == 1 else f"{workers} x ({each})"


def _resources(node: Mapping[str, float], memory: float, driver: float) -> str:
    """What a node has, in words, of what is asked for."""
    drivers = f", {node.get(DRIVER, 0):g} {DRIVER}" if driver else ""
    gigabytes = f", {node.get('memory', 0) / 1e9:.1f} GB memory" if memory else ""
    return f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs{gigabytes}{drivers}"


def _tell_of_waiting(needs: Mapping[str, float], more: Growth) -> None:
    """Say so where the least that is needed is not free now. What has just ended is free a moment later."""
    import ray

    until = time.monotonic() + _SETTLES
    while lacking := {kind for kind, need in needs.items() if need > ray.available_resources().get(kind, 0)}:
        if time.monotonic() > until:
            free, total = ray.available_resources(), ray.cluster_resources()
            shown = ", ".join(f"{free.get(k, 0):g} of {total.get(k, 0):g} {k}" for k in sorted(lacking))
            rest = f"this cluster may start {more.most} more node(s): {WHO_KNOWS}" if more.most else _IN_USE
            print(f"waiting: only {shown} is free now, {rest}", flush=True)
            return
        time.sleep(0.1)
