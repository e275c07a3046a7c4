"""A self-contained HTML page: sections of text, tables, pictures, galleries, commands and facts.

Pictures are embedded, nothing is loaded from anywhere, and the page says so to the browser (its Content-Security-Policy
allows no request). It follows the reader's light or dark scheme and prints. All text is plain: markup in it is shown,
not obeyed. Its one script copies commands and filters galleries; without it all cards are shown.
"""

import base64
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from raymed.config import flatten, to_dict
from raymed.storage import write_atomic

CSS_DPI = 96


@dataclass(frozen=True)
class Text:
    """A paragraph; quiet ones, such as "there is nothing to draw", are set apart."""

    kind: ClassVar[str] = "text"
    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[str]


@dataclass(frozen=True)
class Cell:
    """A cell of a table, with a smaller second line and a mark.

    best is bold and second underlined; good, open and neutral are the tones of a verdict.
    """

    text: str
    below: str = ""
    mark: Literal["", "best", "second", "good", "open", "neutral"] = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row names it."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file; `alt` is read to those who cannot see it."""

    kind: ClassVar[str] = "picture"
    path: Path
    caption: str
    alt: str = ""

    @property
    def source(self) -> str:
        """The file as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels at which the picture has the size it was drawn for."""
        from PIL import Image

        with Image.open(self.path) as image:
            dpi = image.info.get("dpi", (CSS_DPI, CSS_DPI))
            return round(image.width * CSS_DPI / dpi[0]), round(image.height * CSS_DPI / dpi[1])


@dataclass(frozen=True)
class Code:
    """Text in a fixed-width font, with a button that copies it."""

    kind: ClassVar[str] = "code"
    text: str
    label: str = ""


@dataclass(frozen=True)
class Facts:
    """Names and values, such as a config; None reads as "none"."""

    kind: ClassVar[str] = "facts"
    values: Mapping[str, Any]
    label: str = ""


@dataclass(frozen=True)
class Tile:
    """A small image of a card, as the bytes of a JPEG or PNG file."""

    image: bytes
    caption: str

    @property
    def source(self) -> str:
        """The image as a data URL."""
        kind = "png" if self.image.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64," + base64.b64encode(self.image).decode()


@dataclass(frozen=True)
class Card:
    """What a gallery shows of one case: a mark, lines of text, and rows of tiles, one row a view."""

    title: str
    mark: str
    tone: Literal["good", "open", "neutral"] = "neutral"
    lines: Sequence[str] = ()
    rows: Sequence[Sequence[Tile]] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    """Filter -> what the card is under it, such as "Site" -> "Seoul"."""


@dataclass(frozen=True)
class Gallery:
    """Cards, with a row of buttons for each filter; cards are shown that fit the chosen button of every row."""

    kind: ClassVar[str] = "gallery"
    cards: Sequence[Card]

    @property
    def filters(self) -> dict[str, dict[str, int]]:
        """Filter -> value -> cards, of the filters that tell cards apart."""
        counts: dict[str, dict[str, int]] = {}
        for name, value in (tag for card in self.cards for tag in card.tags.items()):
            of_filter = counts.setdefault(name, {})
            of_filter[value] = of_filter.get(value, 0) + 1
        return {name: values for name, values in counts.items() if len(values) > 1}


Block = Text | Bullets | Table | Picture | Gallery | Code | Facts


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it. A section without blocks is left out."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """What a link to the section names."""
        return "".join(character if character.isalnum() else "-" for character in self.title.lower())


@dataclass(frozen=True)
class Lead:
    """What the page says first: one sentence, what qualifies it, and numbers to see at a glance."""

    sentence: str
    more: Sequence[str] = ()
    tone: Literal["good", "open", "neutral"] = "neutral"
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Label -> number."""


def repeat_blocks(command: str, environment: Mapping[str, Any], config: Any) -> list[Block]:
    """What it takes to do it again, as far as it is known."""
    blocks: list[Block] = [Code(command, "The command that repeats this:")] if command else []
    if environment:
        blocks.append(Facts(flatten(environment), "Environment"))
    if config is not None:
        blocks.append(Facts(flatten(to_dict(config)), "Config"))
    return blocks


def write_page(path: Path, title: str, subtitle: str, lead: Lead, sections: Sequence[Section]) -> Path:
    """Write the page, whole or not at all, and return its path."""
    from jinja2 import Environment, StrictUndefined

    template = importlib.resources.files("raymed.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    shown = [section for section in sections if section.blocks]
    html = environment.from_string(template).render(
        title=title, subtitle=subtitle, lead=lead, sections=shown, as_cell=_as_cell, as_text=_as_text
    )
    write_atomic(path, html)
    return path


def _as_cell(cell: str | Cell) -> Cell:
    return cell if isinstance(cell, Cell) else Cell(cell)


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value)) or "none"
    return "none" if value is None else str(value)
