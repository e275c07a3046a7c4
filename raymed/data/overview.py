"""What is in a data set, before anything is trained on it: counts by case, and what to beware of.

    per_image -> counts, warnings

Decisions are made by case, so the case is what is counted: the study of a patient where the manifest states one, else
the patient, else the image. A case is positive when one of its images is. Patients are numbers here, and images rows of
the manifest.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from raymed.data.augment import Augment
from raymed.data.dataset import DataSet
from raymed.data.manifest import SPLITS
from raymed.data.overview_images import Duplicates
from raymed.data.problems import rows_text

ATTRIBUTES = ("site", "scanner", "year", "age", "sex", "modality", "view", "side")
"""What images are counted by, where it is known."""
_SAID_OF_PIXELS = ("right", "burned_in", "blank_boxes")
NOT_STATED = "not stated"
TOO_FEW = 10
"""Positive cases below which a split says next to nothing."""

_CONFOUNDERS = ("site", "scanner", "year", "sex", "modality")
_BY_CHANCE = 0.05  # a class that is found in one place only by chance at least so often is not told
_STRONG = 0.3  # Cramer's V from which on shares differ strongly
_SIDES = re.compile(r"(?<![a-z])(left|right)(?![a-z])|[좌우]측|왼쪽|오른쪽", re.IGNORECASE)


def unit_name(data: DataSet) -> str:
    """What is counted: "case", "patient" or "image"."""
    return "case" if data.cases is not None else "patient" if data.has_patients else "image"


def of_different(data: DataSet) -> str:
    """Whose images are compared with each other: " of different patients"; "" where nobody is named."""
    return f" of different {'patient' if data.has_patients else 'case'}s" * (
        data.has_patients or data.cases is not None
    )


def per_image(data: DataSet, attributes: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row an image, in the order of the data set.

    Columns: row (of the manifest), split, patient and unit (numbers), label, positive (bool); and those there are of
    `ATTRIBUTES`, right, burned_in and blank_boxes, all as text, "not stated" where empty; age in bands of ten years.

    Args:
        attributes: one row an image, in the order of the data set: `read_table(path).iloc[data.rows - 1]`.

    Raises:
        ValueError: `attributes` has another number of rows.
    """
    images = pd.DataFrame({"row": data.rows, "split": _split_names(data), "patient": data.patients})
    images["unit"] = _units(data)
    images["label"] = [data.classes[k] for k in data.class_codes]
    images["positive"] = data.labels == 1
    stated = {} if attributes is None else {str(name): attributes[name].tolist() for name in attributes}
    stated |= {
        name: values.tolist() for name, values in (("view", data.views), ("side", data.sides)) if values is not None
    }
    for name, values in stated.items():
        if len(values) != len(data):
            raise ValueError(f"attributes have {len(values)} rows, the data set has {len(data)} images")
        if name in (*ATTRIBUTES, *_SAID_OF_PIXELS):
            images[name] = [_as_text(value) for value in values]
    if "age" in images:
        images["age"] = images["age"].map(_age_band)
    return images


@dataclass(frozen=True)
class Count:
    """Images, and cases (units): all, positive ones, and those by split (train, val, test) and by class."""

    images: int
    units: int
    positive: int
    splits: dict[str, int]
    classes: dict[str, int]


def count(images: pd.DataFrame, where: np.ndarray) -> Count:
    """The rows of `per_image` where `where` (N,) bool is true, counted."""
    units, split, label = (images[name].to_numpy() for name in ("unit", "split", "label"))

    def num_units(also: np.ndarray) -> int:
        return len(np.unique(units[where & also]))

    return Count(
        int(where.sum()),
        num_units(where),
        num_units(images["positive"].to_numpy(bool)),
        {name: num_units(split == name) for name in SPLITS},
        {name: num_units(label == name) for name in sorted(set(label))},
    )


def counts(images: pd.DataFrame, column: str) -> dict[str, Count]:
    """Images and cases for each value of a column of `per_image`: years and ages ascending, others by number of cases,
    "not stated" last."""
    values = images[column].to_numpy(str)
    found = {str(value): count(images, values == value) for value in np.unique(values)}
    by_name = column in ("year", "age")
    order = sorted(found, key=lambda value: (value == NOT_STATED, 0 if by_name else -found[value].units, value))
    return {value: found[value] for value in order}


def warnings(data: DataSet, images: pd.DataFrame, augment: Augment, duplicates: Duplicates) -> list[str]:
    """What to beware of, one sentence each; empty where nothing was found.

    Args:
        images: of `per_image`.
        augment: how images are changed in training.
    """
    what = unit_name(data)
    return [
        *_few_positives(data, images, what),
        *(said for column in _CONFOUNDERS if column in images for said in _confounded(images, column, what)),
        *_two_classes(images, what),
        *_orientations(images),
        *_mirrored(data, images, augment),
        *_burned_in(images),
        *_duplicated(data, images, duplicates),
    ]


def counted(num: int, what: str) -> str:
    """1, "case" -> "1 case"; 2000, "case" -> "2,000 cases"."""
    return f"{num:,} {what}{'s' * (num != 1)}"


def _split_names(data: DataSet) -> np.ndarray:
    names = np.full(len(data), "not used", object)
    for split, indices in data.splits.items():
        names[indices] = split
    return names


def _units(data: DataSet) -> np.ndarray:
    """(N,) numbers of the cases. Two patients may have a case of one name."""
    if data.cases is None:
        return data.patients
    owners = data.patients if data.has_patients else np.zeros_like(data.cases)
    return np.unique(np.stack([owners, data.cases]), axis=1, return_inverse=True)[1].reshape(-1)


def _as_text(value: Any) -> str:
    if value is None or value is pd.NA or value != value:
        return NOT_STATED
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value).strip() or NOT_STATED


def _age_band(age: str) -> str:
    """ "34" -> "30 – 39"."""
    if not age.isdecimal():
        return NOT_STATED
    start = int(age) // 10 * 10
    return f"{start} – {start + 9}" if start else "0 – 9"


def _few_positives(data: DataSet, images: pd.DataFrame, what: str) -> list[str]:
    if not data.positive:
        return []
    found = counts(images, "split")
    few = {split: found[split].positive for split in ("val", "test") if split in found}
    return [
        f"The {split} split has {counted(num, f'positive {what}')}: its figures will say next to nothing. "
        "Cross-validation uses all of them."
        for split, num in few.items()
        if num < TOO_FEW
    ]


def _confounded(images: pd.DataFrame, column: str, what: str) -> list[str]:
    """A class that is found with one value of the column only, or a value with one class only; else shares that differ
    much between values."""
    known = images.loc[images[column] != NOT_STATED, :]
    found = counts(known, column)
    values, labels = list(found), sorted(set(known["label"]))
    if min(len(values), len(labels)) < 2:
        return []
    table = np.array([[found[value].classes[label] for value in values] for label in labels])  # (classes, values)
    said = [
        f"All {counted(num, what)} of the class {labels[i]!r} have the {column} {values[j]!r}"
        for i, j, num in _alone(table)
    ] or [
        f"All {counted(num, what)} with the {column} {values[j]!r} are of the class {labels[i]!r}"
        for j, i, num in _alone(table.T)
    ]
    if said:
        return [f"{text}: a network can tell the class by the {column} and learn nothing else." for text in said]
    return _uneven(table, labels, values, column, what)


def _alone(table: np.ndarray) -> list[tuple[int, int, int]]:
    """(row, column, count) of each row whose counts all lie in one column, unless chance alone may do that."""
    share = table.sum(0) / table.sum()
    rows = [(i, int(row.argmax()), int(row.sum())) for i, row in enumerate(table) if (row > 0).sum() == 1]
    return [(i, j, num) for i, j, num in rows if share[j] ** num < _BY_CHANCE]


def _uneven(table: np.ndarray, labels: list[str], values: list[str], column: str, what: str) -> list[str]:
    """Whether the rarest class is shared out unevenly, by Cramer's V of the columns with at least ten cases."""
    from scipy.stats.contingency import association

    large = np.flatnonzero(table.sum(0) >= TOO_FEW)
    held = table[:, large]
    if len(large) < 2 or not held.sum(1).all() or association(held) < _STRONG:
        return []
    rarest = int(held.sum(1).argmin())
    shares = held[rarest] / held.sum(0)
    low, high = shares.argmin(), shares.argmax()
    return [
        f"The share of the class {labels[rarest]!r} depends on the {column}: {shares[low]:.0%} of {what}s with "
        f"{values[large[low]]!r}, {shares[high]:.0%} with {values[large[high]]!r}. Look at figures by {column}, too."
    ]


def _two_classes(images: pd.DataFrame, what: str) -> list[str]:
    num = sum(len(labels) > 1 for labels in _labels(images, "unit").values())
    return [f"Images of two classes lie in {counted(num, what)}, counted under both."] * bool(num)


def _labels(images: pd.DataFrame, *columns: str) -> dict[tuple, set[str]]:
    """The classes of the images with each combination of values."""
    found: dict[tuple, set[str]] = {}
    for *key, label in zip(*(images[column] for column in (*columns, "label")), strict=True):
        found.setdefault(tuple(key), set()).add(label)
    return found


def _orientations(images: pd.DataFrame) -> list[str]:
    if "right" not in images:
        return []
    found = Counter(images["right"].str.casefold())
    if not (found["left"] and found["right"]):
        return []
    said = f"the left edge of {counted(found['left'], 'image')}, the right edge of {found['right']:,}"
    said += f", not stated in {found[NOT_STATED]:,}" if found[NOT_STATED] else ""
    return [f"Orientations are mixed: the patient's right side is at {said}. A network cannot tell left from right."]


def _mirrored(data: DataSet, images: pd.DataFrame, augment: Augment) -> list[str]:
    """A mirror image keeps its label: wrong where the label is about a side."""
    if not augment.flip:
        return []
    advice = "turn mirroring off (augment.flip 0)"
    if named := [name for name in data.classes if _SIDES.search(name)]:
        return [f"Training mirrors images, and a class names a side ({', '.join(named)}): {advice}."]
    if "side" in images and _by_side(images):
        return [f"Training mirrors images, and the two sides of a case have labels of their own: {advice}."]
    return []


def _by_side(images: pd.DataFrame) -> bool:
    """Whether two sides of one case have different labels."""
    labels: dict[int, list[set[str]]] = {}
    for (unit, _), of_side in _labels(images, "unit", "side").items():
        labels.setdefault(unit, []).append(of_side)
    return any(of_side != sides[0] for sides in labels.values() for of_side in sides)


def _burned_in(images: pd.DataFrame) -> list[str]:
    if "burned_in" not in images:
        return []
    marked = images["burned_in"].str.casefold().to_numpy(str) == "yes"
    blanked = images["blank_boxes"].to_numpy(str) != NOT_STATED if "blank_boxes" in images else np.zeros_like(marked)
    left = images["row"].to_numpy()[marked & ~blanked].tolist()
    if not left:
        return []
    return [
        f"The files say that text is burned into {counted(int(marked.sum()), 'image')}, and nothing is blanked in "
        f"{rows_text(left)}: it may name the patient, and a network may read it."
    ]


def _duplicated(data: DataSet, images: pd.DataFrame, duplicates: Duplicates) -> list[str]:
    if not len(duplicates.pairs):
        return []
    split = images["split"].to_numpy()[duplicates.pairs]
    label = images["label"].to_numpy()[duplicates.pairs]
    across, disputed = int((split[:, 0] != split[:, 1]).sum()), int((label[:, 0] != label[:, 1]).sum())
    said = f"{counted(len(split), 'pair')} of images{of_different(data)} look nearly the same; in two splits: {across}"
    said += f", with two labels: {disputed}" if disputed else ""
    return [f"{said}. If they show one patient, figures will be too good."]
