"""A recipe: the config that decides what a training becomes, and all that a job, a unit or a sweep asks of one.

Recipes are frozen dataclasses that derive from `Recipe`. What runs them (`raymed.train`, `raymed.tune`) knows no
system, only this.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from raymed.config import UserError, check_range
from raymed.data.dataset import DataSet, load
from raymed.data.manifest import DataConfig
from raymed.metrics.meters import Meter
from raymed.space import Space
from raymed.tasks.task import Ema, Optim, Phase, Task

Scored = Mapping[str, dict[str, Meter]]
"""Split -> the last phase's meters after all of it."""


@dataclass(frozen=True)
class Outcome:
    """What a finished training reached."""

    figures: dict[str, dict[str, float]]
    """Split -> metric -> value."""
    arrays: dict[str, dict[str, np.ndarray]]
    """Split -> name -> what was predicted, first axis = image; among them "rows" (N,), row numbers in the manifest."""
    operating_point: dict[str, Any] = field(default_factory=dict)
    """Threshold and how it was chosen, where there is one."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Tensors that belong into the bundle's."""


@dataclass(frozen=True)
class Stage:
    """How long and how one phase is trained."""

    steps: int = 2000
    batch_size: int = 64
    """Over all workers and micro-batches."""
    accumulate: int = 1
    """Micro-batches a step."""
    optim: Optim = Optim()
    ema_decay: float | None = None
    """Of the running average of the weights that is evaluated and kept; None = off."""
    evaluations: int = 10
    """How often the validation split is scored."""
    patience: int | None = None
    """Evaluations without a better value of the monitored metric after which the phase ends; None = never."""

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1)
        check_range("batch_size", self.batch_size, 2)
        check_range("accumulate", self.accumulate, 1)
        check_range("evaluations", self.evaluations, 1, self.steps)
        if self.ema_decay is not None:
            check_range("ema_decay", self.ema_decay, 0, 1, high_open=True)
        if self.patience is not None:
            check_range("patience", self.patience, 1)

    @property
    def ema(self) -> Ema | None:
        """The average as the loop wants it."""
        return None if self.ema_decay is None else Ema(self.ema_decay)

    def phase(self, name: str, task: Task, monitor: str | None, **more: Any) -> Phase:
        """A phase that trains a task so. more: further fields of `Phase`."""
        return Phase(
            name=name,
            task=task,
            steps=self.steps,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            evaluations=self.evaluations,
            monitor=monitor,
            patience=self.patience,
            **more,
        )


def one_of_each(name: str, losses: Mapping[str, type], module: str) -> type:
    """A config with a field for every loss, at its defaults: what a recipe's command line sets. module: the caller's
    `__name__`, where pickle finds the class again under that name."""
    return dataclasses.make_dataclass(
        name,
        [(key, loss, field(default=loss())) for key, loss in losses.items()],
        frozen=True,
        namespace={
            "__doc__": "The hyper-parameters of every loss; a run reads those of its own method.",
            "__module__": module,
        },
    )


class Recipe:
    """Base of all recipes.

    data: which images, and what is known of them. metrics: validation metrics that a sweep may optimise -> whether
    more ("max") or less ("min") is better. shown: metrics that progress is told by.
    """

    data: DataConfig
    metrics: ClassVar[Mapping[str, Literal["max", "min"]]] = {}
    shown: ClassVar[tuple[str, ...]] = ()
    read: ClassVar[Callable[[Any, Path], DataSet]] = staticmethod(load)
    """(data config, folder of decoded images) -> data set."""

    @property
    def resolved_data(self) -> DataConfig:
        """The data config with what the recipe's model wants of its input filled in."""
        return self.data

    def phantoms(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Draw the digital phantoms that `data.manifest = "phantoms"` stands for into a folder: (their manifest,
        further fields of the recipe that they decide)."""
        raise UserError(f"{type(self).__name__} has no phantoms: state data.manifest")

    def phases(self, data: Any) -> tuple[Phase, ...]:
        """What is trained, one phase after the other, on a data set that `read` gave."""
        raise UserError(f"{type(self).__name__} trains nothing")

    @property
    def also_scored(self) -> tuple[str, ...]:
        """Splits that `outcome` wants scored beside those that are reported."""
        return ()

    def outcome(self, scored: Scored, data: Any) -> Outcome:
        """What the best checkpoint reached on each split of a data set; val is always among them."""
        raise UserError(f"{type(self).__name__} trains nothing")

    # What several trainings may share, and what a sweep tries

    @property
    def two_stage(self) -> bool:
        """Whether an encoder has a phase of its own, so that several heads may share it."""
        return False

    @property
    def encoder_from(self) -> str | None:
        """The checkpoint that the shared encoder is taken from; None = trained here, or no such encoder."""
        return None

    def encoder_phase(self, data: Any) -> Phase:
        """The phase of the shared encoder alone, of two-stage recipes."""
        raise UserError(f"{type(self).__name__} has no encoder of its own")

    @property
    def stage(self) -> Stage:
        """The last phase's, which a trial of a sweep trains."""
        raise UserError(f"{type(self).__name__} trains nothing")

    @property
    def label(self) -> str:
        """What is trained, in a word: the method."""
        raise UserError(f"{type(self).__name__} trains nothing")

    @property
    def space(self) -> Space:
        """Field -> dimension: the search space that the loss brings."""
        raise UserError(f"{type(self).__name__} trains nothing")

    @property
    def swept(self) -> tuple[str, ...]:
        """Prefixes of the fields that change something in a trial."""
        raise UserError(f"{type(self).__name__} trains nothing")
