"""Sets of images with captions: read, cleaned, freed of duplicates, split by patient.

    read_captions -> decode once -> exact duplicates out -> patients on one side -> CaptionSet

A `CaptionSet` is a `DataSet`, so whatever trains on one trains on it. It needs no labels; where findings are stated,
each of them is divided among the splits in proportion. `read_manifest` and `load` know a `CaptionConfig` when they see
one.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from raymed.config import UserError, check_choice, check_range
from raymed.data.caption_layouts import LAYOUTS
from raymed.data.caption_text import captions_of, short
from raymed.data.dataset import DataSet, assemble, load
from raymed.data.locations import as_location, ending
from raymed.data.manifest import (
    DataConfig,
    Manifest,
    check_labels,
    check_there,
    read_manifest,
    read_table,
    required_column,
    usable_rows,
)
from raymed.data.problems import Problem, settle

UNLABELLED = "unlabelled"
"""The one class of images without labels."""
_NO_FINDING = "no finding"
_LONGEST_NAME = 100  # characters: what is longer is no name of a finding
_STRATUM = 10  # images that show a finding, from which on it is divided among the splits in proportion


@dataclass(frozen=True)
class CaptionConfig(DataConfig):
    """Which images, and which texts go with them."""

    label: str = ""
    """Column with the name of the class, where images are to be labelled too (with positive); "" = not used."""
    layout: Literal["table", "medpix", "roco"] = "table"
    """What the manifest is: a table with one row an image; Descriptions.json of MedPix 2.0; captions.txt of ROCO or
    train_captions.csv of ROCOv2, each where it was published, beside its other files."""
    caption: tuple[str, ...] = ("caption",)
    """Columns with what is said of the image; of several captions, one is drawn each time."""
    sections: tuple[str, ...] = ()
    """Headings of a radiology report, such as findings and impression: each of these sections of a text is a caption
    of its own, and the rest is left out. A text without any heading stays whole; empty = all of every text."""
    findings: str | None = None
    """Column with names of what is seen, separated by |, for zero-shot classification ("No Finding" = none); None = not
    used."""
    min_caption: int = 20
    """Captions with fewer characters are left out, and counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("data.layout", self.layout, ("table", *LAYOUTS))
        check_range("data.min_caption", self.min_caption, 1)
        if not self.caption:
            raise UserError("data.caption names no column")
        for field in ("caption", "sections"):
            names = [name.strip().casefold() for name in getattr(self, field)]
            if "" in names or len(set(names)) != len(names):
                raise UserError(f"data.{field} has an empty name, or one twice: {', '.join(getattr(self, field))}")


@dataclass(kw_only=True)
class CaptionSet(DataSet):
    """N images with at least one caption each. The fingerprint hangs on captions and findings too.

    captions: of each image, cleaned, each once. findings: F names, sorted. has_finding: (N, F) bool.
    """

    captions: tuple[tuple[str, ...], ...]
    findings: tuple[str, ...]
    has_finding: np.ndarray

    def summary(self) -> str:
        """Images, captions, patients and findings by split, fingerprint and notes, as text."""
        counts = pd.DataFrame(
            {
                split: {
                    "images": len(i),
                    "captions": sum(len(self.captions[k]) for k in i),
                    "patients": len(np.unique(self.patients[i])) if self.has_patients else "unknown",
                }
                | dict(zip(self.findings, self.has_finding[i].sum(0).tolist(), strict=True))
                for split, i in self.splits.items()
            }
        )
        texts = [caption for captions in self.captions for caption in captions]
        lengths = [len(text) for text in texts]
        said = (
            f"{len(texts)} captions, {len(set(texts))} of them distinct; {np.median(lengths):.0f} characters in the "
            f"median, at most {max(lengths)}"
        )
        return "\n".join([counts.to_string(), said, f"data fingerprint {self.fingerprint}", *self.notes])


def raw_captions(config: CaptionConfig) -> tuple[pd.DataFrame, list[str]]:
    """The table as text, in one form for every layout, and what the user is to know.

    Raises:
        UserError: file missing, empty or damaged, or not of that layout.
    """
    if config.manifest == "phantoms":
        raise UserError('data.manifest: "phantoms" are drawn by a recipe first, and then read like any other table')
    path = as_location(config.manifest)
    if isinstance(path, Path) and path.is_dir():
        first = "the table" if config.layout == "table" else "Descriptions.json, captions.txt or train_captions.csv"
        raise UserError(f"data.manifest: {path} is a folder: name the file in it ({first})")
    if config.layout != "table":
        return LAYOUTS[config.layout](path)
    check_there(path)
    if ending(path) not in (".csv", ".tsv", ".parquet"):
        advice = "Descriptions.json of MedPix 2.0 needs --data.layout medpix, captions.txt of ROCO --data.layout roco"
        raise UserError(f"data.manifest: a table ends in .csv, .tsv or .parquet, got {path} ({advice})")
    return read_table(path), []


@read_manifest.register
def read_captions(config: CaptionConfig) -> Manifest:
    """Read and check the table, as `read_manifest`; its table also has captions (a tuple of at least one text) and
    findings (a tuple of names).

    Raises:
        UserError: whatever `read_manifest` raises but for missing labels; rows without a caption; captions that are
            all equal.
    """
    raw, notes = raw_captions(config)
    texts = _texts(raw, config)
    problems = _problems(texts)
    dropped = short(config.min_caption)
    bad = [problem for problem in problems if problem.kind != dropped]
    needed = ("image", "label") if config.label else ("image",)
    classes = config.classes if config.label else ()
    table = usable_rows(raw, config, needed, notes, names=classes, problems=bad).join(texts)
    left = set(table["row"])
    table = settle(table, [p for p in problems if p.kind == dropped and p.row in left], "skip", notes)
    notes += _caption_notes(table)
    if config.label:
        return Manifest(table, *check_labels(table, config, notes, classes), notes)
    notes += ["positive has no effect without a label column (--data.label)"] * (config.positive is not None)
    return Manifest(table.assign(label=UNLABELLED), (UNLABELLED,), "", notes)


@load.register
def load_captions(config: CaptionConfig, cache_dir: Path) -> CaptionSet:
    """Read, clean, decode and split a set of images and captions; see `load`.

    Raises:
        UserError: whatever `read_captions` and `load` raise.
    """
    manifest = read_captions(config)

    def choose(table: pd.DataFrame) -> pd.DataFrame:
        table = settle(table, _repeats(table), "skip", manifest.notes)
        return table if config.label else table.assign(stratum=_strata(table["findings"].tolist()))

    data, table = assemble(manifest, config, cache_dir, choose)
    names = tuple(sorted({name for found in table["findings"] for name in found}))
    captions = tuple(table["captions"])
    for split, indices in data.splits.items():
        if len({captions[i] for i in indices}) == 1:
            data.notes.append(f"all captions of {split} are equal: nothing is learned from it, and nothing measured")
    base: dict[str, Any] = {field.name: getattr(data, field.name) for field in fields(data)}
    base["fingerprint"] = _fingerprint(data, table)
    return CaptionSet(
        **base,
        captions=captions,
        findings=names,
        has_finding=np.array([[name in found for name in names] for found in table["findings"]], bool),
    )


def _texts(raw: pd.DataFrame, config: CaptionConfig) -> pd.DataFrame:
    """captions, faults (what is wrong with other texts of the image) and findings of each row, each a tuple."""
    path = as_location(config.manifest)
    cells = raw[[required_column(raw, "caption", name, path) for name in config.caption]]
    judged = [captions_of(row, config.sections, config.min_caption) for row in cells.itertuples(index=False)]
    found = raw[required_column(raw, "findings", config.findings, path)] if config.findings else [""] * len(raw)
    columns = {
        "captions": [captions for captions, _ in judged],
        "faults": [tuple(faults) for _, faults in judged],
        "findings": [_names(cell) for cell in found],
    }
    # As objects: a column of tuples is taken for something else.
    return pd.DataFrame({name: pd.Series(values, raw.index, dtype=object) for name, values in columns.items()})


def _problems(texts: pd.DataFrame) -> list[Problem]:
    """Rows without a caption, and those whose findings are no names."""
    problems = []
    for row, (captions, faults, findings) in enumerate(texts.itertuples(index=False), start=1):
        if not captions:  # what is wrong with a text that is there, if any is
            problems.append(Problem(row, *max(faults, key=lambda fault: fault.kind != "no caption")))
        if long := [name for name in findings if len(name) > _LONGEST_NAME]:
            problems.append(Problem(row, "findings that are no names", f"{long[0][:40] + '...'!r} is no name"))
    return problems


def _names(cell: str) -> tuple[str, ...]:
    """A|B -> (A, B); "No Finding" is none."""
    names = dict.fromkeys(name.strip() for name in cell.split("|"))
    return tuple(name for name in names if name and name.casefold() != _NO_FINDING)


def _caption_notes(table: pd.DataFrame) -> list[str]:
    """What to say of the captions that stay. Raises UserError where all are equal."""
    counts = Counter(table["captions"])
    if len(counts) == 1 and len(table) > 1:
        shown = " / ".join(next(iter(counts)))
        raise UserError(f"every image has the caption {shown!r}: there is nothing to tell the images apart by")
    again = sum(num for num in counts.values() if num > 1)
    notes = [f"{again} images have a caption that another has too: such pairs are no negatives"] * bool(again)
    beside = Counter(fault.kind for faults in table["faults"] for fault in faults if fault.kind != "no caption")
    return notes + [f"left out beside another caption of the image, {kind}: {num}" for kind, num in beside.items()]


def _repeats(table: pd.DataFrame) -> list[Problem]:
    """Rows with image, captions and split of an earlier one."""
    places = table["split"] if "split" in table else [""] * len(table)
    first: dict[tuple, int] = {}
    problems = []
    for row, *key in zip(table["row"], places, table["pixels"], table["captions"], strict=True):
        if (earlier := first.setdefault(tuple(key), row)) != row:
            problems.append(Problem(row, "exact duplicate of image and caption", f"the same as row {earlier}"))
    return problems


def _strata(findings: list[tuple[str, ...]]) -> list[str]:
    """The rarest finding of each image, of those that are not too rare to be divided."""
    counts = Counter(name for names in findings for name in names)
    common = [[name for name in names if counts[name] >= _STRATUM] for names in findings]
    return [min(names, key=lambda name: (counts[name], name), default=UNLABELLED) for names in common]


def _fingerprint(data: DataSet, table: pd.DataFrame) -> str:
    """sha256 of what `DataSet.fingerprint` stands for, captions and findings."""
    texts = json.dumps([table["captions"].tolist(), table["findings"].tolist()])
    return hashlib.sha256(f"{data.fingerprint}\n{texts}".encode()).hexdigest()
