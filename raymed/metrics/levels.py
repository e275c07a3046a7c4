"""From the scores of images to those of sides, cases or patients, the levels at which a reader decides.

    image -> side of a case -> case -> patient

A case has several images and one answer. Its score is the mean of its images' scores, the highest of them (one view
that shows the finding is enough), or noisy-OR, 1 - prod(1 - p): the probability that at least one image shows it, were
they independent. Views of one patient are not, so it comes out too high and wants calibration. A threshold and a
calibration belong to scores of the level, and the kind of aggregation, that they are used on.

Source: Pearl, "Probabilistic reasoning in intelligent systems", 1988, section 4.3 (noisy-OR).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from raymed.config import UserError, check_choice, check_range

Aggregate = Literal["mean", "max", "noisy_or"]
Level = Literal["image", "case+side", "case", "patient"]
AGGREGATES: tuple[str, ...] = get_args(Aggregate)
LEVELS: tuple[str, ...] = get_args(Level)
_SHOWN = 10


@dataclass(frozen=True)
class LevelTable:
    """U units (images, sides, cases or patients) of a split, in ascending order of their numbers.

    level: what a unit is. scores: (U,) float64 probabilities of the positive class in [0, 1]. targets: (U,) int64 of
    {0, 1}. patients: (U,) who each is of. units: (U,) int64 numbers, as `level_table` was given them. num_images: (U,)
    int64, rows that were aggregated.
    """

    level: str
    scores: np.ndarray
    targets: np.ndarray
    patients: np.ndarray
    units: np.ndarray
    num_images: np.ndarray

    def __len__(self) -> int:
        return len(self.units)


def aggregate(scores: ArrayLike, units: ArrayLike, how: Aggregate) -> tuple[np.ndarray, np.ndarray]:
    """One score a unit, the same to the last bit in whatever order the rows stand.

    Args:
        scores: (N,) probabilities of the positive class in [0, 1].
        units: (N,) int, the unit of each row.
        how: "mean": (1/n) sum p_i. "max": max p_i. "noisy_or": 1 - prod(1 - p_i), as -expm1(sum log1p(-p_i)).

    Returns:
        (U,) float64 scores in [0, 1], and (U,) int64 numbers of the units, ascending.

    Raises:
        UserError: a score is NaN or outside [0, 1]; scores and units of different lengths; an unknown `how`.
    """
    check_choice("aggregate", how, AGGREGATES)
    scores, units = np.asarray(scores, np.float64), np.asarray(units, np.int64)
    if scores.ndim != 1 or scores.shape != units.shape:
        raise UserError(f"scores and units must both be (N,), got {scores.shape} and {units.shape}")
    if not len(scores):
        return scores, units
    check_range("scores", scores, 0, 1)
    order = np.lexsort((scores, units))  # by score within a unit: sums do not depend on the order of rows
    scores, units = scores[order], units[order]
    first = np.flatnonzero(np.r_[True, units[1:] != units[:-1]])
    ids, sizes = units[first], np.diff(first, append=len(units))
    if how == "mean":
        return np.add.reduceat(scores, first) / sizes, ids
    if how == "max":
        return np.maximum.reduceat(scores, first), ids
    with np.errstate(divide="ignore"):  # a score of 1: log 0 = -inf, and the unit's score is 1
        return -np.expm1(np.add.reduceat(np.log1p(-scores), first)), ids


def unit_numbers(
    level: Level,
    patients: np.ndarray,
    cases: np.ndarray | None = None,
    sides: np.ndarray | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """(N,) int64: the unit of each of N images at a level.

    Args:
        level: "image": each is its own. "case+side": images of one case and one side. "case". "patient".
        patients, cases: (N,) int codes. sides: (N,) text. cases and sides are None where the data have none.
        rows: (N,) of the manifest, from 1, for messages; by default 1, ..., N.

    Raises:
        UserError: an unknown level; one that needs cases or sides where there are none; an image without a side.
    """
    check_choice("unit", level, LEVELS)
    if level == "image":
        return np.arange(len(patients))
    if level == "patient":
        return np.asarray(patients, np.int64)
    if cases is None:
        raise UserError(f"unit = {level} needs to know the case of each image: name its column (--data.case COLUMN)")
    if level == "case":
        return np.asarray(cases, np.int64)
    if sides is None:
        raise UserError("unit = case+side needs to know the side of each image: name its column (--data.side COLUMN)")
    if (without := np.asarray(sides) == "").any():
        rows = np.arange(1, len(sides) + 1) if rows is None else rows
        where = _rows(np.asarray(rows)[without])
        raise UserError(f"unit = case+side, but no side is stated in {where}: fill it in, or take unit = case")
    sides_numbered = np.unique(sides, return_inverse=True)[1]
    return np.unique(np.column_stack([cases, sides_numbered]), axis=0, return_inverse=True)[1].astype(np.int64)


def level_table(
    scores: ArrayLike,
    targets: ArrayLike,
    patients: ArrayLike,
    units: ArrayLike,
    how: Aggregate,
    *,
    level: str = "case",
    rows: ArrayLike | None = None,
) -> LevelTable:
    """The units of N images: scores by `aggregate`, and the target and patient that a unit's images have in common.

    Args:
        scores, units, how: as `aggregate`. targets: (N,) of {0, 1}. patients: (N,).
        level: what a unit is, for messages.
        rows: (N,) of the manifest, from 1, for messages; by default 1, ..., N.

    Raises:
        UserError: as `aggregate`; a target is neither 0 nor 1; images of one unit with different labels or of different
            patients, all named by their rows.
    """
    found, ids = aggregate(scores, units, how)
    units, targets, patients = np.asarray(units, np.int64), np.asarray(targets), np.asarray(patients)
    if not targets.shape == patients.shape == units.shape:
        raise UserError(
            f"targets and patients must both be ({len(units)},) as the scores, got {targets.shape} and {patients.shape}"
        )
    if wrong := set(np.unique(targets).tolist()) - {0, 1}:
        raise UserError(f"targets must be 0 or 1, got {min(wrong):g}")
    rows = np.arange(1, len(units) + 1) if rows is None else np.asarray(rows)
    if several := _mixed(np.unique(patients, return_inverse=True)[1], units):
        advice = f"give each {level} a name of its own"
        raise UserError(_named(several, units, rows, f"the images of one {level} are of several patients: {advice}"))
    if several := _mixed(targets, units):
        advice = f"correct them, or decide about something finer than the {level} (--decide.unit image)"
        raise UserError(_named(several, units, rows, f"the labels of one {level} differ: {advice}", targets))
    _, first, num_images = np.unique(units, return_index=True, return_counts=True)
    return LevelTable(level, found, targets[first].astype(np.int64), patients[first], ids, num_images)


def _mixed(values: np.ndarray, units: np.ndarray) -> list[int]:
    """The units whose rows have more than one value."""
    pairs = np.unique(np.column_stack([units, values]), axis=0)
    ids, num_values = np.unique(pairs[:, 0], return_counts=True)
    return ids[num_values > 1].astype(int).tolist()


def _named(found: list[int], units: np.ndarray, rows: np.ndarray, what: str, targets: np.ndarray | None = None) -> str:
    """What is wrong, and the rows of each unit it is wrong with; with their labels, where targets are given."""

    def line(unit: int) -> str:
        inside = np.flatnonzero(units == unit)
        labels = "" if targets is None else f" (labels {', '.join(f'{t:g}' for t in targets[inside[:_SHOWN]])})"
        return f"  {_rows(rows[inside])}{labels}"

    return "\n".join([what, *map(line, found[:_SHOWN])] + [f"  ... {len(found)} in all"] * (len(found) > _SHOWN))


def _rows(rows: np.ndarray) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN].tolist())) + ", ..." * (len(rows) > _SHOWN)
    return f"row{'s' * (len(rows) != 1)} {shown}"
