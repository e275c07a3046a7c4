"""The report of an embedding of images and texts: report.html and figures/*.png in one folder.

`ClipRecord` holds all that is told, as plain data; what it does not hold has no section. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raymed.report import clip_figures as draw
from raymed.report.clip_figures import ImageQuery, TextQuery
from raymed.report.figures import calibration
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
from raymed.report.tables import RETRIEVAL, comparison_page, decimal, interval, mean_std

Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Method -> metric -> figure, as in summary.json."""

_GLANCE = ("i2t_recall_1", "t2i_recall_1", "mean_recall")
_MACRO = "macro_auroc"


@dataclass(frozen=True)
class PairCalibration:
    """What a cosine is worth as a probability, on matched and random pairs of the test split."""

    cosines: np.ndarray  # (M,)
    targets: np.ndarray  # (M,) of {0, 1}
    probabilities: Mapping[str, np.ndarray]  # "before" and "after" calibration -> (M,)
    figures: Figures  # "before" and "after" -> "ece", "brier"
    curve: tuple[np.ndarray, np.ndarray] | None = None  # cosines and their calibrated probabilities


@dataclass(frozen=True)
class ClipRecord:
    """What an evaluation found. Methods are rows of tables: the model, a control, the checkpoint it started from."""

    title: str
    command: str  # repeats the evaluation
    data: str  # summary of the data set, in words
    sentence: str  # what was found, in one sentence
    num_pairs: int  # of images and texts of the split
    retrieval: Figures  # method -> what `retrieval_statistic` names
    curves: Figures = field(default_factory=dict)  # method -> what `recall_statistic` names, for many K
    protocol: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # method -> what `batch_protocol` returns
    findings: Figures = field(default_factory=dict)  # method -> auroc/FINDING and macro_auroc
    num_positive: Mapping[str, int] = field(default_factory=dict)  # auroc/FINDING -> images that have it
    averaged: Sequence[str] = ()  # auroc/FINDING that macro_auroc averages
    attributes: Figures = field(default_factory=dict)  # attribute -> "accuracy", "balanced_accuracy"
    num_classes: Mapping[str, int] = field(default_factory=dict)  # attribute -> how many values it has
    foils: Figures = field(default_factory=dict)  # method -> which fact is wrong -> figure
    similarity: tuple[np.ndarray, np.ndarray] | None = None  # (n, n) cosines and bool, which belong together
    text_queries: Sequence[TextQuery] = ()
    image_queries: Sequence[ImageQuery] = ()
    pairs: PairCalibration | None = None
    tone: Literal["good", "open", "neutral"] = "neutral"
    more: Sequence[str] = ()  # sentences that qualify the first
    pictures: Sequence[tuple[Path, str]] = ()  # others, such as training curves
    model: Mapping[str, Any] = field(default_factory=dict)  # facts: architecture, loss, licences
    config: Any = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def write_clip_report(folder: Path, record: ClipRecord) -> Path:
    """Write report.html and figures/*.png into the folder; return the page's path."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    sections = [
        Section("Retrieval", _retrieval(figures, record)),
        Section("Zero-shot", _zero_shot(figures, record)),
        Section("Compositional accuracy", _foils(figures, record)),
        Section("Nearest neighbours", _neighbours(figures, record)),
        Section("Similarity as a probability", _pairs(figures, record)),
        Section("Further figures", [Picture(path, caption) for path, caption in record.pictures]),
        Section("Model", [Facts(record.model)] if record.model else []),
        Section("Repeat", repeat_blocks(record.command, record.environment, record.config)),
        Section("Notes", [Bullets(record.notes)] if record.notes else []),
    ]
    lead = Lead(record.sentence, record.more, record.tone, _numbers(record))
    return write_page(folder / "report.html", record.title, record.data, lead, sections)


def retrieval_table(figures: Figures, caption: str = "") -> Table:
    """R@1, 5 and 10 both ways and their mean of each method, with intervals."""
    metrics = [metric for metric in RETRIEVAL if all(metric in of_method for of_method in figures.values())]
    renamed = {name: {RETRIEVAL[m]: of_method[m] for m in metrics} for name, of_method in figures.items()}
    return comparison_page(renamed, [RETRIEVAL[m] for m in metrics], caption)


def protocol_table(protocol: Mapping[str, Mapping[str, Any]]) -> Table:
    """Retrieval in small batches of each method, in percent as the literature has it."""
    columns = [f"{direction}_top_{k}" for direction in ("i2t", "t2i") for k in (1, 2)]
    header = ["", *(f"{way} top-{k}" for way in ("image→text", "text→image") for k in (1, 2))]
    rows = [[name, *(_percent(of_method[column]) for column in columns)] for name, of_method in protocol.items()]
    first = next(iter(protocol.values()))
    caption = (
        f"Retrieval within batches of {first['batch']}, in percent: mean ± standard deviation over {first['repeats']} "
        f"repeats, each of {first['batches']} batches without replacement. Much easier than the whole set."
    )
    return Table(header, rows, caption)


def findings_table(record: ClipRecord) -> Table:
    """AUROC of each finding by method, with intervals; the average first."""
    rows: list[list[str | Cell]] = []
    for metric in _finding_metrics(record):
        below = f"{record.num_positive[metric]} positive" if metric in record.num_positive else ""
        if metric == _MACRO and record.averaged:
            below = f"of {len(record.averaged)}"
        rows.append([Cell(_finding(metric), below), *(_cell(of.get(metric)) for of in record.findings.values())])
    caption = f"AUROC by finding, 95 % interval by {_unit(record.findings)} below it."
    if left_out := [m for m in record.num_positive if record.averaged and m not in record.averaged]:
        caption += f" Not in the average, since too few images have or lack it: {', '.join(map(_finding, left_out))}."
    return Table(["", *record.findings], rows, caption)


def attributes_table(record: ClipRecord) -> Table:
    """Zero-shot accuracy of each attribute, with intervals, beside that of a guess."""
    rows = [
        [
            Cell(name, f"{record.num_classes[name]} classes" if name in record.num_classes else ""),
            *(_cell(of.get(metric)) for metric in ("accuracy", "balanced_accuracy")),
            f"{1 / record.num_classes[name]:.3f}" if name in record.num_classes else "n/a",
        ]
        for name, of in record.attributes.items()
    ]
    caption = (
        "Zero-shot accuracy of attributes, each class an ensemble of prompts; 95 % interval by "
        f"{_unit(record.attributes)} below it."
    )
    return Table(["", "accuracy", "balanced accuracy", "balanced, by chance"], rows, caption)


def _retrieval(folder: Path, record: ClipRecord) -> list[Block]:
    seeds = max((int(f["n"]) for of in record.retrieval.values() for f in of.values()), default=1)
    over = f"mean ± standard deviation over {seeds} seeds, " if seeds > 1 else ""
    caption = (
        f"Retrieval among all {record.num_pairs} pairs: R@k is the fraction of queries with an item of their own among "
        f"the k nearest, ties counting against; {over}95 % interval by {_unit(record.retrieval)} below."
    )
    blocks: list[Block] = [retrieval_table(record.retrieval, caption)] if record.retrieval else []
    if record.protocol:
        blocks.append(protocol_table(record.protocol))
    if record.curves:
        path = folder / "retrieval.png"
        draw.retrieval_curves(path, record.curves, record.num_pairs)
        blocks.append(Picture(path, "R@k against k with 95 % bands. Dotted: drawn at random, one item a query."))
    if record.similarity:
        path = folder / "similarity.png"
        draw.similarity_matrix(path, *record.similarity)
        blocks.append(
            Picture(
                path,
                f"Cosines of {len(record.similarity[0])} images and the texts written for them, drawn at random. What "
                "belongs together lies on the diagonal; texts off it that are right belong to the same case.",
            )
        )
    return blocks


def _zero_shot(folder: Path, record: ClipRecord) -> list[Block]:
    blocks: list[Block] = []
    if record.findings:
        path = folder / "findings.png"
        shown = {
            _finding(metric): {method: of[metric] for method, of in record.findings.items() if metric in of}
            for metric in _finding_metrics(record)
        }
        draw.finding_dots(path, shown)
        blocks += [findings_table(record), Picture(path, "AUROC by finding with 95 % intervals. Dotted: chance.")]
    if record.attributes:
        blocks.append(attributes_table(record))
    return blocks


def _foils(folder: Path, record: ClipRecord) -> list[Block]:
    if not record.foils:
        return []
    kinds = list(dict.fromkeys(kind for of_method in record.foils.values() for kind in of_method))
    rows = {k: {method: of[k] for method, of in record.foils.items() if k in of} for k in kinds}
    path = folder / "foils.png"
    draw.finding_dots(path, rows, "Fraction nearer to the true caption")
    caption = (
        "The fraction of images nearer to their caption than to one in which this single fact is wrong, with 95 % "
        "intervals. Dotted: chance. Below it, a fact is read the wrong way round."
    )
    return [Picture(path, caption)]


def _neighbours(folder: Path, record: ClipRecord) -> list[Block]:
    blocks: list[Block] = []
    if record.text_queries:
        path = folder / "nearest_images.png"
        draw.nearest_images(path, record.text_queries)
        blocks.append(
            Picture(path, "Captions drawn at random, and their nearest images with cosines. Green: what belongs to it.")
        )
    if record.image_queries:
        path = folder / "nearest_captions.png"
        draw.nearest_captions(path, record.image_queries)
        blocks.append(
            Picture(path, "Images drawn at random, and their nearest captions with cosines. Green: what belongs to it.")
        )
    return blocks


def _pairs(folder: Path, record: ClipRecord) -> list[Block]:
    pairs = record.pairs
    if pairs is None:
        return []
    histogram, reliability = folder / "cosines.png", folder / "reliability.png"
    draw.similarity_histogram(histogram, pairs.cosines, pairs.targets, pairs.curve)
    curves = {name: [(scores, pairs.targets)] for name, scores in pairs.probabilities.items()}
    calibration(reliability, curves, pairs.figures)
    return [
        Text(
            "Matched pairs are an image and its own text, random ones an image and a text of another case, as many of "
            "each: probabilities hold for that mixture. The calibration was fitted on the validation split."
        ),
        Picture(histogram, "Cosines of the test split's pairs, and the probability that is read off them."),
        Picture(
            reliability,
            "Reliability of that probability before and after calibration; matched pairs are the positive class. 15 "
            "bins with 95 % Wilson intervals; below, how many pairs each holds.",
        ),
    ]


def _numbers(record: ClipRecord) -> dict[str, str]:
    """What the page shows at a glance, of the first method."""
    found = {"pairs": str(record.num_pairs)}
    for of_method in list(record.retrieval.values())[:1]:
        found |= {RETRIEVAL[m]: decimal(of_method[m]["mean"]) for m in _GLANCE if m in of_method}
    for of_method in list(record.findings.values())[:1]:
        found["zero-shot AUROC, mean"] = decimal(of_method[_MACRO]["mean"])
    return found


def _unit(figures: Figures) -> str:
    """What was resampled."""
    return next((str(f.get("unit", "patient")) for of in figures.values() for f in of.values()), "patient")


def _finding_metrics(record: ClipRecord) -> list[str]:
    """The average first, then findings in the order given."""
    named = dict.fromkeys(metric for of_method in record.findings.values() for metric in of_method)
    return [m for m in named if m == _MACRO] + [m for m in named if m != _MACRO]


def _finding(metric: str) -> str:
    return "mean over findings" if metric == _MACRO else metric.removeprefix("auroc/").replace("_", " ")


def _cell(figure: Mapping[str, Any] | None) -> Cell:
    return Cell("n/a") if figure is None else Cell(mean_std(figure), interval(figure))


def _percent(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}"
