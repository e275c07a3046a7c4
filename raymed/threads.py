"""Torch's threads on the CPU. Sums are split among them, so their number shows in the last bits of a result."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Within: one thread, so that results come out the same everywhere on a machine. The number before is restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
