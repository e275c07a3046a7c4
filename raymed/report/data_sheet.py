"""What the network will see, on one page, before it is trained: data_sheet.html.

Counts by case, split, site and year; how precisely the test set can measure; what was left out and why; images of the
training split as the network receives them, without and with augmentation; outliers; nearly the same images of
different patients; what to beware of. Images of the test split are shown only where they are outliers or duplicates.
The page is one file: pictures of patients lie nowhere else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from raymed.config import flatten, to_dict
from raymed.data.augment import Augment
from raymed.data.dataset import DataSet
from raymed.data.manifest import SPLITS
from raymed.data.overview import (
    ATTRIBUTES,
    NOT_STATED,
    count,
    counted,
    counts,
    of_different,
    per_image,
    unit_name,
    warnings,
)
from raymed.data.overview_images import Duplicates, Look, extremes, look, near_duplicates, odd_sizes
from raymed.report import data_sheet_figures as draw
from raymed.report.data_sheet_images import drawn_for, grey_scale, network_input
from raymed.report.data_sheet_precision import auroc_interval, num_for_half_width, proportion_interval
from raymed.report.page import Block, Bullets, Cell, Facts, Lead, Picture, Section, Table, Text, write_page

NUM_IMAGES = 24
"""Shown of each class."""
RATE, AUROC, HALF_WIDTH = 0.9, 0.85, 0.05  # figures to be measured, and how precisely one would like to

_NUM_OUTLIERS = 8
_NUM_PAIRS = 12  # of images that are shown, and listed
_NUM_LISTED = 50
_NUM_VALUES = 12  # of an attribute; the rest are one row
_PANELS = ("site", "scanner", "year")


@dataclass(frozen=True)
class _Sheet:
    """What the sections are made of. figures: the folder of their pictures. scale: the values shown black and white."""

    data: DataSet
    images: pd.DataFrame
    augment: Augment
    flow: Sequence[tuple[str, int]]
    found: Look
    duplicates: Duplicates
    figures: Path
    scale: tuple[float, float]

    @property
    def what(self) -> str:
        return unit_name(self.data)


def data_sheet(
    data: DataSet,
    augment: Augment,
    attributes: pd.DataFrame | None,
    flow: Sequence[tuple[str, int]] | None,
    path: Path,
) -> Path:
    """Write the page, whole or not at all, and return its path.

    Args:
        augment: how images are changed in training.
        attributes: one row an image in the order of the data set (site, year, scanner, age, sex, modality, right,
            burned_in, blank_boxes as an import writes them, those there are): `read_table(path).iloc[data.rows - 1]`.
        flow: (text, number of files or images) as an import tells it: what was found, each reason to leave some out,
            what remains.

    Raises:
        ValueError: attributes have another number of rows.
    """
    images = per_image(data, attributes)
    found = look(data)
    with tempfile.TemporaryDirectory() as folder:
        duplicates = near_duplicates(data, found)
        sheet = _Sheet(data, images, augment, flow or (), found, duplicates, Path(folder), grey_scale(data))
        beware = warnings(data, images, augment, sheet.duplicates)
        sections = [
            Section("Warnings", [Bullets(beware)] if beware else [Text("The checks found nothing.", quiet=True)]),
            Section("Where the images come from", _flow(sheet)),
            Section("Counts", _counts(sheet)),
            Section("What can be measured", _precision(sheet)),
            Section("As the network receives them", _gallery(sheet, "plain", None)),
            Section("With augmentation", _gallery(sheet, "changed", augment)),
            Section("Outliers", _outliers(sheet)),
            Section("Nearly the same images", _duplicates(sheet)),
            Section("Notes", _notes(sheet)),
        ]
        return write_page(path, "Data sheet", "before training", _lead(sheet, beware), sections)


def _lead(sheet: _Sheet, beware: Sequence[str]) -> Lead:
    data, everything = sheet.data, count(sheet.images, np.ones(len(sheet.data), bool))
    held = [counted(everything.images, "image")] if sheet.what != "image" else []
    if data.has_patients and sheet.what == "case":
        held.append(counted(len(np.unique(data.patients)), "patient"))
    sentence = counted(everything.units, sheet.what) + (f": {' of '.join(held)}" if held else "")
    numbers = {f"{sheet.what}s": f"{everything.units:,}", "images": f"{everything.images:,}"}
    if data.positive:
        positive = everything.positive
        sentence += f"; {counted(positive, sheet.what)} positive ({data.positive}), {positive / everything.units:.0%}"
        numbers[f"positive {sheet.what}s"] = f"{positive:,}"
    numbers["warnings"] = str(len(beware))
    more = ["This page shows images of patients: keep it where the images may be kept."]
    return Lead(f"{sentence}.", more, "open" if beware else "neutral", numbers)


def _flow(sheet: _Sheet) -> list[Block]:
    if not sheet.flow:
        return []
    *steps, last = sheet.flow
    num = len(sheet.data)
    if last[1] > num:
        steps, last = [*steps, ("left out when images were read, see the notes", last[1] - num)], ("used", num)
    caption = "What was found, what was left out and why, and how the rest is divided."
    caption += " One file may be several images." if last[1] < num else ""
    path = sheet.figures / "flow.png"
    draw.flow(path, [*steps, last], {split: _held(sheet, split) for split in _splits(sheet)})
    told = "; ".join(f"{text} (n = {num:,})" for text, num in (*steps, last))
    return [Picture(path, caption, told)]


def _splits(sheet: _Sheet) -> list[str]:
    there = set(sheet.images["split"])
    return [split for split in (*SPLITS, "not used") if split in there]


def _held(sheet: _Sheet, split: str) -> str:
    of_split = counts(sheet.images, "split")[split]
    held = counted(of_split.units, sheet.what)
    held += f", {of_split.positive:,} positive" if sheet.data.positive else ""
    return held + (f"\n{counted(of_split.images, 'image')}" if sheet.what != "image" else "")


def _counts(sheet: _Sheet) -> list[Block]:
    values = {name: set(sheet.images[name]) for name in ATTRIBUTES if name in sheet.images}
    several = [name for name, of in values.items() if len(of) > 1]
    blocks: list[Block] = [_split_table(sheet)]
    if panels := {name: _by_class(sheet, name) for name in _PANELS if name in several}:
        path = sheet.figures / "composition.png"
        draw.composition(path, panels, f"{sheet.what}s")
        blocks.append(Picture(path, f"{sheet.what.capitalize()}s by {', '.join(panels)} and class."))
    blocks += [_attribute_table(sheet, name) for name in several]
    same = [f"{name} {next(iter(of))}" for name, of in values.items() if len(of) == 1 and of != {NOT_STATED}]
    return blocks + [Text(f"The same in all images: {', '.join(same)}.", quiet=True)] * bool(same)


def _split_table(sheet: _Sheet) -> Table:
    images, data = sheet.images, sheet.data
    header = [
        "",
        *(f"{name} (positive)" if name == data.positive else name for name in data.classes),
        "all",
        "patients",
    ]
    split, label = images["split"].to_numpy(str), images["label"].to_numpy(str)
    rows: list[list[str | Cell]] = []
    for name in [*_splits(sheet), "all"]:
        here = np.ones(len(data), bool) if name == "all" else split == name
        cells = [_cell(sheet, here & (label == of)) for of in data.classes]
        patients = f"{len(np.unique(data.patients[here])):,}" if data.has_patients else "unknown"
        rows.append([name, *cells, _cell(sheet, here), patients])
    below = ", images below them" if sheet.what != "image" else ""
    return Table(header, rows, f"{sheet.what.capitalize()}s by split and class{below}.")


def _cell(sheet: _Sheet, where: np.ndarray) -> Cell:
    found = count(sheet.images, where)
    return Cell(f"{found.units:,}", counted(found.images, "image") if sheet.what != "image" else "")


def _by_class(sheet: _Sheet, column: str) -> dict[str, dict[str, int]]:
    """Cases of each class for the most frequent values of a column."""
    found = list(counts(sheet.images, column).items())[:_NUM_VALUES]
    return {value: {name: of.classes.get(name, 0) for name in sheet.data.classes} for value, of in found}


def _attribute_table(sheet: _Sheet, column: str) -> Table:
    plural = f"{sheet.what}s"
    values = sheet.images[column].to_numpy(str)
    found = counts(sheet.images, column)
    shown = dict(list(found.items())[:_NUM_VALUES])
    if len(found) > len(shown):
        shown[f"{len(found) - len(shown)} others"] = count(sheet.images, ~np.isin(values, list(shown)))
    header = [column, plural, *(["images"] if sheet.what != "image" else [])]
    header += (["positive"] if sheet.data.positive else []) + list(SPLITS)
    rows: list[list[str | Cell]] = []
    for value, of in shown.items():
        images = [f"{of.images:,}"] if sheet.what != "image" else []
        positive = [f"{of.positive:,} ({of.positive / of.units:.0%})"] if sheet.data.positive else []
        rows.append([value, f"{of.units:,}", *images, *positive, *(f"{num:,}" for num in of.splits.values())])
    return Table(header, rows, f"{plural.capitalize()} by {column}; positive, train, val and test count {plural}.")


def _precision(sheet: _Sheet) -> list[Block]:
    if not sheet.data.positive:
        return []
    found = counts(sheet.images, "split")
    measured = {split: found[split] for split in ("val", "test") if split in found}
    measured["all, by cross-validation"] = count(sheet.images, np.ones(len(sheet.data), bool))
    header = ["", "positive", "others", f"sensitivity {RATE:.2f}", f"specificity {RATE:.2f}", f"AUROC {AUROC:.2f}"]
    rows: list[list[str | Cell]] = []
    for split, of in measured.items():
        positive, others = of.positive, of.units - of.positive
        cells = [
            _expected(proportion_interval(RATE, positive) if positive else None),
            _expected(proportion_interval(RATE, others) if others else None),
            _expected(auroc_interval(AUROC, positive, others) if positive and others else None),
        ]
        rows.append([split, f"{positive:,}", f"{others:,}", *cells])
    caption = (
        f"The 95 % interval to expect if a model had these figures, counted in {sheet.what}s: Wilson's for sensitivity "
        "and specificity, Hanley and McNeil's for AUROC."
    )
    needed = num_for_half_width(RATE, HALF_WIDTH)
    text = f"To know a sensitivity of {RATE:.2f} within ± {HALF_WIDTH:.2f}, {needed} positive {sheet.what}s are needed."
    return [Table(header, rows, caption), Text(text)]


def _expected(interval: tuple[float, float] | None) -> Cell:
    if interval is None:
        return Cell("n/a")
    low, high = interval
    return Cell(f"{low:.2f} – {high:.2f}", f"± {(high - low) / 2:.2f}")


def _gallery(sheet: _Sheet, name: str, augment: Augment | None) -> list[Block]:
    blocks: list[Block] = []
    for position, label in enumerate(sheet.data.classes):
        indices = drawn_for(sheet.data, label, NUM_IMAGES)
        if not len(indices):
            continue
        path = sheet.figures / f"{name}_{position}.png"
        draw.tiles(path, _received(sheet, indices, augment), [f"row {row}" for row in sheet.data.rows[indices]])
        blocks.append(Picture(path, f"{label}: {_which(sheet.data, label, len(indices), augment)}."))
    if not blocks:
        return []
    size = sheet.data.preprocess.size
    said = (
        f"{size} x {size} pixels; one scale of grey for all images of this page, and rows of the manifest below them."
        if augment is None
        else "Rotation, zoom, shift, mirroring, exposure, sharpness and noise are drawn afresh for each image in each "
        "step. What tells the classes apart must still be there."
    )
    return [Text(said), *blocks]


def _which(data: DataSet, label: str, num: int, augment: Augment | None) -> str:
    """The images of a class that are shown, in words."""
    images = counted(num, "image")
    if augment is not None:
        return f"{images}, the same, as changed in one step of training"
    of_class = int((data.class_codes[data.splits["train"]] == data.classes.index(label)).sum())
    if num == of_class:
        return f"{images}, all of the training split"
    return f"{images}, drawn at random from the {of_class:,} of the training split"


def _received(sheet: _Sheet, indices: np.ndarray, augment: Augment | None = None) -> list[np.ndarray]:
    """(H, W) or (H, W, 3) in [0, 1], on the page's scale of grey."""
    low, high = sheet.scale
    values = network_input(sheet.data, indices, augment)
    return list(((values - low) / (high - low)).clip(0, 1))


def _outliers(sheet: _Sheet) -> list[Block]:
    rows = sheet.data.rows
    blocks: list[Block] = [_sizes(sheet)]
    said = {"darkest": "mean grey value", "brightest": "mean grey value", "lowest contrast": "standard deviation"}
    for position, (name, extreme) in enumerate(extremes(sheet.found, _NUM_OUTLIERS).items()):
        path = sheet.figures / f"outliers_{position}.png"
        titles = [f"row {rows[i]}: {value:.2f}" for i, value in zip(extreme.indices, extreme.values, strict=True)]
        draw.tiles(path, _received(sheet, extreme.indices), titles, extreme.num_outlying)
        num = counted(extreme.num_outlying, "image")
        caption = f"{name.capitalize()}, by {said[name]} in [0, 1]. Far from the others: {num}"
        blocks.append(Picture(path, caption + " (marked)." if extreme.num_outlying else caption + "."))
    odd = odd_sizes(sheet.found)
    if len(odd):
        path = sheet.figures / "odd_sizes.png"
        shown = odd[:_NUM_OUTLIERS]
        titles = [f"row {rows[i]}: {sheet.found.heights[i]} x {sheet.found.widths[i]}" for i in shown]
        draw.tiles(path, _received(sheet, shown), titles)
        caption = f"Odd sizes or proportions (height x width): {counted(len(odd), 'image')}."
        blocks.append(Picture(path, caption))
    return blocks


def _sizes(sheet: _Sheet) -> Text:
    sizes = pd.Series(list(zip(sheet.found.heights.tolist(), sheet.found.widths.tolist(), strict=True))).value_counts()
    shown = "; ".join(f"{h} x {w} ({num:,})" for (h, w), num in sizes.iloc[:6].items())
    said = f"Sizes before preprocessing, height x width (images): {shown}"
    said += f"; {counted(len(sizes) - 6, 'other')}" if len(sizes) > 6 else ""
    size = sheet.data.preprocess.size or 0
    small = int((np.maximum(sheet.found.heights, sheet.found.widths) < size).sum())
    said += f". Smaller than the network's {size} x {size}, and enlarged: {counted(small, 'image')}" if small else ""
    return Text(f"{said}.")


def _duplicates(sheet: _Sheet) -> list[Block]:
    found = sheet.duplicates
    compared = f"{counted(found.num_compared, 'image')} were compared."
    if not len(found.pairs):
        return [Text(f"No two images{of_different(sheet.data)} are nearly the same picture. {compared}", quiet=True)]
    path = sheet.figures / "duplicates.png"
    shown = found.pairs[:_NUM_PAIRS].reshape(-1)
    split = sheet.images["split"].to_numpy()
    titles = [f"row {sheet.data.rows[i]}, {split[i]}" for i in shown]
    draw.tiles(path, _received(sheet, shown), titles, together=2)
    caption = (
        f"Pairs of images{of_different(sheet.data)} that are nearly the same picture, the most alike first: "
        f"{min(len(found.pairs), _NUM_PAIRS)} of {counted(len(found.pairs), 'pair')}. {compared}"
    )
    header = ["rows", "splits", "classes", "similarity"]
    label = sheet.images["label"].to_numpy()
    rows: list[list[str | Cell]] = [
        [
            " and ".join(map(str, sheet.data.rows[pair])),
            " / ".join(split[pair]),
            " / ".join(label[pair]),
            f"{alike:.2f}",
        ]
        for pair, alike in zip(found.pairs[:_NUM_LISTED], found.similarity, strict=False)
    ]
    return [Picture(path, caption), Table(header, rows, "Correlation of the fine detail of both images.")]


def _notes(sheet: _Sheet) -> list[Block]:
    facts = {"data fingerprint": sheet.data.fingerprint} | flatten(to_dict(sheet.data.preprocess))
    for name in ("mean", "std"):
        facts[name] = [f"{value:.4f}" for value in facts[name]] if facts.get(name) else None
    notes: list[Block] = [Bullets(sheet.data.notes)] if sheet.data.notes else []
    return [*notes, Facts(facts, "Preprocessing"), Facts(flatten(to_dict(sheet.augment)), "Augmentation")]
