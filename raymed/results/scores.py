"""What a classifier says of the images of a data set, at the level it decides about and by image.

    images -> raw probabilities -> units (`Decide.table`) -> calibrated probabilities

Threshold and calibration are those of the bundle; nothing is fitted here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from raymed.config import UserError
from raymed.data.dataset import DataSet
from raymed.metrics.levels import Level, LevelTable, unit_numbers
from raymed.tasks.decide import decide_of
from raymed.tasks.predictor import Predictor

_BATCH = 512


@dataclass(frozen=True)
class Scored:
    """The images of a data set at one level: U units.

    table: with raw probabilities. scores: (U,) as the model tells them, decided positive when >= threshold. groups:
    (U,) what is resampled, since units that share it are not independent; unit: what that is called. thresholds: (U,)
    where units have thresholds of their own; threshold is then nan. calibrated: (U,) where that is not `scores`.
    """

    table: LevelTable
    scores: np.ndarray
    threshold: float
    groups: np.ndarray
    unit: str
    thresholds: np.ndarray | None = None
    calibrated: np.ndarray | None = None

    @property
    def cut(self) -> float | np.ndarray:
        """What each score is held against: one number, or (U,)."""
        return self.threshold if self.thresholds is None else self.thresholds

    @property
    def decided(self) -> np.ndarray:
        """(U,) bool."""
        return self.scores >= self.cut

    @property
    def probabilities(self) -> np.ndarray:
        """(U,) as well calibrated as they are known."""
        return self.scores if self.calibrated is None else self.calibrated

    @property
    def options(self) -> dict[str, Any]:
        """Of `bootstrap_ci`."""
        return {"unit": cast(Any, self.unit)}

    @property
    def num_patients(self) -> int | None:
        """None where the data name none."""
        return len(np.unique(self.groups)) if self.unit == "patient" else None


@dataclass(frozen=True)
class Answer:
    """What a model says. raw: (N,) float64 probabilities of the images at `where` (N,). levels: the one that is decided
    about, then images where that is another. foreign: (N,) bool; None where the bundle cannot tell."""

    where: np.ndarray
    raw: np.ndarray
    foreign: np.ndarray | None
    levels: Sequence[Scored]


def answer(predictor: Predictor, data: DataSet, where: np.ndarray) -> Answer:
    """Predict the images at `where` (N,) of a data set that was read with the model's preprocessing.

    Scores and threshold of the unit that is decided about are calibrated. Those of images beside it are raw: the
    calibration was fitted on scores of the other level.

    Raises:
        UserError: the data do not name what the model decides about (cases, sides); labels within a unit differ.
    """
    parts = [where[start : start + _BATCH] for start in range(0, len(where), _BATCH)]
    found = [p for part in parts for p in predictor.from_pixels(data.batch(part).image)]  # type: ignore[arg-type]
    raw = np.array([p.raw_probability for p in found])
    foreign = [p.ood["foreign"] for p in found if p.ood is not None]
    point = predictor.bundle.operating_point
    decide = decide_of(point)
    energies = None if predictor.attention is None else np.array([p.energy for p in found])
    levels = [_calibrated(predictor, data, decide.table(data, where, raw, energies=energies))]
    if levels[0].table.level != "image" and "image_threshold" in point:
        table = decide.table(data, where, raw, "image")
        levels.append(Scored(table, table.scores, point["image_threshold"], *groups_of(data, table)))
    return Answer(where, raw, np.array(foreign, bool) if foreign else None, levels)


def members(table: LevelTable, data: DataSet, where: np.ndarray) -> list[np.ndarray]:
    """The images at `where` of each of U units: indices of the data set, ascending."""
    level = cast(Level, table.level)
    units = unit_numbers(level, data.patients, data.cases, data.sides, data.rows)[where]
    return [np.sort(where[units == unit]) for unit in table.units]


def _calibrated(predictor: Predictor, data: DataSet, table: LevelTable) -> Scored:
    return Scored(table, predictor.told(table.scores), predictor.threshold, *groups_of(data, table))


def groups_of(data: DataSet, table: LevelTable) -> tuple[np.ndarray, str]:
    """What is resampled, (U,), and its name: patients; where the data name none, cases, and otherwise images."""
    return table.patients, data.grouped_by


def check_same_units(answers: Sequence[Answer]) -> None:
    """Raise UserError unless models decide about the same units."""
    kinds = [answered.levels[0].table.level for answered in answers]
    if len(set(kinds)) > 1:
        raise UserError(
            f"the models decide about different things, {' and '.join(kinds)}: decisions cannot be compared. Train one "
            "of them anew with the other's --decide.unit"
        )
