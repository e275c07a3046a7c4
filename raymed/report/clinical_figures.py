"""Figures of a clinical evaluation: ROC and PR curves with readers and operating point, calibration, decision curve,
subgroups, predictive values against prevalence.

Figures of metrics are as in summary.json, {mean, ci_low, ci_high, ...}, None or nan where undefined. Nothing is
estimated here but the curves that are drawn. Paths end in .png.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raymed.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, figure
from raymed.report.tables import decimal, interval, label, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figure = Mapping[str, Any]
"""mean, ci_low, ci_high of a metric; of decisions also analytic_low, analytic_high and method ("Wilson", "log")."""

Subgroup = Mapping[str, Any]
"""attribute, group, num, num_positive, and auroc, sensitivity, specificity: a figure or None."""

FOREST = {"auroc": "AUROC", "sensitivity": "Sensitivity", "specificity": "Specificity"}
_READERS = "^vsDPX"
_PREVALENCES = np.linspace(0, 1, 501)
_BINS = np.linspace(0, 1, 21)
_LONGEST = 26  # characters of a subgroup's name


@dataclass(frozen=True)
class Level:
    """What was found where each row is an image, a case, ...

    Scores are probabilities of the positive class, the threshold is on their scale: a row is decided positive when
    score >= threshold. In a cross-validation each fold has a threshold, and several repeats have figures together:
    scores and targets are then those of one repeat.
    """

    name: str  # "image", "case+side", "case", "patient"
    scores: np.ndarray  # (N,)
    targets: np.ndarray  # (N,) of {0, 1}
    threshold: float  # nan where rows have thresholds of their own
    figures: Mapping[str, Figure]  # metric -> figure, with an interval by patient; means over the repeats
    num_patients: int | None = None
    thresholds: np.ndarray | None = None  # (N,) by which each row was decided, where they differ
    num_repeats: int = 1
    own: Mapping[str, Figure] = field(default_factory=dict)  # of these very scores, where there are several repeats

    @property
    def unit(self) -> str:
        """What a row is called: "case"."""
        return self.name.split("+")[-1]

    @property
    def num_positive(self) -> int:
        """Rows of the positive class."""
        return int(np.sum(self.targets == 1))

    @property
    def has_both_classes(self) -> bool:
        """Whether there is anything to tell apart."""
        return 0 < self.num_positive < len(self.targets)

    @property
    def decided(self) -> np.ndarray:
        """(N,) bool."""
        return np.asarray(self.scores) >= (self.threshold if self.thresholds is None else self.thresholds)

    @property
    def drawn(self) -> Mapping[str, Figure]:
        """Figures of what is drawn: `own` where `figures` are means over repeats."""
        return self.own or self.figures


@dataclass(frozen=True)
class CalibrationCurve:
    """Rows grouped by their probability, and figures such as "calibration_slope"."""

    bins: Sequence[Mapping[str, Any]]  # mean_score, fraction of positives, its analytic_low and analytic_high
    figures: Mapping[str, Figure] = field(default_factory=dict)
    scores: np.ndarray | None = None  # (N,) the probabilities that were grouped; None = those of the level


def roc_pr(path: Path, levels: Sequence[Level], readers: Mapping[str, Mapping[str, Figure]]) -> None:
    """ROC and PR curves of each level, the first one foremost, with the operating point and the readers' points.

    readers: name -> "sensitivity", "specificity"; their intervals are drawn as a cross.
    """
    with figure(path, 8.4, 4.6 + 0.2 * max(len(levels) + len(readers) - 2, 0)) as drawn:
        roc, pr = drawn.subplots(1, 2)
        for level, (color, width) in zip(levels, ((BLUE, 2.0), (GREY, 1.2)), strict=False):
            _draw_curves(roc, pr, level, color, width)
        for marker, (name, of_reader) in zip(_READERS * len(readers), readers.items(), strict=False):
            _draw_reader(roc, name, of_reader, marker)
        roc.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
        roc.set(title="ROC", xlabel="1 − specificity", ylabel="Sensitivity")
        pr.axhline(levels[0].targets.mean(), color=GREY, linestyle=":", linewidth=1)
        pr.set(title="Precision-recall", xlabel="Sensitivity (recall)", ylabel="PPV (precision)")
        for axes in (roc, pr):
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), borderaxespad=0)  # curves may lie anywhere


def calibration_curve(path: Path, curves: Mapping[str, CalibrationCurve], level: Level) -> None:
    """Observed fraction against predicted probability with Wilson intervals; below, the scores of both classes.

    curves: such as "before" and "after" recalibration. The histogram is of the last one's scores.
    """
    last = list(curves.values())[-1].scores
    scores = level.scores if last is None else last
    with figure(path, 5.4, 5.6) as drawn:
        upper, lower = drawn.subplots(2, 1, height_ratios=[4, 1], sharex=True)
        upper.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
        for (name, curve), color in zip(curves.items(), _last_foremost(len(curves)), strict=True):
            _draw_calibration(upper, name, curve, color)
        upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="Observed fraction of positives")
        upper.legend(loc="lower right")
        for target, sign, color, name in ((1, 1, VERMILION, "positive"), (0, -1, SKY, "negative")):
            counts, _ = np.histogram(scores[level.targets == target], _BINS)
            lower.bar(_BINS[:-1], sign * counts, np.diff(_BINS) * 0.9, align="edge", color=color, label=name)
        lower.axhline(0, color="black", linewidth=0.6)
        lower.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        lower.set(xlabel="Predicted probability of the positive class", ylabel=f"{level.unit.capitalize()}s")
        lower.legend(loc="best", ncols=2, fontsize=7)


def decision_curve(path: Path, curve: Mapping[str, np.ndarray], threshold: float) -> None:
    """Net benefit of deciding by the model, of treating all, and of treating none, against the threshold probability.

    curve: (T,) arrays thresholds, model, model_low, model_high, treat_all, and gain_low: the lower end of the interval
    of how much the model is above both others. Where that is above 0 a bar is drawn. A line marks the operating point,
    unless that is nan: folds have several.
    """
    at, model = curve["thresholds"], curve["model"]
    highest = max(np.nanmax(model), curve["treat_all"][0], 0.01)
    bottom = -0.25 * highest
    with figure(path, 6.2, 4.0) as drawn:
        axes = drawn.subplots()
        axes.fill_between(at, curve["model_low"], curve["model_high"], color=BLUE, alpha=0.15, linewidth=0)
        axes.plot(at, curve["treat_all"], color=ORANGE, linewidth=1.2, label="treat all")
        axes.axhline(0, color="black", linewidth=1, label="treat none")
        axes.plot(at, model, color=BLUE, label="model")
        if not math.isnan(threshold):
            axes.axvline(threshold, color=GREY, linestyle=":", linewidth=1.2, label="operating point")
        if (better := curve["gain_low"] > 0).any():
            line = np.where(better, 0.92 * bottom, np.nan)
            axes.plot(at, line, color=GREEN, linewidth=4, solid_capstyle="butt", label="model above both")
        axes.set(xlim=(at[0], at[-1]), ylim=(bottom, 1.08 * max(highest, np.nanmax(curve["model_high"]))))
        axes.set(xlabel="Threshold probability", ylabel="Net benefit")
        axes.legend(loc="upper right")


def subgroup_forest(path: Path, subgroups: Sequence[Subgroup], overall: Subgroup) -> None:
    """AUROC, sensitivity and specificity of each subgroup with 95 % intervals, below those of all.

    A dotted line marks the value of all. A figure that is None reads "too few".
    """
    lines: list[tuple[str, Subgroup | None]] = [(_line_name(overall), overall)]
    for attribute in dict.fromkeys(str(group["attribute"]) for group in subgroups):
        of_attribute = [group for group in subgroups if group["attribute"] == attribute]
        lines += [(_shortened(attribute), None), *((_line_name(group), group) for group in of_attribute)]
    with figure(path, 9.9, 0.9 + 0.3 * len(lines)) as drawn:
        panels = drawn.subplots(1, len(FOREST), sharey=True)
        for axes, (metric, title) in zip(panels, FOREST.items(), strict=True):
            axes.axvline(number(overall[metric]["mean"]), color=GREY, linestyle=":", linewidth=1.2)
            for position, (_, group) in enumerate(lines):
                if group is not None:
                    _forest_line(axes, position, group[metric], BLUE if position else "black")
            axes.set(title=title, xlim=_forest_limits([group[metric] for _, group in lines if group]))
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        panels[0].set(yticks=range(len(lines)), ylim=(len(lines) - 0.4, -0.6))
        panels[0].set_yticklabels([name for name, _ in lines])
        for text, (_, group) in zip(panels[0].get_yticklabels(), lines, strict=True):
            text.set_fontweight("bold" if group is None else "normal")


def predictive_values(
    path: Path,
    sensitivity: float,
    specificity: float,
    studied: float,
    stated: Mapping[float, Mapping[str, Figure]],
) -> None:
    """PPV and NPV against prevalence by Bayes' theorem, with those of stated prevalences and their intervals.

    studied: prevalence among the cases evaluated. stated: prevalence -> "ppv", "npv".
    """
    with figure(path, 5.6, 3.8) as drawn:
        axes = drawn.subplots()
        for name, values, color in zip(
            ("ppv", "npv"), bayes(sensitivity, specificity, _PREVALENCES), (VERMILION, BLUE), strict=True
        ):
            axes.plot(_PREVALENCES, values, color=color, label=name.upper())
            for prevalence, of_prevalence in stated.items():
                _point_with_interval(axes, prevalence, of_prevalence[name], color)
        axes.axvline(studied, color=GREY, linestyle=":", linewidth=1.2, label=f"these cases, {studied:.2f}")
        axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="Prevalence", ylabel="Predictive value")
        axes.legend(loc="lower center")


def bayes(sensitivity: float, specificity: float, prevalence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PPV and NPV (P,) at each prevalence (P,) in [0, 1]; nan where nobody is decided so.

    PPV = Se p / (Se p + (1 - Sp) (1 - p)), NPV = Sp (1 - p) / (Sp (1 - p) + (1 - Se) p).
    """
    p = np.asarray(prevalence, float)
    true_positive, false_positive = sensitivity * p, (1 - specificity) * (1 - p)
    true_negative, false_negative = specificity * (1 - p), (1 - sensitivity) * p
    with np.errstate(invalid="ignore"):
        return true_positive / (true_positive + false_positive), true_negative / (true_negative + false_negative)


def widest(of_metric: Figure) -> Figure:
    """The figure with its analytic interval where rows are independent, otherwise with the wider end of its two at each
    side: at 0 and 1 no resample of a bootstrap differs, and the analytic interval takes rows of one patient for
    independent."""
    if of_metric.get("independent"):
        return {**of_metric, "ci_low": of_metric["analytic_low"], "ci_high": of_metric["analytic_high"]}
    lows = [number(of_metric[end]) for end in ("ci_low", "analytic_low") if end in of_metric]
    highs = [number(of_metric[end]) for end in ("ci_high", "analytic_high") if end in of_metric]
    return {**of_metric, "ci_low": min(lows), "ci_high": max(highs)}


def operating_point(level: Level) -> tuple[float, float, float]:
    """Sensitivity, specificity and PPV at the threshold; nan where undefined."""
    positive = level.targets == 1

    def fraction(what: np.ndarray, of: np.ndarray) -> float:
        return float(what[of].mean()) if of.any() else math.nan

    return fraction(level.decided, positive), fraction(~level.decided, ~positive), fraction(positive, level.decided)


def precision_steps(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall ascending from 0, and the precision that holds from the recall before up to each: average precision is the
    area below it."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(targets, scores)
    precision, recall = precision[::-1], recall[::-1]
    gains = np.flatnonzero(np.diff(recall)) + 1
    return np.append(0.0, recall[gains]), np.append(precision[gains[0]], precision[gains])


def _draw_curves(roc: Axes, pr: Axes, level: Level, color: str, width: float) -> None:
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(level.targets, level.scores, drop_intermediate=False)
    roc.plot(fpr, tpr, color=color, linewidth=width, label=_legend(level, "auroc"))
    recall, precision = precision_steps(level.scores, level.targets)
    pr.step(recall, precision, where="pre", color=color, linewidth=width, label=_legend(level, "auprc"))
    sensitivity, specificity, ppv = operating_point(level)
    for axes, x, y in ((roc, 1 - specificity, sensitivity), (pr, sensitivity, ppv)):
        axes.plot(x, y, "o", color=color, markeredgecolor="black", markersize=4 + 2 * width, zorder=4)


def _legend(level: Level, metric: str) -> str:
    of_metric = level.drawn.get(metric)
    value = "" if of_metric is None else f", {label(metric)} {decimal(of_metric['mean'])} [{interval(of_metric)}]"
    return f"{level.unit}s{value}"


def _draw_reader(axes: Axes, name: str, of_reader: Mapping[str, Figure], marker: str) -> None:
    sensitivity, specificity = widest(of_reader["sensitivity"]), widest(of_reader["specificity"])
    x, y = 1 - number(specificity["mean"]), number(sensitivity["mean"])
    axes.plot(x, y, marker, color=PURPLE, markeredgecolor="black", markersize=7, zorder=5, label=name)
    across = [1 - number(specificity[end]) for end in ("ci_low", "ci_high")]
    along = [number(sensitivity[end]) for end in ("ci_low", "ci_high")]
    axes.plot(across, [y, y], color=PURPLE, linewidth=0.9, alpha=0.7)
    axes.plot([x, x], along, color=PURPLE, linewidth=0.9, alpha=0.7)


def _draw_calibration(axes: Axes, name: str, curve: CalibrationCurve, color: str) -> None:
    slope = curve.figures.get("calibration_slope")
    said = name if slope is None else f"{name}, slope {decimal(slope['mean'])} [{interval(slope)}]"
    names = ("mean_score", "fraction", "analytic_low", "analytic_high")
    predicted, observed, low, high = (np.array([of_bin[name] for of_bin in curve.bins]) for name in names)
    axes.vlines(predicted, low, high, color=color, alpha=0.45, linewidth=1.2)
    axes.plot(predicted, observed, "o-", color=color, markersize=4, label=said)


def _last_foremost(num_curves: int) -> list[str]:
    """What a calibration ended as is blue, where it started is grey."""
    return ([GREY, ORANGE, GREEN, PURPLE] * num_curves)[: num_curves - 1] + [BLUE]


def _forest_line(axes: Axes, position: int, of_metric: Figure | None, color: str) -> None:
    if of_metric is None:
        axes.text(0.5, position, "too few", transform=axes.get_yaxis_transform(), color=GREY, style="italic",
                  ha="center", va="center", fontsize=8)  # fmt: skip
        return
    shown = widest(of_metric)
    axes.plot([number(shown["ci_low"]), number(shown["ci_high"])], [position] * 2, color=color, linewidth=1.8)
    axes.plot(number(shown["mean"]), position, "s", color=color, markersize=5)


def _forest_limits(figures: Sequence[Figure | None]) -> tuple[float, float]:
    """From below the lowest interval to 1."""
    lows = [number(widest(of)["ci_low"]) for of in figures if of is not None]
    return max(0.0, min((low for low in lows if not math.isnan(low)), default=0.0) - 0.05) - 0.01, 1.02


def _line_name(group: Subgroup) -> str:
    return f"{_shortened(str(group['group']))} ({group['num']}, {group['num_positive']} positive)"


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _point_with_interval(axes: Axes, x: float, of_metric: Figure, color: str) -> None:
    shown = widest(of_metric)
    axes.plot([x, x], [number(shown["ci_low"]), number(shown["ci_high"])], color=color, linewidth=1.2)
    axes.plot(x, number(of_metric["mean"]), "o", color=color, markersize=5, markeredgecolor="black")
