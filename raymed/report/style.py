"""The look all figures share, and how one is made: drawn off screen, written whole or not at all.

Text may hold Hangul: characters that matplotlib's own font lacks are taken from NanumGothic, where the package
koreanize_matplotlib, which brings it, is installed. Elsewhere they are drawn as boxes, and matplotlib warns.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymed.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers tell apart (https://jfly.uni-koeln.de/color/), without its yellow.
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, "#000000")
GREY = "#7A7A7A"

DPI = 180
STYLE: dict[Any, Any] = {
    "figure.dpi": DPI,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "image.interpolation": "nearest",
}

HANGUL_FONTS = {"NanumGothic.ttf": 400, "NanumGothicBold.ttf": 700}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A matplotlib figure of width x height inches; on leaving the block it is written to `path` as PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "font.family": list(font_families())}):
        drawn = Figure(figsize=(width, height), layout="constrained")  # without pyplot: no window, no global state
        yield drawn
        png = io.BytesIO()
        drawn.savefig(png, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.08)
    write_atomic(path, png.getvalue())


@cache
def font_families() -> tuple[str, ...]:
    """What text is drawn with: the first family that has a character draws it. The fonts are made known to matplotlib.

    The package's folder is looked up without importing it, since that changes matplotlib's settings for the process.
    """
    from matplotlib.font_manager import FontEntry, fontManager

    package = importlib.util.find_spec("koreanize_matplotlib")
    if package is None or not package.submodule_search_locations:
        return ("DejaVu Sans",)
    for name, weight in HANGUL_FONTS.items():
        # Not addfont: it takes the bold font for a semi-bold one, and each figure would warn of that.
        path = Path(package.submodule_search_locations[0], "fonts", name)
        fontManager.ttflist.append(FontEntry(fname=str(path), name="NanumGothic", weight=weight, size="scalable"))
    return ("DejaVu Sans", "NanumGothic")


def colour(position: int) -> str:
    """The colour of the n-th method, the same in every figure."""
    return PALETTE[position % len(PALETTE)]
