"""Between two evaluations: whether to stop, and whether a checkpoint is due, agreed by all workers.

One worker alone looks after every step. Several look after the first, and then as seldom as their steps are quick, all
of them at the same steps: after every tenth at most, since looking is a collective, and after as many as last two
seconds on the slowest of them, since a node that will go leaves half a minute. One that is to stop stops all.
"""

import time
from collections.abc import Callable, Sequence

import torch

from raymed.distributed import max_over_ranks, world_size

FLUSH = 10
"""Steps between two looks at losses and at each other, at most: each costs a synchronisation."""
_SECONDS = 2.0  # between two looks, where ten steps take longer


class Pulse:
    """One phase's.

    interrupted: whether this worker is to stop. minutes: the longest time between two checkpoints.
    """

    def __init__(self, interrupted: Callable[[], bool], minutes: float, device: torch.device):
        self.interrupted, self.longest, self.device = interrupted, 60 * minutes, device
        self.every = self.left = 1
        self.looked_at = self.saved_at = time.monotonic()

    def after_step(self) -> tuple[bool, bool]:
        """(whether to stop, whether a checkpoint is due). Collective."""
        self.left -= 1
        if self.left:
            return False, False
        now = time.monotonic()
        each, self.looked_at = (now - self.looked_at) / self.every, now
        wanted = min(FLUSH, max(1, int(_SECONDS / max(each, 1e-9))))
        stop, due, every = self._agreed([self.interrupted(), now - self.saved_at > self.longest, -wanted])
        self.every = self.left = 1 if world_size() == 1 else -int(every)
        return bool(stop), bool(due)

    def saved(self) -> None:
        """A checkpoint was saved just now."""
        self.saved_at = time.monotonic()

    def _agreed(self, wishes: Sequence[float]) -> list[float]:
        return list(wishes) if world_size() == 1 else max_over_ranks(wishes, self.device)
