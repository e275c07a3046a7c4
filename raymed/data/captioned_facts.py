"""What a captioned phantom shows, as facts: the truth that its picture, its captions and its foils are made from.

An image shows one organ and none, one or two groups of lesions; a group is one to three equal lesions on one side.
Sides are the patient's, as in every report: the patient's right is on the left of the picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from numpy.random import Generator

VALUES = {
    "organ": ("lung", "breast", "brain", "uterus"),
    "finding": ("nodule", "mass", "cyst", "calcification"),
    "side": ("left", "right"),
    "count": ("1", "2", "3"),
    "size": ("small", "large"),
    "severity": ("mild", "severe"),
}
"""Every attribute with its values; all but the organ belong to a group of lesions."""

FOILS = (*VALUES, "swap")
"""What a foil may change."""

NO_FINDING = "No Finding"
_OF_LESION = ("finding", "side", "count", "size", "severity")
_SUFFIXES = ("", "_2")  # of the columns of the first and the second group


@dataclass(frozen=True)
class Lesion:
    """A group of equal lesions on one side. All values are texts of `VALUES`."""

    finding: str
    side: str
    count: str
    size: str
    severity: str


@dataclass(frozen=True)
class Facts:
    """An organ and its groups of lesions, in the order in which captions tell them; two lie on different sides and
    differ in their finding."""

    organ: str
    lesions: tuple[Lesion, ...] = ()

    def with_value(self, attribute: str, value: str) -> "Facts":
        """The same with another organ, or another value of an attribute of the first group."""
        if attribute == "organ":
            return replace(self, organ=value)
        return replace(self, lesions=(replace(self.lesions[0], **{attribute: value}), *self.lesions[1:]))

    def columns(self) -> dict[str, str]:
        """As cells of a manifest: organ, findings (names separated by |, or "No Finding"), and one an attribute of the
        first and of the second group, "" where there is none."""
        findings = "|".join(lesion.finding for lesion in self.lesions) or NO_FINDING
        cells = {name + suffix: "" for suffix in _SUFFIXES for name in _OF_LESION}
        for lesion, suffix in zip(self.lesions, _SUFFIXES, strict=False):
            cells |= {name + suffix: getattr(lesion, name) for name in _OF_LESION}
        return {"organ": self.organ, "findings": findings, **cells}

    @classmethod
    def from_columns(cls, cells: Mapping[str, str]) -> "Facts":
        """The inverse of `columns`."""
        present = [suffix for suffix in _SUFFIXES if cells[f"finding{suffix}"]]
        return cls(cells["organ"], tuple(Lesion(*(cells[n + suffix] for n in _OF_LESION)) for suffix in present))


def all_lesions() -> list[Lesion]:
    """Every group of lesions there may be."""
    return [Lesion(*values) for values in product(*(VALUES[name] for name in _OF_LESION))]


def changed(facts: Facts, kind: str, rng: Generator) -> Facts | None:
    """The same but for one fact, of `FOILS`; None where that cannot be asked of the image.

    "swap" exchanges the findings of two groups. What comes out may be the truth of another image: never two groups of
    one finding or on one side, hence no "side" where there are two groups.
    """
    num = len(facts.lesions)
    if (kind != "organ" and num == 0) or (kind == "side" and num == 2) or (kind == "swap" and num < 2):
        return None
    if kind == "swap":
        first, second = facts.lesions
        swapped = replace(first, finding=second.finding), replace(second, finding=first.finding)
        return replace(facts, lesions=swapped)
    of_first = facts.organ if kind == "organ" else getattr(facts.lesions[0], kind)
    taken = {of_first} | ({lesion.finding for lesion in facts.lesions} if kind == "finding" else set())
    others = [value for value in VALUES[kind] if value not in taken]
    return facts.with_value(kind, others[rng.integers(len(others))])
