"""How a classifier's scores become decisions: at which level, put together how, by which threshold.

A network scores images; a reader decides about a case. So figures, threshold, calibration and uncertain band are of
cases wherever the data name them, and figures of images stand beside, to compare with work that counts images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np

from raymed.config import UserError, check_choice
from raymed.data.dataset import DataSet
from raymed.metrics import levels
from raymed.metrics.calibration import logit_of
from raymed.metrics.levels import AGGREGATES, LEVELS, Level, LevelTable, level_table, unit_numbers
from raymed.metrics.operating import OperatingPoint, choose
from raymed.metrics.reliability import Method
from raymed.models.attention_pool import pooled

ATTENTION = "attention"
Aggregate = levels.Aggregate | Literal["attention"]


@dataclass(frozen=True)
class Decide:
    """What a decision is about, and where it falls."""

    unit: Level | None = None
    """What is decided about: image, case+side, case or patient; None = case where the data name cases, or case+side
    where the labels of one case differ, otherwise image."""
    aggregate: Aggregate = "mean"
    """How the scores of its images become one: mean, max, noisy_or, or attention: what each image counts is learned
    from its features (`raymed.tasks.attention`), where that helps on the validation split, otherwise the mean of
    logits."""
    operating_point: str = "youden"
    """What the threshold does on the validation split: youden, f1, accuracy (as large as can be), sensitivity=0.95 or
    specificity=0.90 (at least so much). youden does not depend on how rare the positive class is there."""
    calibration: Method = "platt"
    """How the probabilities of the model that leaves are mended: platt, temperature, isotonic (which wants hundreds of
    cases) or none; left alone where that does not help patients it was not fitted on."""

    def __post_init__(self) -> None:
        if self.unit is not None:
            check_choice("decide.unit", self.unit, LEVELS)
        check_choice("decide.aggregate", self.aggregate, (*AGGREGATES, ATTENTION))
        if self.aggregate == ATTENTION and self.unit == "image":
            raise UserError(
                "decide.aggregate attention weighs the images of a case: it has no use for decide.unit image"
            )
        check_choice("decide.calibration", self.calibration, get_args(Method))
        OperatingPoint.parse(self.operating_point)

    def level(self, data: DataSet) -> Level:
        """The unit, resolved for a data set."""
        if self.unit is not None:
            return self.unit
        if data.cases is None:
            if self.aggregate == ATTENTION:
                raise UserError("decide.aggregate attention needs to know the case of each image: --data.case COLUMN")
            return "image"
        if self._agree(data, "case") or data.sides is None or (data.sides == "").any():
            return "case"
        return "case+side" if self._agree(data, "case+side") else "case"

    def _agree(self, data: DataSet, level: Level) -> bool:
        """Whether images of one unit have one label."""
        units = unit_numbers(level, data.patients, data.cases, data.sides, data.rows)
        return len(np.unique(np.column_stack([units, data.labels]), axis=0)) == len(np.unique(units))

    def check(self, data: DataSet) -> None:
        """Raise UserError where the data cannot be decided about so: no cases or sides, or labels that differ within a
        unit, by their rows."""
        self.table(data, np.arange(len(data)), np.zeros(len(data)))

    def table(
        self,
        data: DataSet,
        where: np.ndarray,
        scores: np.ndarray,
        level: Level | None = None,
        energies: np.ndarray | None = None,
    ) -> LevelTable:
        """The units that the images at `where` (N,), with `scores` (N,), are of.

        level: None = the resolved unit. energies: (N,) of the images, where aggregate is attention; None = all alike.
        Raises UserError where labels within a unit differ, by their rows.
        """
        level = level or self.level(data)
        units = unit_numbers(level, data.patients, data.cases, data.sides, data.rows)[where]
        patients = data.patients[where]
        how: levels.Aggregate = "max" if self.aggregate == ATTENTION else self.aggregate
        if self.aggregate == ATTENTION and level != "image":
            # Every image gets the score of its unit, of which the highest is then that score.
            found, ids = put_together(scores, units, ATTENTION, energies)
            scores = found[np.searchsorted(ids, units)]
        return level_table(scores, data.labels[where], patients, units, how, level=level, rows=data.rows[where])

    def point(self, val: LevelTable, images: LevelTable) -> dict[str, Any]:
        """A bundle's operating point, chosen on the validation split: threshold of a unit's score, image_threshold of
        one image's, by the same rule."""
        chosen = choose(val.scores, val.targets, self.operating_point)
        return {
            "threshold": chosen["threshold"],
            "criterion": chosen["criterion"],
            "met": chosen["met"],
            "chosen_on": "val",
            "unit": val.level,
            "aggregate": self.aggregate,
            "image_threshold": choose(images.scores, images.targets, self.operating_point)["threshold"],
        }


def put_together(
    scores: np.ndarray, units: np.ndarray, how: Aggregate, energies: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`raymed.metrics.levels.aggregate` with attention among the rules: (U,) scores and (U,) numbers of units.

    energies: (N,) of the images, for attention; None = all alike, the mean of logits.
    """
    if how != ATTENTION:
        return levels.aggregate(scores, units, how)
    return pooled(logit_of(scores), np.zeros(len(scores)) if energies is None else energies, units)


def decide_of(point: Mapping[str, Any]) -> Decide:
    """The rule that a bundle's operating point was chosen by. One that does not say is of images."""
    unit = point.get("unit", "image")
    if unit not in LEVELS:
        raise UserError(f"the bundle decides about a unit {unit!r} that is not known here")
    return Decide(cast(Level, unit), point.get("aggregate", "mean"), point.get("criterion", "youden"))
