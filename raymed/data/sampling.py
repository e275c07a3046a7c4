"""Which images make up the batch of a step: pure functions of (seed, step), so that a resumed run goes on exactly.

A sampler is an endless stream of shuffled epochs, cut into batches; nothing is dropped at the end of an epoch.
"""

import functools
from dataclasses import dataclass

import numpy as np

from raymed.config import UserError, check_range


@dataclass(frozen=True, eq=False)
class RandomSampler:
    """Each of `rows` once an epoch, in random order."""

    rows: np.ndarray
    """(N,) what to draw from, for example `DataSet.splits["train"]`."""
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        check_range("batch_size", self.batch_size, 1)
        check_range("number of images to draw from", len(self.rows), 1)

    def indices(self, step: int) -> np.ndarray:
        """(batch_size,) elements of `rows` for a step, from 0."""
        return _window(self.rows, step * self.batch_size, self.batch_size, self.seed, 0)


@dataclass(frozen=True, eq=False)
class BalancedSampler:
    """As many of each class in every batch: within a class, each image once before any comes again."""

    rows: np.ndarray
    """(N,) what to draw from."""
    labels: np.ndarray
    """(N,) class of each of `rows`."""
    batch_size: int
    """A multiple of the number of classes."""
    seed: int

    def __post_init__(self) -> None:
        check_range("batch_size", self.batch_size, 1)
        num_classes = len(np.unique(self.labels))
        if self.batch_size % num_classes:
            raise UserError(
                f"batch_size must be a multiple of the number of classes ({num_classes}) for balanced batches, "
                f"got {self.batch_size}"
            )

    def indices(self, step: int) -> np.ndarray:
        """(batch_size,) elements of `rows` for a step, from 0, in random order."""
        size = self.batch_size // len(self._by_class)
        parts = [
            _window(rows, step * size, size, self.seed, stream) for stream, rows in enumerate(self._by_class, start=1)
        ]
        return _generator(self.seed, step, 0).permutation(np.concatenate(parts))

    @functools.cached_property
    def _by_class(self) -> list[np.ndarray]:
        return [self.rows[self.labels == name] for name in np.unique(self.labels)]


def _window(rows: np.ndarray, start: int, size: int, seed: int, stream: int) -> np.ndarray:
    """Elements start, ..., start + size - 1 of the endless stream of shuffled epochs."""
    first, last = start // len(rows), (start + size - 1) // len(rows)
    epochs = [_epoch(len(rows), seed, epoch, stream) for epoch in range(first, last + 1)]
    offset = start - first * len(rows)
    return rows[np.concatenate(epochs)[offset : offset + size]]


@functools.lru_cache(maxsize=16)
def _epoch(length: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """The order of one epoch, which many steps share."""
    return _generator(seed, epoch, stream).permutation(length)


def _generator(seed: int, counter: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, counter, stream])))
