"""Figures of an embedding of images and texts: similarities, retrieval curves, nearest neighbours, findings, and what a
cosine is worth as a probability.

Figures of metrics are those of summary.json, {name: {metric: {mean, ci_low, ci_high, ...}}}. Paths end in .png.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raymed.report.style import BLUE, GREEN, GREY, ORANGE, VERMILION, colour, figure
from raymed.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]

_DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
_LINES = 4  # of a caption in a panel


@dataclass(frozen=True)
class TextQuery:
    """A caption and its nearest images, nearest first."""

    caption: str
    images: Sequence[np.ndarray]  # (H, W) grey or (H, W, 3) colour
    hits: Sequence[bool]  # which of them belong to the caption
    cosines: Sequence[float]


@dataclass(frozen=True)
class ImageQuery:
    """An image and its nearest captions, nearest first."""

    image: np.ndarray  # (H, W) grey or (H, W, 3) colour
    captions: Sequence[str]
    hits: Sequence[bool]  # which of them belong to the image
    cosines: Sequence[float]


def similarity_matrix(path: Path, similarity: np.ndarray, related: np.ndarray) -> None:
    """Cosines of n images (rows) and the n texts written for them, in the same order.

    The nearest text of every image is marked: a ring where it belongs to the image, a cross where it does not.

    Args:
        similarity: (n, n) cosines. related: (n, n) bool, which texts belong to which image.
    """
    from matplotlib.lines import Line2D

    nearest = similarity.argmax(axis=1)
    rows = np.arange(len(nearest))
    right = related[rows, nearest]
    with figure(path, 5.4, 4.6) as drawn:
        axes = drawn.subplots()
        shown = axes.imshow(similarity, cmap="Blues")
        size = 4200 / len(nearest)
        axes.scatter(nearest[right], rows[right], s=0.35 * size, facecolors="none", edgecolors="white", linewidths=1.2)
        axes.scatter(nearest[~right], rows[~right], s=0.5 * size, marker="x", color=VERMILION, linewidths=1.8)
        axes.grid(visible=False)
        axes.set(xlabel="Text", ylabel="Image", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        drawn.colorbar(shown, ax=axes, pad=0.02, fraction=0.045).set_label("cosine")
        marks = [
            Line2D([], [], marker="o", linestyle="", color="none", markeredgecolor=GREY),
            Line2D([], [], marker="x", linestyle="", color=VERMILION, markeredgewidth=1.8),
        ]
        drawn.legend(marks, ["nearest text, right", "nearest text, wrong"], loc="outside upper center", ncols=2)


def retrieval_curves(path: Path, figures: Figures, num_items: int) -> None:
    """R@k against k in both directions, with 95 % bands, and what chance finds.

    figures holds i2t_recall_K and t2i_recall_K of each name, for as many K as are to be drawn.
    """
    from matplotlib.ticker import NullLocator

    with figure(path, 8, 3.5 + 0.16 * len(figures)) as drawn:
        grid = drawn.subplots(1, 2, sharey=True)
        for axes, (direction, title) in zip(grid, _DIRECTIONS.items(), strict=True):
            ticks: set[int] = set()
            for position, (name, of_method) in enumerate(figures.items()):
                at = sorted(
                    int(metric.split("_")[-1]) for metric in of_method if metric.startswith(f"{direction}_recall")
                )
                values = [of_method[f"{direction}_recall_{k}"] for k in at]
                mean, low, high = ([number(value[key]) for value in values] for key in ("mean", "ci_low", "ci_high"))
                axes.fill_between(at, low, high, color=colour(position), alpha=0.18, linewidth=0)
                axes.plot(at, mean, color=colour(position), marker="o", markersize=3.5, label=name)
                ticks |= set(at)
            every = np.array(sorted(ticks))
            axes.plot(every, np.minimum(1, every / num_items), color=GREY, linestyle=":", linewidth=1.2, label="chance")
            axes.set(title=title[:1].upper() + title[1:], xscale="log", xlabel="k", ylim=(-0.02, 1.02))
            axes.set_xticks(every, [str(k) for k in every])
            axes.xaxis.set_minor_locator(NullLocator())
        grid[0].set_ylabel("R@k")
        drawn.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(figures) + 1))


def nearest_images(path: Path, queries: Sequence[TextQuery]) -> None:
    """Each caption beside its nearest images, framed in green where the image belongs to it."""
    num_images = max(len(query.images) for query in queries)
    with figure(path, 2.6 + 1.15 * num_images, 1.45 * len(queries) + 0.1) as drawn:
        grid = drawn.subplots(len(queries), num_images + 1, squeeze=False, width_ratios=[2.3] + [1] * num_images)
        for row, query in zip(grid, queries, strict=True):
            row[0].text(0, 0.5, _wrapped(query.caption, 36), va="center", fontsize=8, linespacing=1.35)
            for axes in row:
                _bare(axes)
            found = zip(query.images, query.hits, query.cosines, strict=True)
            for axes, (image, hit, cosine) in zip(row[1:], found, strict=False):
                axes.imshow(image, cmap="gray")
                _frame(axes, GREEN if hit else VERMILION)
                axes.set_xlabel(_said(hit, cosine), color=GREEN if hit else VERMILION, fontsize=8, labelpad=2)


def nearest_captions(path: Path, queries: Sequence[ImageQuery]) -> None:
    """Each image beside its nearest captions, in green where the caption belongs to it."""
    num_captions = max(len(query.captions) for query in queries)
    with figure(path, 8, (0.35 * num_captions + 0.15) * len(queries) + 0.1) as drawn:
        grid = drawn.subplots(len(queries), 2, squeeze=False, width_ratios=[1, 5])
        for (left, right), query in zip(grid, queries, strict=True):
            left.imshow(query.image, cmap="gray")
            _bare(left)
            _bare(right)
            found = zip(query.captions, query.hits, query.cosines, strict=True)
            for position, (caption, hit, cosine) in enumerate(found):
                at = 1 - (position + 0.5) / num_captions
                text_colour = GREEN if hit else VERMILION
                right.text(0, at, _said(hit, cosine), va="center", fontsize=8, color=text_colour)
                right.text(0.11, at, _wrapped(caption, 100, lines=2), va="center", fontsize=8, linespacing=1.15)


def finding_dots(
    path: Path, figures: Mapping[str, Mapping[str, Any]], label: str = "AUROC", chance: float | None = 0.5
) -> None:
    """A line of dots a row: {row: {method: figure}}, each with its 95 % interval. None is drawn where undefined."""
    methods = list(dict.fromkeys(method for of_row in figures.values() for method in of_row))
    offsets = dict(zip(methods, 0.2 * (np.arange(len(methods)) - (len(methods) - 1) / 2), strict=True))
    with figure(path, 6.4, 1.0 + (0.16 + 0.14 * len(methods)) * len(figures)) as drawn:
        axes = drawn.subplots()
        if chance is not None:
            axes.axvline(chance, color=GREY, linestyle=":", linewidth=1.2)
        for position, of_row in enumerate(figures.values()):
            for method, of_method in of_row.items():
                at, shade = position + offsets[method], colour(methods.index(method))
                low, high = number(of_method["ci_low"]), number(of_method["ci_high"])
                axes.plot([low, high], [at, at], color=shade, linewidth=1.6, alpha=0.6)
                axes.plot(number(of_method["mean"]), at, "o", color=shade, markersize=4.5, label=method)
        axes.set(xlabel=label, yticks=range(len(figures)), ylim=(len(figures) - 0.45, -0.55))
        axes.set_yticklabels(list(figures), fontsize=8.5)
        axes.grid(axis="y", visible=False)
        entries = {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        drawn.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=max(1, len(entries)))


def similarity_histogram(
    path: Path, cosines: np.ndarray, targets: np.ndarray, curve: tuple[np.ndarray, np.ndarray] | None = None
) -> None:
    """How cosines of matched (target 1) and random pairs (0) are spread, and the probability that is read off them.

    curve: (cosines, probabilities) of the calibration, drawn on an axis of its own.
    """
    edges = np.histogram_bin_edges(cosines, bins=40).tolist()
    with figure(path, 5.6, 3.3) as drawn:
        axes = drawn.subplots()
        for target, color, label in ((0, GREY, "random pairs"), (1, BLUE, "matched pairs")):
            axes.hist(cosines[targets == target], edges, color=color, alpha=0.55, label=label)
        axes.set(xlabel="Cosine of image and text", ylabel="Pairs", xlim=(edges[0], edges[-1]))
        if curve is not None:
            right = axes.twinx()
            right.plot(*curve, color=ORANGE, label="calibrated probability")
            right.set(ylim=(-0.02, 1.02), ylabel="Probability of belonging together")
            right.grid(visible=False)
            right.spines["right"].set_visible(True)
            right.legend(loc="lower center", bbox_to_anchor=(0.78, 1.0))
        axes.legend(loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=2)


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _frame(axes: Axes, color: str) -> None:
    axes.spines[:].set(visible=True, color=color, linewidth=2.4)


def _said(hit: bool, cosine: float) -> str:
    return f"{'✓' if hit else '✗'} {cosine:.2f}"


def _wrapped(text: str, width: int, lines: int = _LINES) -> str:
    """The text in so many lines; what is longer ends in an ellipsis. Dollar signs are no formulas."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")).replace("$", r"\$")
