"""Out of memory: the phase goes on from its last checkpoint with micro-batches of half the size, once.

The batch and the number of steps stay, so a loss that is a mean over images, or that sees all micro-batches together
(SupCon), keeps its curve; normalisation statistics are then those of the smaller micro-batches.
"""

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raymed.config import UserError
from raymed.distributed import rank, world_size
from raymed.tasks.task import Phase

_CPU_TEXTS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


class OutOfMemory(Exception):
    """A training step needed more memory than there is."""


class WorkerFailed(UserError):
    """One of several workers cannot go on, and the others do not know: its process is to end, which they notice."""


@contextmanager
def noticed(phase: Phase, step: int) -> Iterator[None]:
    """Within: an allocation of torch's that fails becomes OutOfMemory, or with several workers WorkerFailed.

    Workers cannot agree to go on: while one has failed, the others wait in a collective that it will never join.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        what = f"out of memory at step {step + 1} of phase {phase.name}"
        if world_size() > 1:
            raise WorkerFailed(f"{what} on worker {rank()}: {_advice(phase)}") from None
        raise OutOfMemory(what) from None


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA's allocator raises a class of its own, the CPU's says so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _CPU_TEXTS)


def halved(phase: Phase, reason: str) -> Phase:
    """The phase with twice the micro-batches, of half the size. Raises UserError where that does not divide."""
    accumulate = 2 * phase.accumulate
    if phase.batch_size % accumulate:
        raise UserError(
            f"{reason}, and its batch of {phase.batch_size} cannot be cut into {accumulate} micro-batches: "
            f"set --{phase.name}.batch-size to a multiple of {accumulate}, or use a smaller model or images"
        )
    return dataclasses.replace(phase, accumulate=accumulate)


def give_up(phase: Phase, reason: str) -> UserError:
    """What to say when micro-batches of half the size were too large as well."""
    return UserError(f"{reason} again, with {phase.accumulate} micro-batches a step: {_advice(phase)}")


def _advice(phase: Phase) -> str:
    return (
        f"set --{phase.name}.accumulate to {2 * phase.accumulate} or more (the same batch in smaller parts), "
        f"--{phase.name}.batch-size lower, or use a smaller model or images"
    )


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
