"""Captions as they are trained on: cut to the named sections of a report, cleaned, and judged.

Cleaning follows MedCLIP-SAMv2 (Koleilat et al., 2024): special characters and surplus white space go, and what is left
with fewer than 20 characters is no caption. Here "special" means control and invisible characters only, since units,
accents and comparison signs mean something. A reference to the figure itself goes too: "Figure 3a." at the beginning
and "(Fig. 2)" anywhere say nothing of what is seen.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

HEADINGS = (
    "addendum", "clinical history", "clinical indication", "clinical information", "comparison", "comparisons",
    "conclusion", "conclusions", "exam", "examination", "findings", "history", "impression", "indication",
    "indications", "notification", "opinion", "procedure", "reason for exam", "reason for examination",
    "recommendation", "recommendations", "technique", "wet read",
)  # fmt: skip
"""Headings that end a section of a radiology report. Others ("Lungs:", "Heart:") divide a section and belong to it."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]")  # soft hyphens, marks of direction, ...
# Figure 3a, Figs. 1 and 2, fig 4a-c, Figure B
_NUMBER = r"fig(?:ure|ures|s)?\.?\s*(?:\d|[a-h](?![a-z]))(?:\d|[\s,;&\u2013-]|and\b|[a-h](?![a-z]))*"
_IN_BRACKETS = re.compile(rf"\s*[(\[]\s*(?:see\s+)?{_NUMBER}[)\]]", re.IGNORECASE)
_AT_THE_START = re.compile(rf"^\s*{_NUMBER}(?:[.:]\s+|\s[-\u2013]\s+)", re.IGNORECASE)


class Fault(NamedTuple):
    """Why a text is no caption."""

    kind: str
    """What it is counted under."""
    text: str
    """The reason, for the user's own eyes."""


def clean(text: str) -> str:
    """The text on one line, without control characters and references to figures."""
    text = _CONTROL.sub(" ", _INVISIBLE.sub("", text))
    text = _AT_THE_START.sub("", _IN_BRACKETS.sub("", text))
    return " ".join(text.split())


def sections(report: str, names: Sequence[str]) -> list[str]:
    """The named sections of a report, in the order of `names`; the whole text where it has no heading at all.

    A heading is one of `HEADINGS` or of `names` with a colon: in any case at the beginning of a line, in capitals
    anywhere (line ends are often lost in a table). Two sections of one name become one.
    """
    found = list(_headings(tuple(names)).finditer(report))
    if not found:
        return [report]
    parts: dict[str, list[str]] = {}
    for heading, end in zip(found, [*(match.start() for match in found[1:]), len(report)], strict=True):
        name = " ".join(heading[0].rstrip(": \t").lower().split())
        parts.setdefault(name, []).append(report[heading.end() : end])
    return [" ".join(parts[name.lower()]) for name in names if name.lower() in parts]


@functools.cache
def _headings(names: tuple[str, ...]) -> re.Pattern[str]:
    known = sorted({*HEADINGS, *(name.lower() for name in names)}, key=len, reverse=True)
    words = "|".join(re.escape(name).replace(r"\ ", r"\s+") for name in known)
    capitals = "|".join(re.escape(name.upper()).replace(r"\ ", r"\s+") for name in known)
    return re.compile(rf"(?:^[ \t]*(?i:{words})|\b(?:{capitals}))[ \t]*:", re.MULTILINE)


def fault(caption: str, shortest: int) -> Fault | None:
    """What is wrong with a cleaned text, if anything.

    Args:
        shortest: characters that a caption has at least.
    """
    if not caption:
        return Fault("no caption", "the caption is empty")
    shown = repr(caption if len(caption) <= 40 else f"{caption[:40]}...")
    if "\ufffd" in caption:
        return Fault("damaged caption", f"the caption {shown} was once read in a wrong encoding (U+FFFD)")
    if not any(map(str.isalnum, caption)):
        return Fault("no caption", f"the caption {shown} has no letter and no digit")
    if len(caption) < shortest:
        return Fault(short(shortest), f"the caption {shown} has {len(caption)} characters")
    return None


def short(shortest: int) -> str:
    """What captions with fewer characters are counted under."""
    return f"caption under {shortest} characters"


def captions_of(cells: Sequence[str], names: Sequence[str], shortest: int) -> tuple[tuple[str, ...], list[Fault]]:
    """The captions of one image, each once, and what is wrong with its other texts.

    Args:
        cells: what its caption columns hold.
        names: sections to take from each of them; none = all of it.
        shortest: as in `fault`.
    """
    texts = [part for cell in cells for part in (sections(cell, names) if names else [cell])]
    if not texts:
        return (), [Fault("no such section", f"the report has none of the sections {', '.join(names)}")]
    captions = list(dict.fromkeys(map(clean, texts)))
    faults = {caption: fault(caption, shortest) for caption in captions}
    return tuple(c for c in captions if not faults[c]), [found for found in faults.values() if found]
