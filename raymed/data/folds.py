"""Nested cross-validation: outer folds say how good the whole procedure is, inner folds choose within it.

Every image is in the test split of exactly one outer fold. What is not is split again: each of its inner folds is the
validation split of one training. Folds hold whole patients (and exact duplicates together) and are stratified by class.
"""

from dataclasses import dataclass

import numpy as np

from raymed.config import UserError, check_range
from raymed.data.dataset import DataSet
from raymed.data.splits import linked


@dataclass(frozen=True)
class Fold:
    """One training of a nested cross-validation."""

    outer: int
    num_outer: int
    inner: int
    num_inner: int
    seed: int = 0
    """Of the folds' making."""

    def __post_init__(self) -> None:
        check_range("outer folds", self.num_outer, 2)
        check_range("inner folds", self.num_inner, 2)

    @property
    def name(self) -> str:
        """For people and folders."""
        return f"outer-{self.outer}-inner-{self.inner}"

    def apply(self, data: DataSet) -> DataSet:
        """The data set with this fold's splits in place of its own.

        Raises UserError where there are too few patients of a class for so many folds.
        """
        groups = np.array(linked([str(p) for p in data.patients], [str(c) for c in data.content]))
        everything = np.arange(len(data))
        rest, test = _part(everything, groups, data.labels, self.num_outer, self.outer, self.seed)
        train, val = _part(rest, groups, data.labels, self.num_inner, self.inner, self.seed + 1)
        splits = {"train": train, "val": val, "test": test}
        for name, indices in splits.items():
            if data.positive and len(np.unique(data.labels[indices])) < 2:
                raise UserError(f"{self.name} has only one class in {name}: use fewer folds")
        return data.with_splits(splits)


def _part(
    indices: np.ndarray, groups: np.ndarray, labels: np.ndarray, num: int, which: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(the others, fold number `which`) of the given images, ascending."""
    from sklearn.model_selection import StratifiedGroupKFold

    fewest = min(len(np.unique(groups[indices][labels[indices] == label])) for label in np.unique(labels[indices]))
    if fewest < num:
        raise UserError(f"a class has only {fewest} patients where {num} folds are made: use fewer folds")
    folds = StratifiedGroupKFold(num, shuffle=True, random_state=seed)
    others, fold = list(folds.split(indices, labels[indices], groups[indices]))[which]
    return indices[others], indices[fold]
