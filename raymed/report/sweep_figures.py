"""Figures of a sweep: its history, the sensitivity to each hyper-parameter, parallel coordinates.

A finished trial's value is the metric at the last evaluation; a stopped one's is that of the rung where it was cut.
The two are not comparable, so stopped trials are drawn hollow and grey and enter no curve, colour or importance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raymed.report.axis import Axis
from raymed.report.style import BLUE, GREY, ORANGE, VERMILION, figure
from raymed.report.sweep_record import Space, Trial, finished, per_seed, short_names, stopped
from raymed.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BANDWIDTH = 0.1  # of the range of a hyper-parameter: a local mean over about a quarter of it
GRID = np.linspace(0, 1, 101)

Marked = Mapping[int, tuple[str, str]]
"""Trial number -> (label, marker) of those to point out: the baseline and the chosen one."""


def history(
    path: Path, trials: Sequence[Trial], objective: str, mode: str, generation: int | None, marked: Marked
) -> None:
    """Value of each trial in the order of their numbers with the best so far, and every trial's rungs.

    generation: trials suggested at a time, None for one by one.
    """
    view = _View.of(trials)
    with figure(path, 8, 3.6) as drawn:
        left, right = drawn.subplots(1, 2)
        _history_panel(left, trials, view, mode)
        _rung_panel(right, trials)
        last = len(trials) - 0.5
        for start in np.arange(generation or 0, last, generation) - 0.5 if generation else []:
            left.axvline(start, color=GREY, linestyle=":", linewidth=0.9)
        by_number = {trial["number"]: trial for trial in finished(trials)}
        for trial_number, (label, marker) in marked.items():
            if trial := by_number.get(trial_number):
                _mark(left, trial_number, number(trial["value"]), label, marker)
        left.set(title="By trial", xlabel="Trial", ylabel=objective, xlim=(-0.02 * last - 1, last + 0.02 * last + 0.5))
        right.set(title="By evaluation", xlabel="Evaluation")
        left.set_ylim(*view.limits)
        _legend(drawn, left)


def sensitivity(
    path: Path, trials: Sequence[Trial], space: Space, objective: str, marked: Marked, num_seeds: int
) -> None:
    """The value of every trial against each hyper-parameter of the space, one panel each.

    Large dots are trials (mean over seeds), small ones their seeds. The line is a local mean over finished trials
    (Gaussian weights of standard deviation 0.1 of the axis), computed seed by seed: its band is one standard deviation
    over seeds. It is drawn where at least two trials' weight lies. A choice has the mean of each option instead.
    """
    names = short_names(list(space))
    num_columns = min(3, len(space))
    num_rows = math.ceil(len(space) / num_columns)
    view = _View.of(trials)
    with figure(path, max(4.4, 2.7 * num_columns), 2.5 * num_rows + 0.5) as drawn:
        grid = drawn.subplots(num_rows, num_columns, squeeze=False, sharey=True)
        for axes in list(grid.flat)[len(space) :]:
            axes.remove()
        for axes, (name, dimension) in zip(grid.flat, space.items(), strict=False):
            axis = Axis(dimension, [trial["params"][name] for trial in trials])
            _sensitivity_panel(axes, trials, name, axis, view, marked)
            done = finished(trials)
            _trend(axes, axis, axis.place([t["params"][name] for t in done]), per_seed(done, num_seeds))
            axes.set(xlabel=names[name], xlim=(-0.04, 1.04), ylim=view.limits)
            axes.set_xticks(*axis.ticks())
            axes.grid(axis="x", visible=not axis.options)
        for row in grid:
            row[0].set_ylabel(objective)
        _legend(drawn, grid[0, 0])


def parallel(path: Path, trials: Sequence[Trial], space: Space, objective: str, mode: str, marked: Marked) -> None:
    """Parallel coordinates: a line a trial, coloured by value. Stopped trials are grey and end before the value."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    names, done = short_names(list(space)), finished(trials)
    values = np.array([number(trial["value"]) for trial in done])
    view = _View(values, values)
    low, high = view.limits
    bright_is_good = "viridis" if mode == "max" else "viridis_r"
    scale = ScalarMappable(Normalize(low, high), cmap=bright_is_good)
    with figure(path, 8, 3.8) as drawn:
        axes = drawn.subplots()
        lines = []
        for position, (name, dimension) in enumerate(space.items()):
            axis = Axis(dimension, [trial["params"][name] for trial in trials])
            lines.append(axis.place([trial["params"][name] for trial in trials], spread=0.3))
            _upright(axes, position, names[name], axis)
        for line, trial in zip(np.array(lines).T, trials, strict=True):
            if trial in done:
                value = float(view.place(np.array([trial["value"]]))[0][0])
                color = scale.to_rgba(np.array([value]))[0]
                line = [*line, (value - low) / (high - low)]
                _parallel_line(axes, line, color, marked.get(trial["number"]))
            else:
                axes.plot(line, color="#C9C9C9", linewidth=0.6, zorder=1)
        axes.axvline(len(space), color="black", linewidth=0.8)
        axes.text(len(space), 1.04, "value", ha="center", fontsize=9)
        axes.set(xlim=(-0.3, len(space) + 0.05), ylim=(0, 1), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        drawn.colorbar(scale, ax=axes, pad=0.015, fraction=0.04).set_label(objective)
        _legend(drawn, axes)


_RUNG_STYLE: dict[str, dict[str, Any]] = {
    "finished": {"color": BLUE, "linewidth": 0.9, "alpha": 0.7, "zorder": 2},
    "stopped": {"color": "#A8A8A8", "linewidth": 0.7, "alpha": 0.6, "zorder": 1.5},
}
_MARK_COLOUR = {"D": "black", "*": VERMILION}


class _View:
    """The part of the value axis that is shown: outliers, such as diverged trials, would flatten everything else.

    It reaches at most three interquartile ranges of `core` beyond its quartiles. What lies outside is put on the edge.
    """

    def __init__(self, core: np.ndarray, values: np.ndarray):
        first, third = np.quantile(core, [0.25, 0.75])
        reach = 3 * max(third - first, 1e-3)
        inside = values[(values >= first - reach) & (values <= third + reach)]
        low, high = float(inside.min()), float(inside.max())
        margin = 0.07 * max(high - low, 1e-3)
        self.limits = low - margin, high + margin

    @classmethod
    def of(cls, trials: Sequence[Trial]) -> _View:
        """For the values of trials, and those of the seeds of finished ones."""
        done = finished(trials)
        seeds = [number(value) for trial in done for value in trial["per_seed"]]
        core = [number(trial["value"]) for trial in done]
        return cls(np.array(core), np.array(core + seeds + [number(trial["value"]) for trial in stopped(trials)]))

    def place(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values moved into the limits, and which of them were outside."""
        low, high = self.limits
        edge = 0.02 * (high - low)
        placed = np.clip(values, low + edge, high - edge)
        return placed, placed != values


def _history_panel(axes: Axes, trials: Sequence[Trial], view: _View, mode: str) -> None:
    done, cut = finished(trials), stopped(trials)
    _dots(axes, [t["number"] for t in cut], [number(t["value"]) for t in cut], view, hollow=True)
    _dots(axes, [t["number"] for t in done], [number(t["value"]) for t in done], view)
    seeds = {t["number"]: [number(value) for value in t["per_seed"]] for t in done if t["per_seed"]}
    axes.vlines(
        list(seeds), [*map(min, seeds.values())], [*map(max, seeds.values())], color=BLUE, alpha=0.3, linewidth=1
    )
    in_order = sorted(done, key=lambda trial: trial["number"])
    best = (np.maximum if mode == "max" else np.minimum).accumulate([number(trial["value"]) for trial in in_order])
    axes.step([trial["number"] for trial in in_order], best, where="post", color=ORANGE, label="best finished so far")
    failed = [trial["number"] for trial in trials if trial["status"] == "failed"]
    if failed:
        at_edge, _ = view.place(np.full(len(failed), -np.inf if mode == "max" else np.inf))
        axes.scatter(failed, at_edge, marker="x", s=22, color=VERMILION, label="failed", zorder=4)


def _rung_panel(axes: Axes, trials: Sequence[Trial]) -> None:
    from matplotlib.ticker import MaxNLocator

    values = np.array([number(value) for trial in trials for value in trial["rungs"].values()])
    values = values[np.isfinite(values)]
    for trial in trials:
        rungs = sorted((int(reached), number(value)) for reached, value in trial["rungs"].items())
        style = _RUNG_STYLE["finished" if trial["status"] == "finished" else "stopped"]
        axes.plot(*zip(*rungs, strict=True) if rungs else ((), ()), marker="o", markersize=2.5, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(values):
        axes.set_ylim(*_View(values, values).limits)


def _sensitivity_panel(axes: Axes, trials: Sequence[Trial], name: str, axis: Axis, view: _View, marked: Marked) -> None:
    cut, done = stopped(trials), finished(trials)
    at_cut, at = (axis.place([trial["params"][name] for trial in group], spread=0.44) for group in (cut, done))
    _dots(axes, at_cut, [number(trial["value"]) for trial in cut], view, hollow=True)
    _dots(axes, at, [number(trial["value"]) for trial in done], view)
    seeds = [(x, number(value)) for x, trial in zip(at, done, strict=True) for value in trial["per_seed"]]
    around, values = np.array(seeds).reshape(-1, 2).T
    axes.scatter(around, view.place(values)[0], s=5, color=BLUE, alpha=0.22, linewidths=0)
    for x, trial in zip(at, done, strict=True):
        if trial["number"] in marked:
            value, _ = view.place(np.array([number(trial["value"])]))
            _mark(axes, float(x), float(value[0]), *marked[trial["number"]])


def _trend(axes: Axes, axis: Axis, at: np.ndarray, values: np.ndarray) -> None:
    """Local mean, or mean of each option, of values (T, S) at positions (T,), with a band over seeds."""
    known = np.isfinite(at) & np.isfinite(values).all(axis=1)
    at, values = at[known], values[known]
    if axis.options:
        for position in np.unique(at):
            ends = position + np.array([-0.32, 0.32]) / len(axis.options)
            _band(axes, ends, np.tile(values[at == position].mean(axis=0), (2, 1)))
    elif len(at) >= 2:
        _band(axes, GRID, local_mean(at, values))


def local_mean(at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(101, S): means of values (T, S) at positions (T,) in [0, 1] around each point of GRID, with Gaussian weights.

    nan outside the positions, and where less than the weight of two trials lies.
    """
    weights = np.exp(-0.5 * ((GRID[:, None] - at) / BANDWIDTH) ** 2)
    shown = (weights.sum(axis=1) >= 2) & (GRID >= at.min() - 1e-9) & (GRID <= at.max() + 1e-9)
    return np.where(shown[:, None], weights @ values / weights.sum(axis=1, keepdims=True), np.nan)


def _band(axes: Axes, at: np.ndarray, curves: np.ndarray) -> None:
    """Mean over seeds of curves (X, S), with a band of one standard deviation."""
    mean = curves.mean(axis=1)
    if curves.shape[1] > 1:
        std = curves.std(axis=1, ddof=1)
        label = "± 1 s.d. over seeds"
        axes.fill_between(at, mean - std, mean + std, color=ORANGE, alpha=0.28, linewidth=0, zorder=2.5, label=label)
    axes.plot(at, mean, color=ORANGE, linewidth=2.2, zorder=2.8, label="local mean, finished trials")


def _dots(axes: Axes, at: Any, values: Sequence[float], view: _View, hollow: bool = False) -> None:
    placed, outside = view.place(np.asarray(values, float))
    at = np.asarray(at, float)
    face, edge, size = ("none", "#9A9A9A", 13) if hollow else (BLUE, "white", 22)
    label = "stopped at a rung" if hollow else "finished"
    style = {"s": size, "facecolors": face, "edgecolors": edge, "linewidths": 0.7, "zorder": 2 if hollow else 3}
    if len(at):
        axes.scatter(at[~outside], placed[~outside], label=label, **style)
        axes.scatter(at[outside], placed[outside], marker="v", **style)


def _mark(axes: Axes, at: float, value: float, label: str, marker: str) -> None:
    size = 130 if marker == "*" else 42
    color = _MARK_COLOUR[marker]
    axes.scatter([at], [value], marker=marker, s=size, color=color, edgecolors="white", label=label, zorder=6)


def _legend(drawn: Any, axes: Axes) -> None:
    """One entry a label, above the panels."""
    entries = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=min(6, max(1, len(entries))))


def _parallel_line(axes: Axes, line: list[float], color: Any, marked: tuple[str, str] | None) -> None:
    if marked is None:
        axes.plot(line, color=color, linewidth=1.3, alpha=0.85, zorder=2)
        return
    axes.plot(line, color="white", linewidth=3.6, zorder=4)
    axes.plot(line, color=_MARK_COLOUR[marked[1]], linewidth=1.9, zorder=5)
    _mark(axes, len(line) - 1, line[-1], *marked)


def _upright(axes: Axes, position: int, name: str, axis: Axis) -> None:
    """An axis of parallel coordinates."""
    axes.axvline(position, color="black", linewidth=0.8, zorder=5.5)
    axes.text(position, 1.04, name, ha="center", fontsize=9)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    for at, text in zip(*axis.ticks(), strict=True):
        axes.plot([position - 0.025, position], [at, at], color="black", linewidth=0.8, zorder=5.5)
        axes.text(position - 0.045, at, text, ha="right", va="center", fontsize=7.5, zorder=7, bbox=box)
