"""What a publication pack is made of: facts of a study, as plain data.

Every field may be missing (None or empty). What is missing has no table and no figure, and in the text there stands a
blank, "[TO FILL: ...]": nothing is guessed. `Study` holds what no program can know, in the author's own words.

A figure is a mapping as in summary.json: "mean", "ci_low", "ci_high", ... (`raymed.metrics.bootstrap.Figure`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from raymed.config import UserError

Figures = Mapping[str, Mapping[str, Any]]
"""Metric -> figure."""

SPLITS = {"all": "All", "train": "Training", "val": "Validation", "test": "Internal test", "external": "External test"}
"""Parts of a cohort, in the order of its table -> what they are called (the words of CLAIM 2024)."""


@dataclass(frozen=True)
class Study:
    """What only the authors know: words for the text, None where they are still to be found."""

    design: str | None = None
    """retrospective or prospective; consecutive, random or convenience series."""
    setting: str | None = None
    """Hospitals, departments, country."""
    target: str | None = None
    """The condition to be found, such as "tubal occlusion"."""
    intended_use: str | None = None
    eligibility: str | None = None
    """Who was included and excluded, and on what grounds."""
    acquisition: str | None = None
    """Protocol by which the images were taken."""
    reference_standard: str | None = None
    """What decides that a case has the condition."""
    readers: str | None = None
    """Who read the images: number, training, years of experience, blinding."""
    deidentification: str | None = None
    missing_data: str | None = None
    sample_size: str | None = None
    """How the number of cases was arrived at."""
    ethics: str | None = None
    """Approval with its number, and consent or its waiver."""
    registration: str | None = None
    protocol: str | None = None
    funding: str | None = None
    conflicts: str | None = None
    data_availability: str | None = None
    code_availability: str | None = None
    public_involvement: str | None = None


@dataclass(frozen=True)
class Spread:
    """A quantity of many, such as age in years: of the `num` whose value is known."""

    mean: float
    std: float
    """ddof=1; nan for one value."""
    low: float
    high: float
    num: int


@dataclass(frozen=True)
class Group:
    """A part of the cohort: a column of its table."""

    counts: Mapping[str, int]
    """"patients", "cases", "images" -> how many; what the data do not name is left out."""
    units: int = 0
    """How many units (cases, say) the following count."""
    classes: Mapping[str, int] = field(default_factory=dict)
    """Class of the reference standard -> units."""
    categories: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """"sex", "site", ... -> value -> units; "" = not recorded."""
    quantities: Mapping[str, Spread] = field(default_factory=dict)
    """"age" -> its spread over units."""
    years: tuple[int, int] | None = None
    """First and last year of the examinations."""


@dataclass(frozen=True)
class Flow:
    """From what was assessed to what was included.

    Raises:
        UserError: at construction, if assessed - excluded is not included.
    """

    unit: str
    """What is counted: "case", "image"."""
    assessed: int
    excluded: Mapping[str, int]
    """Reason -> how many, in the order in which they were excluded."""
    included: int

    def __post_init__(self) -> None:
        left = self.assessed - sum(self.excluded.values())
        if left != self.included:
            raise UserError(
                f"flow: {self.assessed} {self.unit}s assessed, less those excluded, are {left}, but {self.included} "
                "are said to be included; count each exclusion under one reason"
            )

    @classmethod
    def of(cls, unit: str, counted: Sequence[tuple[str, int]]) -> Flow:
        """The flow that an import tells: (text, number), first what was found, then each reason to leave some out."""
        (_, assessed), *excluded = counted
        return cls(unit, assessed, dict(excluded), assessed - sum(number for _, number in excluded))


@dataclass(frozen=True)
class Split:
    """How the cohort was divided."""

    method: Literal["random", "by_time", "by_site"] | None = None
    unit: str | None = None
    """What is never divided: "patient"."""
    seed: int | None = None
    test: str | None = None
    """What the test set is, for by_time ("2022") and by_site (names)."""
    folds: int | None = None
    repeats: int | None = None
    """Of cross-validation, each with the same number of folds."""


@dataclass(frozen=True)
class Preprocessing:
    """From the file to the network's input."""

    size: int | None = None
    """Pixels a side."""
    fit: str | None = None
    """letterbox, crop or stretch."""
    channels: int | None = None
    normalisation: str | None = None
    """image, dataset or none."""
    num_blanked: int | None = None
    """Images of which parts were blanked, for text burned into them."""


@dataclass(frozen=True)
class Model:
    """The network and how its outputs become one answer a unit."""

    architecture: str | None = None
    num_parameters: int | None = None
    weights: str | None = None
    """Where training started: "none" = at random."""
    aggregate: str | None = None
    """mean, max, noisy_or, attention, mean_of_logits, attention_or_mean (of folds): from images to the unit."""


@dataclass(frozen=True)
class Phase:
    """One phase of a training."""

    name: str
    loss: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the loss."""
    frozen: str | None = None
    """The part of the network that is not trained in this phase."""
    steps: int | None = None
    batch_size: int | None = None
    balanced: bool | None = None
    """Equal numbers of both classes in a batch."""
    optimiser: str | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    schedule: str | None = None
    ema_decay: float | None = None
    """Of the running average of the weights that is evaluated; None = none was kept."""


@dataclass(frozen=True)
class Training:
    """How the network was trained."""

    phases: Sequence[Phase] = ()
    augmentation: Mapping[str, float] | None = None
    """Field of `raymed.data.augment.Augment` -> strength; 0 = off; None = not recorded."""
    selection: str | None = None
    """Metric of the validation split by which the weights were chosen."""
    seeds: Sequence[int] = ()


@dataclass(frozen=True)
class OperatingPoint:
    """The decision threshold."""

    rule: str | None = None
    """youden, f1, accuracy, sensitivity=0.95, specificity=0.9; or other words."""
    threshold: float | None = None
    chosen_on: str | None = None


@dataclass(frozen=True)
class Recalibration:
    """What turns scores into probabilities."""

    method: str
    """temperature, isotonic, ..., or none."""
    fitted_on: str | None = None


@dataclass(frozen=True)
class Statistics:
    """How intervals were computed."""

    level: float | None = None
    """Coverage, such as 0.95."""
    resamples: int | None = None
    unit: str | None = None
    """What was resampled: patient or image."""
    analytic: bool = False
    """Decisions have Wilson's intervals (likelihood ratios those of the log method) where each patient is one unit, and
    the wider of these and the bootstrap's elsewhere."""


@dataclass(frozen=True)
class Confusion:
    """Decisions on the test set against the reference standard."""

    tp: int
    fp: int
    fn: int
    tn: int


@dataclass(frozen=True)
class Subgroup:
    """A part of the test set, such as one site."""

    attribute: str
    value: str
    num: int
    num_positive: int
    figures: Figures = field(default_factory=dict)
    """Empty = too few for a figure."""


@dataclass(frozen=True)
class Curve:
    """A line, with the bounds of its interval where there are any; each a sequence of numbers of one length."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if getattr(self, f.name) is not None):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        lengths = {len(values) for values in (self.x, self.y, self.low, self.high) if values is not None}
        if len(lengths) > 1:
            raise ValueError(f"the parts of a curve must have one length, got {sorted(lengths)}")


@dataclass(frozen=True)
class Curves:
    """Lines of the figures by name. Those of `roc` and `precision_recall` are named as in `PaperRecord.performance`."""

    roc: Mapping[str, Curve] = field(default_factory=dict)
    """x = 1 - specificity, y = sensitivity."""
    precision_recall: Mapping[str, Curve] = field(default_factory=dict)
    """x = sensitivity, y = PPV."""
    calibration: Mapping[str, Curve] = field(default_factory=dict)
    """x = predicted, y = observed fraction."""
    decision: Mapping[str, Curve] = field(default_factory=dict)
    """x = threshold probability, y = net benefit; of the model, "Treat all" and "Treat none"."""


@dataclass(frozen=True)
class PaperRecord:
    """All that is known of a study."""

    study: Study = Study()
    unit: str = "case"
    """What a decision is about, and what the headline figures count: patient, case, side or image."""
    positive: str | None = None
    """The class to be found."""
    cohort: Mapping[str, Group] = field(default_factory=dict)
    """A key of SPLITS -> that part."""
    flow: Flow | None = None
    split: Split = Split()
    preprocessing: Preprocessing = Preprocessing()
    model: Model = Model()
    training: Training = Training()
    operating_point: OperatingPoint = OperatingPoint()
    recalibration: Recalibration | None = None
    statistics: Statistics = Statistics()
    performance: Mapping[str, Figures] = field(default_factory=dict)
    """Level or test set ("Case", "Image", "External test") -> figures; the headline first."""
    comparison: Mapping[str, Figures] = field(default_factory=dict)
    """Method -> figures on the test set, where several were compared."""
    confusion: Confusion | None = None
    """On the test set, at the operating point, by unit."""
    subgroups: Sequence[Subgroup] = ()
    readers: Mapping[str, Figures] = field(default_factory=dict)
    """Reader -> "sensitivity", "specificity"."""
    agreement: Figures = field(default_factory=dict)
    """"Cohen's kappa, A and B" -> figure."""
    curves: Curves = Curves()
    explanation: str | None = None
    """How heat maps were made and checked, such as "Grad-CAM, with a weight-randomisation check"."""
    software: Mapping[str, str | None] = field(default_factory=dict)
    """Name -> version; None = not installed."""
    hardware: str | None = None
    command: str | None = None
    """Repeats the training."""
