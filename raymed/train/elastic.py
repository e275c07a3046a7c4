"""How a batch is shared when there are fewer workers than were asked for.

A group that has lost a node goes on with fewer workers and the same global batch, in more micro-batches: none of them
is larger on a worker than before, so what fitted into its memory still does. Normalisation by the batch then sees
smaller micro-batches, and dropout, which is seeded by the worker, draws other units; with group normalisation and no
dropout the curve is that of an undisturbed run but for the order of sums.
"""

import dataclasses
from collections.abc import Sequence

from raymed.config import UserError
from raymed.tasks.task import Phase


def for_world(phase: Phase, workers: int, world: int) -> Phase:
    """The phase as `world` workers train what was asked of `workers`: as many micro-batches as keep each worker's no
    larger than before, or the next more that divide the batch.

    Raises UserError where the batch cannot be shared out among so many workers.
    """
    if world == workers:
        return phase
    share, rest = divmod(phase.batch_size, world)
    least = -(-phase.accumulate * workers // world)
    counts = [count for count in range(least, share + 1) if share % count == 0]
    if rest or not counts:
        raise UserError(
            f"{phase.name}.batch_size ({phase.batch_size}) cannot be shared out among {world} workers, of "
            f"{workers}: make it a multiple of {world}"
        )
    return dataclasses.replace(phase, accumulate=counts[0])


def group_sizes(phases: Sequence[Phase], workers: int, min_workers: int) -> list[int]:
    """The numbers of workers, the largest first, among which the batch of every phase can be shared out.

    Raises UserError where that is not so of `min_workers`.
    """
    sizes = [workers]
    for size in range(workers - 1, min_workers - 1, -1):
        try:
            for phase in phases:
                for_world(phase, workers, size)
            sizes.append(size)
        except UserError as error:
            if size == min_workers:
                raise UserError(f"compute.min_workers is {min_workers}, but {error}") from None
    return sizes
