"""Figures of a data sheet: flow of exclusions, cases by class, tiles of images and of pairs. Paths end in .png."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raymed.report.style import GREY, VERMILION, colour, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 8
_INK, _PALE, _RULE = "#1A1D21", "#F3F5F7", "#C9CED4"
_WIDTH, _TILES = 8.6, 10.6  # of the flow and of rows of tiles, in inches
_STEP = 0.56  # from one exclusion to the next
_GAP, _APART, _LINE = 0.05, 0.2, 1.24  # of a tile: between two, between pairs, and from one row to the next


def flow(path: Path, steps: Sequence[tuple[str, int]], parts: Mapping[str, str]) -> None:
    """From what was found, past what was left out, to the parts that the rest is divided into.

    Args:
        steps: (text, number): what was found, each reason to leave some out, what remains.
        parts: what a part is called -> what it holds.
    """
    found, *left_out, used = steps
    bottom = -(0.5 + _STEP * len(left_out) + 0.75)  # top of the box of what is used
    with figure(path, _WIDTH, 2.1 - bottom) as drawn:
        axes = drawn.subplots()
        _blank(axes)
        axes.set(xlim=(0, _WIDTH), ylim=(bottom - 2.0, 0.1))
        middle = _WIDTH / 2
        _line(axes, (middle, -0.5), (middle, bottom), arrow=True)
        for position, (reason, num) in enumerate(left_out):
            y = -(0.5 + _STEP * (position + 0.7))
            _line(axes, (middle, y), (middle + 0.6, y), arrow=True)
            said = f"{reason} (n\u00a0=\u00a0{num:,})"
            text = "\n".join(textwrap.wrap(_plain(said), 48, max_lines=2, placeholder=" …"))
            axes.text(middle + 0.68, y, text, va="center", color=_INK)
        _box(axes, middle, -0.25, f"{found[0]}\n{found[1]:,}", GREY)
        _box(axes, middle, bottom - 0.25, f"{used[0]}\n{used[1]:,}", GREY)
        fork = bottom - 0.8
        _line(axes, (middle, bottom - 0.5), (middle, fork))
        for position, (name, held) in enumerate(parts.items()):
            x = middle + 2.8 * (position - (len(parts) - 1) / 2)
            _line(axes, (middle, fork), (x, fork))
            _line(axes, (x, fork), (x, fork - 0.3), arrow=True)
            _box(axes, x, fork - 0.62, f"{name}\n{held}", colour(position), height=0.64)


def composition(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, int]]], what: str) -> None:
    """Stacked bars of cases: {panel: {value: {class: number}}}, all with the same classes.

    what: is counted, "cases".
    """
    classes = list(next(bar for panel in panels.values() for bar in panel.values()))
    longest = max(len(panel) for panel in panels.values())
    with figure(path, min(8.6, 1.4 + 2.4 * len(panels)), 1.0 + 0.27 * max(3, longest)) as drawn:
        for axes, (title, panel) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            start = np.zeros(len(panel))
            for position, name in enumerate(classes):
                values = np.array([bar[name] for bar in panel.values()])
                axes.barh(range(len(panel)), values, 0.72, start, color=colour(position), label=_plain(name))
                start += values
            axes.set(title=title, xlabel=what, ylim=(max(3, len(panel)) - 0.4, -0.6), xlim=(0, 1.04 * start.max()))
            axes.set_yticks(range(len(panel)), [_plain(_shortened(value)) for value in panel])
            axes.grid(axis="y", visible=False)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.locator_params(axis="x", nbins=4)
        handles, labels = axes.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside upper center", ncols=min(5, len(classes)))


def tiles(
    path: Path, images: Sequence[np.ndarray], titles: Sequence[str], num_marked: int = 0, together: int = 1
) -> None:
    """Images side by side in rows of eight, each above its title.

    Args:
        images: (H, W) or (H, W, 3) in [0, 1], all of one size.
        num_marked: the titles of so many, from the first, are marked by their colour.
        together: so many stand close together: 2 for pairs.
    """
    from matplotlib.patches import Rectangle

    num_rows = math.ceil(len(images) / COLUMNS)
    width = COLUMNS + (COLUMNS - 1) * _GAP + (COLUMNS // together - 1) * _APART * (together > 1)
    with figure(path, _TILES, _TILES / width * num_rows * _LINE) as drawn:
        axes = drawn.subplots()
        _blank(axes)
        for position, (image, title) in enumerate(zip(images, titles, strict=True)):
            column, y = position % COLUMNS, position // COLUMNS * _LINE
            x = column * (1 + _GAP) + column // together * _APART * (together > 1)
            axes.imshow(image, "gray", vmin=0, vmax=1, extent=(x, x + 1, y + 1, y), interpolation="antialiased")
            axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=_RULE, linewidth=0.6))
            ink = VERMILION if position < num_marked else _INK
            axes.text(x + 0.5, y + 1.11, title, ha="center", va="center", fontsize=7, color=ink)
        axes.set(xlim=(0, width), ylim=(num_rows * _LINE, 0), aspect="equal")


def _blank(axes: Axes) -> None:
    axes.set_axis_off()
    axes.grid(visible=False)


def _box(axes: Axes, x: float, y: float, text: str, color: str, height: float = 0.5) -> None:
    """A box of 2.4 inches around its middle."""
    from matplotlib.patches import FancyBboxPatch

    corner = (x - 1.2, y - height / 2)
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch(corner, 2.4, height, boxstyle=style, facecolor=_PALE, edgecolor=color, linewidth=1.2))
    axes.text(x, y, _plain(text), ha="center", va="center", color=_INK, linespacing=1.35)


def _line(axes: Axes, start: tuple[float, float], end: tuple[float, float], arrow: bool = False) -> None:
    style = {"arrowstyle": "-|>" if arrow else "-", "color": GREY, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def _shortened(text: str, length: int = 26) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _plain(text: str) -> str:
    """Dollar signs are no formulas."""
    return text.replace("$", r"\$")
