"""The Ray cluster that a job runs on: the one it was submitted to, or one of its own on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory

from raymed.config import UserError

# Ray Train looks at a worker every two seconds, and at a worker group's start for one minute; ours may need longer.
_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the loop's own checkpoints are what a lost worker costs
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would resolve an environment in every worker
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: it saves the state first
    "RAY_DEDUP_LOGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # progress is ours to print
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials are recorded in our own journal
}


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
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=True, logging_level=logging.WARNING)
        else:
            _start(num_cpus, stack.enter_context(TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)))
        stack.callback(ray.shutdown)
        yield


def _start(num_cpus: int | None, folder: str) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": _calm_worker},
        _temp_dir=folder,
        object_store_memory=200 * 2**20,
    )


def _calm_worker() -> None:
    """Runs in every worker: Ray Train warns each second that a cluster without a dashboard has no dashboard."""
    cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(cleaner).setLevel(logging.ERROR)


def gpus_of(device: str) -> int:
    """GPUs of one worker: one where compute.device is cuda, or auto and the cluster has any. Needs a connected Ray."""
    import ray

    return int(device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1))


def require(cpus: int, gpus: int = 0, *, at_least: int = 1, at_most: int | None = None, advice: str) -> int:
    """How many workers of so many CPUs and GPUs, each on one node, the cluster can run at a time, at most `at_most`.

    Raises UserError when that is below `at_least`, where Ray would wait without a word.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needs = [(kind, need) for kind, need in (("CPU", cpus), ("GPU", gpus)) if need]
    fits = sum(min(int(node.get(kind, 0) // need) for kind, need in needs) for node in nodes)
    if fits < at_least:
        have = " and ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UserError(
            f"this needs {at_least} x {cpus} CPUs, {gpus} GPUs at a time, and the cluster has {have} on "
            f"{len(nodes)} node(s): {advice}"
        )
    return fits if at_most is None else min(fits, at_most)
