"""The figures of a paper but for the flow: discrimination, calibration, decision curve, subgroups.

Each is drawn from what the record holds and written as PDF and SVG (`canvas`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raymed.report.paper.canvas import ONE_COLUMN, TWO_COLUMNS, journal_figure, letter
from raymed.report.paper.flow import draw_flow
from raymed.report.paper.record import Curve, Figures, PaperRecord, Subgroup
from raymed.report.paper.table import Estimate
from raymed.report.paper.tables import TOO_FEW, label, named
from raymed.report.style import BLUE, GREY, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOREST = ("auroc", "sensitivity", "specificity")
MARKERS = "osD^vP*X"
_LEGEND_LINE = 3.7  # mm, of a legend below its panel


def draw_figures(folder: Path, record: PaperRecord) -> list[str]:
    """Draw those for which there are facts; their names, which are those of the files without ending."""
    curves = record.curves
    drawn = {
        "figure_flow": (draw_flow, record.flow or record.cohort),
        "figure_discrimination": (_discrimination, curves.roc or curves.precision_recall),
        "figure_calibration": (_calibration, curves.calibration),
        "figure_decision_curve": (_decision_curve, curves.decision),
        "figure_subgroups": (_subgroups, _forest_metrics(record.subgroups)),
    }
    for name, (draw, facts) in drawn.items():
        if facts:
            draw(folder / name, record)
    return [name for name, (_, facts) in drawn.items() if facts]


def _discrimination(stem: Path, record: PaperRecord) -> None:
    """ROC with the operating point and the readers, beside precision-recall; one alone takes one column."""
    curves = record.curves
    panels = [draw for draw, there in ((_roc, curves.roc), (_precision_recall, curves.precision_recall)) if there]
    lines = max(len(curves.roc) + 1 + len(record.readers), len(curves.precision_recall))
    with journal_figure(stem, TWO_COLUMNS if len(panels) == 2 else ONE_COLUMN, 92 + _LEGEND_LINE * lines) as drawn:
        grid = np.atleast_1d(drawn.subplots(1, len(panels)))
        for axes, draw, name in zip(grid, panels, "ab", strict=False):
            draw(axes, record)
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), box_aspect=1, anchor="N")
            if len(panels) > 1:
                letter(axes, name)


def _roc(axes: Axes, record: PaperRecord) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=0.8)
    _lines(axes, record.curves.roc, record.performance, "auroc")
    headline = next(iter(record.performance.values()), {})
    if {"sensitivity", "specificity"} <= headline.keys():
        _point(axes, headline, "o", BLUE, "Operating point")
    for position, (reader, figures) in enumerate(record.readers.items()):
        if {"sensitivity", "specificity"} <= figures.keys():
            _point(axes, figures, MARKERS[1 + position % (len(MARKERS) - 1)], "black", reader)
    axes.set(xlabel="1 − specificity", ylabel="Sensitivity")
    _legend_below(axes)


def _point(axes: Axes, figures: Figures, marker: str, color: str, name: str) -> None:
    """A pair of sensitivity and specificity with the intervals of both."""
    x, y = 1 - figures["specificity"]["mean"], figures["sensitivity"]["mean"]
    if "ci_low" in figures["specificity"] and "ci_low" in figures["sensitivity"]:
        spans = [1 - figures["specificity"][bound] for bound in ("ci_high", "ci_low")]
        axes.plot(spans, [y, y], color=color, linewidth=0.6, alpha=0.5)
        axes.plot(
            [x, x], [figures["sensitivity"][bound] for bound in ("ci_low", "ci_high")], color=color, lw=0.6, alpha=0.5
        )
    axes.plot(
        x, y, marker, color=color, markerfacecolor="white", markersize=4, markeredgewidth=0.9, label=name, clip_on=False
    )


def _precision_recall(axes: Axes, record: PaperRecord) -> None:
    _lines(axes, record.curves.precision_recall, record.performance, "auprc")
    if record.confusion:
        c = record.confusion
        prevalence = (c.tp + c.fn) / (c.tp + c.fn + c.fp + c.tn)
        axes.axhline(prevalence, color=GREY, linestyle=":", linewidth=0.8)
        axes.annotate(
            f"prevalence {prevalence:.2f}", (0.02, prevalence), (0, 2), textcoords="offset points", color=GREY
        )
    axes.set(xlabel="Recall (sensitivity)", ylabel="Precision (PPV)")
    _legend_below(axes)


def _legend_below(axes: Axes) -> None:
    """Below the axis: a curve may run through any corner of the panel."""
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.13), borderaxespad=0, borderpad=0)


def _lines(axes: Axes, curves: Mapping[str, Curve], performance: Mapping[str, Figures], metric: str) -> None:
    """Curves with their bands; the legend tells the area that `performance` has under the curve's name."""
    for position, (name, curve) in enumerate(curves.items()):
        figure = performance.get(name, {}).get(metric)
        text = name if figure is None else f"{name}: {label(metric).split(' ')[0]} {Estimate(figure)}"
        _line(axes, curve, colour(position), text)


def _line(axes: Axes, curve: Curve, color: str, text: str, **style) -> None:
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
    axes.plot(curve.x, curve.y, color=color, label=text, **style)


def _calibration(stem: Path, record: PaperRecord) -> None:
    with journal_figure(stem, ONE_COLUMN, 88) as drawn:
        axes = drawn.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=0.8, label="Ideal")
        for position, (name, curve) in enumerate(record.curves.calibration.items()):
            _line(axes, curve, colour(position), name, marker="o", markersize=2.5)
        axes.set(xlabel="Predicted probability", ylabel="Observed fraction", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axes.set_box_aspect(1)
        axes.legend(loc="upper left")


def _decision_curve(stem: Path, record: PaperRecord) -> None:
    """Net benefit, from a little below zero: the line of "treat all" falls without end."""
    with journal_figure(stem, ONE_COLUMN, 70) as drawn:
        axes = drawn.subplots()
        plain = {"Treat all": {"linestyle": "--"}, "Treat none": {"linestyle": "-"}}
        own = [name for name in record.curves.decision if name not in plain]
        for name, curve in record.curves.decision.items():
            color = GREY if name in plain else colour(own.index(name))
            _line(axes, curve, color, name, **plain.get(name, {}))
        highest = max(0.05, *(np.nanmax(curve.high or curve.y) for curve in record.curves.decision.values()))
        axes.set(xlabel="Threshold probability", ylabel="Net benefit", ylim=(-0.15 * highest, 1.25 * highest))
        axes.legend(loc="upper right")


def _subgroups(stem: Path, record: PaperRecord) -> None:
    """Up to three figures of every subgroup side by side, with their numbers."""
    metrics, groups = _forest_metrics(record.subgroups), record.subgroups
    rows, headings = _places(groups)
    height = 16 + 4.2 * (max(rows) + 1)
    with journal_figure(stem, TWO_COLUMNS, height) as drawn:
        grid = drawn.subplots(1, len(metrics) + 1, sharey=True, width_ratios=[1.15, *[1] * len(metrics)])
        names, *panels = np.atleast_1d(grid)
        _forest_names(names, groups, rows, headings, record.unit)
        for axes, metric in zip(panels, metrics, strict=True):
            _forest_panel(axes, groups, rows, metric, record.performance)
        names.set_ylim(max(rows) + 0.7, -1.9)


def _forest_metrics(groups) -> list[str]:
    return [metric for metric in FOREST if any(metric in group.figures for group in groups)]


def _places(groups) -> tuple[list[int], dict[int, str]]:
    """The line of each subgroup, and the headings of attributes on lines of their own."""
    rows: list[int] = []
    headings: dict[int, str] = {}
    line, attribute = -1, None
    for group in groups:
        if group.attribute != attribute:
            attribute, line = group.attribute, line + 1
            headings[line] = named(attribute)
        line += 1
        rows.append(line)
    return rows, headings


def _forest_names(axes: Axes, groups, rows: list[int], headings: dict[int, str], unit: str) -> None:
    axes.set(xlim=(0, 1), xticks=[])
    axes.grid(visible=False)
    axes.tick_params(left=False, labelleft=False)
    axes.spines[:].set_visible(False)
    axes.text(0, -1.3, "Subgroup", fontweight="bold", va="center")
    axes.text(1, -1.3, f"{unit.capitalize()}s (positive)", fontweight="bold", va="center", ha="right")
    for row, heading in headings.items():
        axes.text(0, row, heading, fontweight="bold", va="center")
    for row, group in zip(rows, groups, strict=True):
        axes.text(0.05, row, group.value or "not recorded", va="center")
        axes.text(1, row, f"{group.num} ({group.num_positive})", va="center", ha="right")


def _forest_panel(axes: Axes, groups, rows: list[int], metric: str, performance: Mapping[str, Figures]) -> None:
    overall = next(iter(performance.values()), {}).get(metric)
    if overall is not None:
        axes.axvline(overall["mean"], color=GREY, linestyle=":", linewidth=0.8)
    for row, group in zip(rows, groups, strict=True):
        _forest_line(axes, row, group, metric)
    axes.set_title(label(metric), loc="center", fontweight="bold")
    axes.tick_params(left=False, labelleft=False)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(-0.02, 1.02), xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=["0", "0.25", "0.5", "0.75", "1"])


def _forest_line(axes: Axes, row: int, group: Subgroup, metric: str) -> None:
    figure = group.figures.get(metric)
    if figure is None:
        axes.text(0.5, row, TOO_FEW, color=GREY, va="center", ha="center", fontstyle="italic")
        return
    axes.plot([figure["ci_low"], figure["ci_high"]], [row, row], color=BLUE, linewidth=0.9)
    axes.plot(figure["mean"], row, "s", color=BLUE, markersize=3)
