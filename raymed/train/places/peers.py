"""What the processes of one training owe each other, whoever started them: Ray Train, torchrun or SLURM."""

from datetime import timedelta

import torch.distributed as dist

from raymed.storage.client import PATIENCE, number
from raymed.train.unit import Unit, unit_data

_LOSSES = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo has no class for them
_LEAST, _MORE = 1800.0, 600.0  # seconds


def collective_timeout() -> timedelta:
    """How long a process waits for the others in a collective: longer than any of them waits for S3."""
    return timedelta(seconds=max(_LEAST, number("RAYMED_S3_PATIENCE", PATIENCE) + _MORE))


def is_loss(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOSSES)


def load_in_turn(unit: Unit) -> None:
    """Load a unit's data; one process of a machine at a time: the first decodes them, the others find them decoded."""
    from filelock import FileLock

    unit.cache.mkdir(parents=True, exist_ok=True)
    with FileLock(unit.cache / "loading.lock"):
        unit_data(unit)
