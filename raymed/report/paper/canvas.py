"""Figures at the widths of a journal, as PDF and SVG, in type that can be read at that size.

One column is 89 mm wide and two are 183 mm (Nature's and RSNA's widths differ from these by no more than a millimetre
or two). PDF embeds its fonts as TrueType, which journals ask for; SVG holds text as outlines, so that it looks the same
on a machine without the fonts. Neither holds a date: the same record gives the same files.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raymed.report.style import STYLE, font_families
from raymed.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ONE_COLUMN, TWO_COLUMNS = 89.0, 183.0  # mm
MM = 1 / 25.4  # inches
POINT = 25.4 / 72  # mm

JOURNAL: dict[Any, Any] = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "axes.titleweight": "normal",
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.1,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "raymed",
}


@contextmanager
def journal_figure(
    stem: Path, width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Iterator[Figure]:
    """A matplotlib figure of width x height mm; on leaving the block it is written to `stem`.pdf and `stem`.svg."""
    import matplotlib
    from matplotlib.figure import Figure

    # While a font is cut down to the characters used, fontTools warns of each table that no reader needs.
    logging.getLogger("fontTools.subset").setLevel(logging.ERROR)
    style: dict[Any, Any] = STYLE | JOURNAL | {"font.family": list(font_families())}
    with matplotlib.rc_context(style):
        drawn = Figure(figsize=(width * MM, height * MM), layout=layout)
        yield drawn
        for ending, undated in (("pdf", {"CreationDate": None}), ("svg", {"Date": None})):
            written = io.BytesIO()
            drawn.savefig(written, format=ending, metadata=undated)
            write_atomic(stem.with_name(f"{stem.name}.{ending}"), written.getvalue())


def letter(axes: Axes, text: str) -> None:
    """The bold letter of a panel, above its upper left corner."""
    axes.set_title(text, loc="left", fontweight="bold", fontsize=8, pad=5)
