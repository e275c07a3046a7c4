"""The Ray cluster that a job runs on: the one it was submitted to, or one of its own on this machine."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from raymed.config import UserError

# Ray Train looks at a worker every two seconds, and at a worker group's start for one minute; ours may need longer.
_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
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
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
    else:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            logging_level=logging.WARNING,
            _temp_dir=tempfile.mkdtemp(prefix="ray-"),
            object_store_memory=200 * 2**20,
        )
    try:
        yield
    finally:
        ray.shutdown()


def require(cpus: float, gpus: float = 0, *, at_once: int = 1, advice: str) -> int:
    """How many groups of so many CPUs and GPUs the cluster can run at a time, at most `at_once`.

    Raises UserError when not even one fits, where Ray would wait without a word.
    """
    import ray

    have = ray.cluster_resources()
    fits = min(
        [at_once]
        + [int(have.get(kind, 0) // need) for kind, need in (("CPU", cpus), ("GPU", gpus)) if need > 0]
    )
    if fits < 1:
        raise UserError(
            f"this needs {cpus:g} CPUs and {gpus:g} GPUs at a time, and the cluster has {have.get('CPU', 0):g} CPUs "
            f"and {have.get('GPU', 0):g} GPUs: {advice}"
        )
    return fits
