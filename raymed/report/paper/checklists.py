"""Reporting guidelines: which item the pack answers where, and what is left to the authors.

A place is "Methods: HEADING", the name of a table or that of a figure. An item is answered by those of its places that
the pack holds; a section with blanks says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from raymed.report.paper.record import PaperRecord
from raymed.report.paper.table import PaperTable, Row
from raymed.report.paper.word import BLANK

BLANKS = " (has blanks)"


@dataclass(frozen=True)
class Item:
    """One item of a guideline."""

    number: str
    section: str
    topic: str
    places: Sequence[str] = ()
    """Where the pack may answer it."""
    author: str = ""
    """What no program can write."""
    needs: Sequence[str] = ()
    """Fields of the record without which those places do not answer it, such as "study.funding"."""


def places_of(sections: Mapping[str, str], tables: Sequence[str], figures: Sequence[str]) -> dict[str, bool]:
    """Every place of a pack -> whether it has blanks."""
    written = {f"Methods: {heading}": bool(BLANK.search(text)) for heading, text in sections.items()}
    return written | dict.fromkeys((*tables, *figures), False)


def checklist(
    name: str, title: str, items: Sequence[Item], places: Mapping[str, bool], record: PaperRecord
) -> PaperTable:
    """A table of items, where each is answered, and what is left."""
    rows = [Row(item.number, [item.topic, *_answer(item, places, record)], item.section) for item in items]
    notes = "The pack speaks to an item where the third column says; whether that satisfies it, the authors judge."
    return PaperTable(name, title, ["Item", "Topic", "Where it is answered", "Left to the authors"], rows, notes)


def _answer(item: Item, places: Mapping[str, bool], record: PaperRecord) -> tuple[str, str]:
    """Where, and what is left. Of an item that names what it needs, blanks of other facts do not count."""
    missing = [field.split(".")[-1].replace("_", " ") for field in item.needs if not attrgetter(field)(record)]
    found = [place + BLANKS * (places[place] and not item.needs) for place in item.places if place in places]
    if missing:
        found = [place for place in found if not place.startswith("Methods: ")]
    left = [*missing, *([item.author] if item.author else [])] or ([] if found else [item.topic])
    return "; ".join(found), f"[TO FILL: {'; '.join(left)}]" if left else ""
