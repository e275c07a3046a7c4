"""Which images belong to which row of the sheet, and which identifiers to one person.

Keys are joined only where they are equal. Those that would be equal but for a lost zero or another sign are shown, for
a person to decide: `1` and `01` may be two cases.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from raymed.config import UserError
from raymed.data.intake.header import normal
from raymed.data.intake.sheet import Sheet

_DECIMAL = re.compile(r"\.0+$")


@dataclass(frozen=True)
class NearMiss:
    """A row and an image that would belong together but for `difference`."""

    row: int
    image: int
    difference: str


@dataclass(frozen=True)
class Matches:
    """rows, images: key -> row numbers, positions of images, for the keys that both sides have. The other three are
    what is left over on either side, and the pairs among it that differ by a trifle."""

    rows: dict[str, list[int]]
    images: dict[str, list[int]]
    without_label: list[int]
    without_image: list[int]
    near_misses: list[NearMiss]


def match(image_keys: Sequence[str], row_keys: Mapping[int, str]) -> Matches:
    """Link images and rows whose keys are equal after NFC and without spaces around them. An empty key links nothing.

    Args:
        image_keys: of each image.
        row_keys: row number -> key.
    """
    images, rows = _grouped(enumerate(image_keys)), _grouped(row_keys.items())
    common = [key for key in rows if key and key in images]
    without_label = [i for i, key in enumerate(image_keys) if normal(key) not in rows or not normal(key)]
    without_image = [row for row, key in row_keys.items() if normal(key) not in images or not normal(key)]
    loose = _grouped((i, _loose(image_keys[i])) for i in without_label)
    near = [
        NearMiss(row, i, difference(row_keys[row], image_keys[i]))
        for row in without_image
        if _loose(row_keys[row])
        for i in loose.get(_loose(row_keys[row]), [])
    ]
    left, right = {key: rows[key] for key in common}, {key: images[key] for key in common}
    return Matches(left, right, without_label, without_image, near)


def _grouped(keys: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number, key in keys:
        groups[normal(key)].append(number)
    return dict(groups)


def _loose(key: str) -> str:
    """What is left of a key without what is easily lost: leading zeros, capitals, signs, full width, ".0"."""
    letters = re.sub(r"[\W_]", "", _DECIMAL.sub("", unicodedata.normalize("NFKC", normal(key)).casefold()))
    return letters.lstrip("0") or letters[:1]


def difference(one: str, other: str) -> str:
    """In what trifle two identifiers differ, e.g. "leading zeros"; "" where it is more than that."""
    one, other = normal(one), normal(other)
    changes = {
        "leading zeros": lambda text: text.lstrip("0"),
        "capitals": str.casefold,
        "a decimal .0": lambda text: _DECIMAL.sub("", text),
        "full-width characters": lambda text: unicodedata.normalize("NFKC", text),
        "spaces, hyphens or other signs": lambda text: re.sub(r"[\W_]", "", text),
    }
    if _loose(one) != _loose(other):
        return ""
    return next((name for name, change in changes.items() if change(one) == change(other)), "several signs")


def one_person(mapping: Sheet) -> dict[str, str]:
    """Identifier -> the one that stands for the person, of all that a mapping file names.

    Args:
        mapping: a table of two columns: an identifier, and the one that it is to be counted under. Rows that share an
            identifier are of one person.

    Raises:
        UserError: not two columns, no names of columns, an empty cell, or a bad one.
    """
    name = "the file of patients with two identifiers"
    if mapping.bad:
        raise UserError(f"{name}: {mapping.bad[0].text}")
    if mapping.looks_like_data:
        raise UserError(f"{name} has no column names: what stands in its first row looks like data; put two above it")
    if mapping.table.shape[1] != 2:
        raise UserError(
            f"{name} has {mapping.table.shape[1]} columns where two are expected: an identifier, and the one that it "
            "is to be counted under"
        )
    stands: dict[str, str] = {}
    for row, (one, other) in zip(mapping.table.index, mapping.table.itertuples(index=False), strict=True):
        if not one or not other:
            raise UserError(f"{name}: row {row} has an empty cell")
        drop, keep = stands.setdefault(one, one), stands.setdefault(other, other)
        stands = {identifier: keep if person == drop else person for identifier, person in stands.items()}
    return stands
