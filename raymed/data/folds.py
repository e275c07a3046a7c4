"""Cross-validation: every image is scored by a network that has not seen its patient.

In each repeat every image is held out once, by one of k folds; of what is left a part is for validation. Nested, so
that also what is chosen has not seen them: `raymed.tune.nested`.

Folds hold whole patients (and exact duplicates together) and are stratified by class.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymed.config import UserError, check_range
from raymed.data.dataset import DataSet
from raymed.data.splits import deal, linked

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Indices (int64, ascending) for training, for validation, and held out."""


@dataclass(frozen=True)
class CrossValidation:
    """Repeated k-fold cross-validation: k x repeats trainings."""

    folds: int = 5
    repeats: int = 3
    val_fraction: float = 0.15
    """Part of the images that are not held out, for validation."""
    seed: int = 0
    """Of the folds' making."""

    def __post_init__(self) -> None:
        check_range("folds", self.folds, 2)
        check_range("repeats", self.repeats, 1)
        check_range("val_fraction", self.val_fraction, 0, 1, low_open=True, high_open=True)

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "CrossValidation":
        """ "5x3" or "5": folds, and repeats. Raises UserError for anything else."""
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
        if match is None:
            raise UserError(f"--cv must be FOLDSxREPEATS such as 5x3, got {text!r}")
        return cls(int(match[1]), int(match[2] or 1), seed=seed)

    def trainings(self) -> list["RepeatedFold"]:
        """One a fold and repeat, repeat by repeat."""
        return [RepeatedFold(self, repeat, fold) for repeat in range(self.repeats) for fold in range(self.folds)]


@dataclass(frozen=True)
class RepeatedFold:
    """One training of a repeated cross-validation."""

    cv: CrossValidation
    repeat: int
    fold: int

    @property
    def name(self) -> str:
        """For people and folders."""
        return f"repeat-{self.repeat}-fold-{self.fold}"

    def apply(self, data: DataSet) -> DataSet:
        """The data set with the images held out as its test split; its own splits are forgotten.

        Raises UserError as `folds`.
        """
        names = np.array(data.classes)[data.class_codes]
        what = "patient" if data.has_patients else "image"
        parts = self.parts(names.tolist(), _by_content(data), data.positive, what)
        return data.with_splits(dict(zip(("train", "val", "test"), parts, strict=True)))

    def parts(self, labels: Sequence[str], groups: Sequence[str], positive: str, what: str = "patient") -> Parts:
        """This training's part of what `folds` gives."""
        _check_enough(groups, labels, positive, self.cv.folds, what)
        labels, groups = list(labels), list(groups)
        equal = [1 / self.cv.folds] * self.cv.folds
        side = np.array(deal(groups, labels, positive, equal, f"{self.cv.seed}/repeat {self.repeat}"))
        held_out, rest = np.flatnonzero(side == self.fold), np.flatnonzero(side != self.fold)
        part = (1 - self.cv.val_fraction, self.cv.val_fraction)
        seed = f"{self.cv.seed}/{self.name}"
        is_val = np.array(deal([groups[i] for i in rest], [labels[i] for i in rest], positive, part, seed)) == 1
        parts = {"train": rest[~is_val], "val": rest[is_val], "the held out part": held_out}
        for name, indices in parts.items():
            if len({labels[i] == positive for i in indices}) < (2 if positive else 1):
                raise UserError(f"{self.name} lacks a class in {name}: use fewer folds")
        return parts["train"], parts["val"], held_out


def folds(
    labels: Sequence[str],
    groups: Sequence[str],
    positive: str,
    *,
    k: int = 5,
    repeats: int = 3,
    val_fraction: float = 0.15,
    seed: int = 0,
) -> list[Parts]:
    """Repeated, grouped, stratified k-fold: k x repeats triples (train, val, held out), repeat by repeat.

    In a repeat every image is held out once, and every group is held out whole. Each fold has 1/k of the images of each
    class, as near as whole groups allow (`splits.deal`); so has val its fraction of the rest. The result depends on the
    names of groups and not on the order of images.

    Args:
        labels: (N,) name of each image's class.
        groups: (N,) what stays together: the patient (see `splits.linked`).
        positive: the class to be found; "" = there are no classes.
        val_fraction: part of the images that are not held out.

    Raises:
        UserError: the positive class, or all others together, have too few groups.
    """
    cv = CrossValidation(k, repeats, val_fraction, seed)
    return [training.parts(labels, groups, positive) for training in cv.trainings()]


def _by_content(data: DataSet) -> list[str]:
    """What stays together, named by the least of its images' hashes: the same in any order of the manifest's rows."""
    groups = linked([str(p) for p in data.patients], [str(c) for c in data.content])
    least: dict[str, int] = {}
    for group, content in zip(groups, data.content.tolist(), strict=True):
        least[group] = min(content, least.get(group, content))
    return [f"{least[group]:016x}" for group in groups]


def _check_enough(groups: Sequence[str], labels: Sequence[str], positive: str, k: int, what: str) -> None:
    """Raise UserError where not every fold can hold out one group of each side and leave one each to train and val."""
    sides = {f"the positive class {positive!r} has": [True], "the other classes have": [False]}
    for who, side in (sides if positive else {"the data set has": [True, False]}).items():
        num = len({group for group, label in zip(groups, labels, strict=True) if (label == positive) in side})
        if num < k or num - -(-num // k) < 2:
            raise UserError(
                f"{who} {num} {what}{'s' * (num != 1)}, too few for {k} folds: each fold holds out at least one, and "
                "leaves one to train on and one for validation"
            )
