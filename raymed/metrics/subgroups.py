"""Figures by subgroup: whether a model does as well at every site, with every scanner, in every age band.

A subgroup with fewer than 10 patients of either class is "too few" and has no figure: an interval would be wider than
any difference worth finding, and a number is read without it. Many subgroups have chance findings: of 20, one differs
from the others at a level of 95 % where nothing differs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raymed.config import UserError
from raymed.metrics.bootstrap import Figure, bootstrap_ci
from raymed.metrics.classification import binary_statistic
from raymed.metrics.operating import DecisionFigure, decision_figures

MIN_PATIENTS = 10
AGE_EDGES = (18, 30, 40, 50, 65, 80)
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Subgroup:
    """The units that have one value of an attribute.

    attribute, group: "site", "A". num, num_positive, num_negative: units. num_patients: distinct. too_few: why there
    are no figures; "" where there are. auroc, sensitivity, specificity: with intervals, or None.
    """

    attribute: str
    group: str
    num: int
    num_positive: int
    num_negative: int
    num_patients: int
    too_few: str
    auroc: Figure | None = None
    sensitivity: DecisionFigure | None = None
    specificity: DecisionFigure | None = None


def subgroup_figures(
    scores: ArrayLike,
    targets: ArrayLike,
    patients: np.ndarray,
    threshold: float,
    attributes: Mapping[str, Sequence[str]],
    *,
    min_patients: int = MIN_PATIENTS,
    **options: Any,
) -> list[Subgroup]:
    """A `Subgroup` for every value of every attribute, numbers first and by size, what is not stated last.

    Args:
        scores: (N,) in [0, 1]. targets: (N,) of {0, 1}. patients: (N,) whose each unit is.
        threshold: decided positive when score >= threshold: the same in all subgroups.
        attributes: {"site": N texts, ...}; an empty text is "not stated". Years and ages are better given as bands.
        min_patients: with a positive unit, and with a negative one, for a subgroup to have figures.
        options: n_boot, seed, level, unit of `bootstrap_ci`.

    Raises:
        UserError: as `binary_metrics`; an attribute that has not N values.
    """
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets)
    found = []
    for attribute, values in attributes.items():
        if len(values) != len(scores):
            raise UserError(f"the attribute {attribute!r} must have {len(scores)} values, got {len(values)}")
        texts = np.array([str(value).strip() or NOT_STATED for value in values], object)
        for group in sorted(set(texts), key=_order):
            rows = np.flatnonzero(texts == group)
            few, figures = _too_few(targets[rows], patients[rows], min_patients), {}
            if not few:
                figures = _figures(scores[rows], targets[rows], patients[rows], threshold, options)
            num_positive, num_patients = int((targets[rows] == 1).sum()), len(np.unique(patients[rows]))
            counts = len(rows), num_positive, len(rows) - num_positive, num_patients
            found.append(Subgroup(attribute, group, *counts, few, **figures))
    return found


def age_band(ages: Sequence[str], edges: Sequence[int] = AGE_EDGES) -> list[str]:
    """Ages in whole years ("34") -> "0-17", "18-29", ..., "80+"; "" where none is stated.

    Raises UserError for an age that is no whole number, by its row from 1.
    """
    bands = [f"{low}-{high - 1}" for low, high in zip((0, *edges), edges, strict=False)] + [f"{edges[-1]}+"]

    def band(row: int, age: str) -> str:
        if not age:
            return ""
        if not re.fullmatch(r"\d{1,3}", age):
            raise UserError(f"row {row}: age must be in whole years, such as 34, got {age!r}")
        return bands[int(np.searchsorted(edges, int(age), "right"))]

    return [band(row, str(age).strip()) for row, age in enumerate(ages, 1)]


def _figures(
    scores: np.ndarray, targets: np.ndarray, patients: np.ndarray, threshold: float, options: Mapping[str, Any]
) -> dict[str, Any]:
    decisions = decision_figures(scores >= threshold, targets, patients, **options)
    auroc = bootstrap_ci([binary_statistic(scores, targets, threshold)], [patients], **options)["auroc"]
    return {"auroc": auroc, "sensitivity": decisions["sensitivity"], "specificity": decisions["specificity"]}


def _too_few(targets: np.ndarray, patients: np.ndarray, needed: int) -> str:
    counts = {"positive": len(np.unique(patients[targets == 1])), "negative": len(np.unique(patients[targets == 0]))}
    few = [f"{num} {name}" for name, num in counts.items() if num < needed]
    return f"too few: {' and '.join(few)} where {needed} patients are needed" if few else ""


def _order(group: str) -> tuple[bool, bool, float, str]:
    """What is not stated last, numbers by size, then texts by alphabet."""
    number = re.match(r"\d+", group)
    return group == NOT_STATED, number is None, float(number[0]) if number else 0.0, group
