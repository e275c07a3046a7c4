"""The report of a clinical evaluation: evaluation.html, figures/*.png and cases_to_read_again.csv in one folder.

Decisions are made about cases, so the figures of cases come first; those of images stand beside them, since many papers
tell only these. `ClinicalRecord` holds all that is told, as plain data; what it does not hold has no section. Nothing
is estimated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raymed.report import clinical_figures as draw
from raymed.report.clinical_figures import FOREST, CalibrationCurve, Figure, Level, Subgroup
from raymed.report.figures import confusion
from raymed.report.gallery import HEAT_MAP_SENTENCE, Case, case_gallery, randomisation_sentence
from raymed.report.page import (
    Block,
    Bullets,
    Cell,
    Facts,
    Lead,
    Picture,
    Section,
    Table,
    Text,
    repeat_blocks,
    write_page,
)
from raymed.report.read_again import READ_AGAIN, Doubt, read_again_blocks, read_again_csv
from raymed.report.tables import decimal, interval, label
from raymed.storage import write_atomic

METRICS = {
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "lr_positive": "LR+",
    "lr_negative": "LR−",
    "accuracy": "accuracy",
    "f1": "F1",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "brier": "Brier",
    "ece": "ECE",
    "calibration_slope": "calibration slope",
    "calibration_intercept": "calibration intercept",
    "calibration_in_the_large": "calibration in the large",
}
"""What the first table shows, in its order; figures of other names follow under their own."""

_GLANCE = ("sensitivity", "specificity", "npv", "auroc")
_SYNONYMS = ("recall", "precision")
_NONE = Cell("n/a")
_BELOW = "95 % interval below"


@dataclass(frozen=True)
class ClinicalRecord:
    """What an evaluation found. The first level is the one decided by ("case"); its figures are the headline."""

    title: str
    data: str  # what was evaluated, in words: "external test set, 79 cases of 76 patients"
    sentence: str  # what was found, in one sentence
    levels: Sequence[Level]  # the one decided by, then others, such as images
    classes: tuple[str, str] = ("negative", "positive")  # what targets 0 and 1 are called
    operating: Mapping[str, Any] = field(default_factory=dict)  # facts: rule, chosen on, reached there
    calibration: Mapping[str, CalibrationCurve] = field(default_factory=dict)  # such as "before", "after"
    decision: Mapping[str, np.ndarray] | None = None  # see `clinical_figures.decision_curve`
    readers: Mapping[str, Mapping[str, Mapping[str, Figure]]] = field(default_factory=dict)
    """Reader -> "reference" (against the reference standard) and "others" (their consensus) -> metric -> figure."""
    agreement: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    """Readers, such as "A, B" -> "kappa" and "agreement"."""
    subgroups: Sequence[Subgroup] = ()
    cases: Sequence[Case] = ()  # those of the gallery
    shown: str = ""
    """What curves, counts, subgroups and gallery are of, where figures are means over repeats: "repeat 2 of 3, ..."."""
    read_again: Sequence[Doubt] = ()
    tone: Literal["good", "open", "neutral"] = "neutral"
    more: Sequence[str] = ()  # sentences that qualify the first
    pictures: Sequence[tuple[Path, str]] = ()  # others
    model: Mapping[str, Any] = field(default_factory=dict)  # facts: name, version, run, training data
    command: str = ""  # repeats the evaluation
    config: Any = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def unit(self) -> str:
        """What is decided by: "case"."""
        return self.levels[0].unit

    @property
    def at_prevalence(self) -> dict[float, dict[str, Figure]]:
        """Stated prevalence -> "ppv", "npv": the figures named ppv_at_0.05 and npv_at_0.05."""
        figures = self.levels[0].figures
        stated = [name.removeprefix("ppv_at_") for name in figures if name.startswith("ppv_at_")]
        return {float(p): {value: figures[f"{value}_at_{p}"] for value in ("ppv", "npv")} for p in stated}


def write_clinical_page(folder: Path, record: ClinicalRecord) -> Path:
    """Write evaluation.html, figures/*.png and, where cases are to be read again, their CSV; return the page's path."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    if record.read_again:
        write_atomic(folder / READ_AGAIN, read_again_csv(record.read_again).encode("utf-8-sig"))
    sections = [
        Section(f"Results by {record.unit}", _results(figures, record)),
        Section("Predictive values", _predictive_values(figures, record)),
        Section("Calibration", _calibration(figures, record)),
        Section("Decision curve", _decision(figures, record)),
        Section("Readers", _readers(record)),
        Section("Subgroups", _subgroups(figures, record)),
        Section("Case gallery", _gallery(record)),
        Section("Cases to read again", read_again_blocks(record.read_again)),
        Section("Further figures", [Picture(path, caption) for path, caption in record.pictures]),
        Section("Model", [Facts(record.model)] if record.model else []),
        Section("Repeat", repeat_blocks(record.command, record.environment, record.config)),
        Section("Notes", [Bullets(record.notes)] if record.notes else []),
    ]
    lead = Lead(record.sentence, record.more, record.tone, _numbers(record))
    return write_page(folder / "evaluation.html", record.title, record.data, lead, sections)


def headline_table(levels: Sequence[Level], shown: str = "") -> Table:
    """Metrics of each level with their bootstrap intervals; of the first level also the analytic ones, and, where they
    are means over repeats, those of the repeat that is shown."""
    first, *others = levels
    analytic = any("analytic_low" in of_metric for of_metric in first.figures.values())
    beside = ["analytic interval"] * analytic + ["the repeat shown"] * bool(first.own)
    header = ["", _column(first), *beside, *map(_column, others)]
    rows: list[list[str | Cell]] = [
        [text, count(first), *([""] * len(beside)), *map(count, others)]
        for text, count in (("evaluated", _evaluated), ("positive", _positive))
    ]
    for metric in _metrics(levels):
        told = [_analytic(first.figures.get(metric))] if analytic else []
        told += [_cell(first.own.get(metric))] if first.own else []
        rows.append(
            [_label(metric), _cell(first.figures.get(metric)), *told, *(_cell(v.figures.get(metric)) for v in others)]
        )
    caption = (
        "Decisions at the operating point, and what all scores are worth; below each, its 95 % bootstrap interval by "
        f"{_resampled(levels)}{' and repeat' if first.own else ''}."
    )
    if analytic:
        caption += (
            f" The analytic interval takes each {first.unit} as independent of the others: with one a patient it is "
            "the one to quote, with several the wider of the two."
        )
    if analytic and first.own:
        caption += f" Repeats decide about the same {first.unit}s, which it counts once."
    if shown:
        caption += f" Curves, counts, subgroups and gallery are of {shown}: its figures stand beside."
    return Table(header, rows, caption)


def subgroup_table(record: ClinicalRecord) -> Table:
    """Every subgroup's size and figures."""
    rows = [
        [Cell(group["group"], group["attribute"]), str(group["num"]), str(group["num_positive"])]
        + [_wide_cell(group[metric], Cell("too few")) for metric in FOREST]
        for group in record.subgroups
    ]
    header = ["", f"{record.unit}s", "positive", *(METRICS[metric] for metric in FOREST)]
    return Table(header, rows, f"The same in numbers; {_BELOW}.")


def reader_table(record: ClinicalRecord) -> Table:
    """Sensitivity and specificity of each reader, against both references, and of the model."""
    columns = [(against, metric) for against in ("reference", "others") for metric in ("sensitivity", "specificity")]
    rows = [
        [reader, *(_wide_cell(of_reader.get(against, {}).get(metric)) for against, metric in columns)]
        for reader, of_reader in record.readers.items()
    ]
    of_model = {"reference": record.levels[0].figures}
    found = (_wide_cell(of_model.get(against, {}).get(metric), Cell("")) for against, metric in columns)
    rows.append([Cell("model", _mean_of(record.levels[0]), mark="best"), *found])
    caption = (
        f"Each reader against the reference standard, and against the consensus of the other readers; {_BELOW}. "
        "A reader whose reading is part of the reference standard agrees with it by construction."
    )
    header = [
        "",
        *(metric if against == "reference" else f"{metric}, others as reference" for against, metric in columns),
    ]
    return Table(header, rows, caption)


def _results(folder: Path, record: ClinicalRecord) -> list[Block]:
    path = folder / "confusion.png"
    decisions = {f"by {level.unit}": [(level.decided.astype(float), level.targets)] for level in record.levels}
    confusion(path, decisions, dict.fromkeys(decisions, [0.5]), record.classes)
    return [
        headline_table(record.levels, record.shown),
        _curves(folder, record),
        *([Facts(record.operating, "Operating point")] if record.operating else []),
        Picture(path, f"Counts at the operating point, and their share of the row.{_of_shown(record)}"),
    ]


def _curves(folder: Path, record: ClinicalRecord) -> Block:
    if not record.levels[0].has_both_classes:
        return Text(f"Curves and predictive values need {record.unit}s of both classes.", quiet=True)
    path = folder / "roc_pr.png"
    readers = {name: of["reference"] for name, of in record.readers.items() if "reference" in of}
    draw.roc_pr(path, record.levels, readers)
    caption = f"Blue: by {record.unit}. Discs are the operating point. Dotted: chance."
    if len(record.levels) > 1:
        caption += f" Grey: by {record.levels[1].unit}."
    if readers:
        caption += " Other marks are readers, with their 95 % intervals."
    if record.levels[0].thresholds is not None:
        caption += " Each fold has its own threshold, so a disc may lie beside its curve."
    return Picture(path, caption + _of_shown(record))


def _predictive_values(folder: Path, record: ClinicalRecord) -> list[Block]:
    first = record.levels[0]
    if not first.has_both_classes:
        return []
    sensitivity, specificity, _ = draw.operating_point(first)
    path = folder / "predictive_values.png"
    draw.predictive_values(path, sensitivity, specificity, float(np.mean(first.targets)), record.at_prevalence)
    caption = (
        "PPV and NPV against prevalence, from sensitivity and specificity at the operating point (Bayes' theorem)."
        + _of_shown(record)
    )
    blocks: list[Block] = [Picture(path, caption)]
    if record.at_prevalence:
        rows = [
            [f"{100 * p:g} %", _wide_cell(of["ppv"]), _wide_cell(of["npv"])] for p, of in record.at_prevalence.items()
        ]
        blocks.append(Table(["prevalence", "PPV", "NPV"], rows, f"At stated prevalences; {_BELOW}."))
    return blocks


def _calibration(folder: Path, record: ClinicalRecord) -> list[Block]:
    if not record.calibration:
        return []
    path = folder / "calibration.png"
    draw.calibration_curve(path, record.calibration, record.levels[0])
    caption = (
        f"Observed against predicted, {record.unit}s grouped by prediction, with 95 % Wilson intervals; below, scores."
        + _of_shown(record)
    )
    names = list(dict.fromkeys(name for curve in record.calibration.values() for name in curve.figures))
    rows = [[way, *(_wide_cell(of.figures.get(name)) for name in names)] for way, of in record.calibration.items()]
    explained = "A slope of 1 and intercepts of 0 are perfect: a slope below 1 says that predictions are too extreme."
    return [Picture(path, caption), *([Table(["", *map(_label, names)], rows, explained)] if names else [])]


def _decision(folder: Path, record: ClinicalRecord) -> list[Block]:
    if record.decision is None:
        return []
    path = folder / "decision_curve.png"
    draw.decision_curve(path, record.decision, record.levels[0].threshold)
    caption = (
        f"Net benefit of deciding by the model, with its 95 % interval, of treating all {record.unit}s, and of "
        "treating none. The threshold probability is that from which on one would treat; the model helps where its "
        "line is highest. Green: the 95 % interval of how much it is above both others excludes 0."
    )
    caption += _of_shown(record)
    return [Picture(path, caption)]


def _readers(record: ClinicalRecord) -> list[Block]:
    blocks: list[Block] = [reader_table(record)] if record.readers else []
    if record.agreement:
        rows = [[name, _wide_cell(of["kappa"]), _wide_cell(of["agreement"])] for name, of in record.agreement.items()]
        caption = "How often readers agree, and how far beyond chance (kappa); 95 % interval below."
        blocks.append(Table(["", "kappa", "agreement"], rows, caption))
    return blocks


def _subgroups(folder: Path, record: ClinicalRecord) -> list[Block]:
    if not record.subgroups:
        return []
    path, first = folder / "subgroups.png", record.levels[0]
    counts = {"group": "all", "num": len(first.targets), "num_positive": first.num_positive}
    draw.subgroup_forest(path, record.subgroups, {**counts, **first.drawn})
    caption = (
        f"By subgroup, with 95 % intervals and the numbers of {record.unit}s. Dotted: all of them. Too few: no figure "
        "is told where a class has too few patients. Intervals are not corrected for how many there are."
        + _of_shown(record)
    )
    return [Picture(path, caption), subgroup_table(record)]


def _gallery(record: ClinicalRecord) -> list[Block]:
    if not record.cases:
        return []
    views = [view for case in record.cases for view in case.views]
    said = [HEAT_MAP_SENTENCE] if any(view.heat_map is not None for view in views) else []
    said += [sentence] if (sentence := randomisation_sentence(record.cases)) else []
    said += [f"Decisions and scores are those of {record.shown}."] if record.shown else []
    return [*map(Text, said), case_gallery(record.cases, record.levels[0].threshold, record.classes)]


def _numbers(record: ClinicalRecord) -> dict[str, str]:
    """What the page shows at a glance, of the level decided by."""
    first = record.levels[0]
    found = {f"{record.unit}s, {first.num_positive} positive": str(len(first.targets))}
    for metric in _GLANCE:
        if of_metric := first.figures.get(metric):
            found[f"{METRICS[metric]}, 95 % CI {_in_words(draw.widest(of_metric))}"] = decimal(of_metric["mean"])
    return found


def _of_shown(record: ClinicalRecord) -> str:
    return f" Of {record.shown}." if record.shown else ""


def _column(level: Level) -> str:
    return ", ".join(filter(None, [f"by {level.unit}", _mean_of(level)]))


def _mean_of(level: Level) -> str:
    return f"mean of {level.num_repeats} repeats" if level.num_repeats > 1 else ""


def _metrics(levels: Sequence[Level]) -> list[str]:
    """Known ones in their order, then the others, but those with a section of their own or another name."""
    named = dict.fromkeys(metric for level in levels for metric in level.figures)
    named = [m for m in named if m not in _SYNONYMS and not m.startswith(("ppv_at_", "npv_at_"))]
    return [m for m in METRICS if m in named] + [m for m in named if m not in METRICS]


def _evaluated(level: Level) -> Cell:
    patients = "" if level.num_patients is None else f"{level.num_patients} patients"
    return Cell(f"{len(level.targets)} {level.unit}s", patients)


def _positive(level: Level) -> Cell:
    return Cell(str(level.num_positive), f"{100 * level.num_positive / len(level.targets):.1f} %")


def _analytic(of_metric: Figure | None) -> Cell:
    if of_metric is None or "analytic_low" not in of_metric:
        return Cell("")
    text = interval({"ci_low": of_metric["analytic_low"], "ci_high": of_metric["analytic_high"]})
    return Cell(text, str(of_metric["method"]))


def _in_words(of_metric: Figure) -> str:
    """0.930 to 0.970, which no line breaks."""
    return interval(of_metric).replace(" – ", " to ").replace(" ", "\N{NO-BREAK SPACE}")


def _resampled(levels: Sequence[Level]) -> str:
    """What the intervals resampled."""
    return next((str(of.get("unit", "patient")) for level in levels for of in level.figures.values()), "patient")


def _label(metric: str) -> str:
    return METRICS.get(metric, label(metric).replace("_", " "))


def _wide_cell(of_metric: Figure | None, missing: Cell = _NONE) -> Cell:
    return _cell(None if of_metric is None else draw.widest(of_metric), missing)


def _cell(of_metric: Figure | None, missing: Cell = _NONE) -> Cell:
    return missing if of_metric is None else Cell(decimal(of_metric["mean"]), interval(of_metric))
