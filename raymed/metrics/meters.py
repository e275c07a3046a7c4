"""Meters collect what a model predicted while a data set is walked through, on any number of workers.

Each worker updates its own meter; the meters are then merged and computed. A meter keeps every row under its index in
the manifest, so the result does not depend on how rows were spread over workers and batches, to the last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from raymed.metrics.classification import binary_metrics

if TYPE_CHECKING:
    from torch import Tensor


class Meter(Protocol):
    """Accumulates over batches (update) and workers (merge); picklable, so that workers can exchange meters."""

    def update(self, prediction: dict[str, Tensor], batch: Any, index: Tensor) -> None:
        """Add a batch. prediction: what the task's `predict` returned; index: (B,) row numbers in the manifest."""
        ...

    def merge(self, other: Self) -> None:
        """Add what another worker's meter has seen."""
        ...

    def compute(self) -> dict[str, float]:
        """Metrics of the distinct rows seen."""
        ...


class BinaryMeter:
    """Scores and targets of a binary classifier.

    `scores` (float64), `targets` (int64) and `index` (int64) are (N,) arrays in order of the row number. A row seen
    more than once, as padding is, stands there once; the lowest of its scores, should they differ, so that the order
    of merging does not matter.
    """

    def __init__(self) -> None:
        self._scores: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._index: list[np.ndarray] = []

    def update(self, prediction: dict[str, Tensor], batch: Any, index: Tensor) -> None:
        """prediction: "score" (B,) in [0, 1], or "logit" (B,), of which the sigmoid is taken in float64;
        batch.label: (B,) of {0, 1}."""
        from scipy.special import expit  # torch's vectorised sigmoid depends on the place in the batch, in the last bit

        if "score" in prediction:
            self._scores.append(_float64(prediction["score"]))
        else:
            self._scores.append(expit(_float64(prediction["logit"])))
        self._targets.append(batch.label.cpu().numpy())
        self._index.append(index.cpu().numpy())

    def merge(self, other: Self) -> None:
        self._scores += other._scores
        self._targets += other._targets
        self._index += other._index

    @property
    def scores(self) -> np.ndarray:
        return self._rows()[0]

    @property
    def targets(self) -> np.ndarray:
        return self._rows()[1]

    @property
    def index(self) -> np.ndarray:
        return self._rows()[2]

    def compute(self) -> dict[str, float]:
        """auroc, auprc, accuracy_at_0.5, brier and ece: what needs no threshold tuned on other data."""
        scores, targets, _ = self._rows()
        metrics = binary_metrics(scores, targets, threshold=0.5)
        return {name: metrics[name] for name in ("auroc", "auprc", "accuracy_at_0.5", "brier", "ece")}

    def _rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scores = np.concatenate([np.empty(0), *self._scores])
        targets = np.concatenate([np.empty(0, np.int64), *self._targets])
        index = np.concatenate([np.empty(0, np.int64), *self._index])
        order = np.lexsort((scores, index))
        kept = order[np.diff(index[order], prepend=-1) != 0]
        return scores[kept], targets[kept], index[kept]


def _float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
