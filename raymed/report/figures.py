"""Figures of an evaluation: PR and ROC curves, reliability, confusion matrices, differences, class activation maps,
sweeps, training curves.

Curves are given as {name: [(scores (N,), targets (N,)) of each seed]} and their figures as in summary.json,
{name: {metric: {mean, ci_low, ci_high, ...}}}, so that a legend says what the summary says. Paths end in .png.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raymed.report.style import BLUE, GREEN, GREY, VERMILION, colour, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]
Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]

GRID = np.linspace(0, 1, 501)
NUM_BINS = 15  # those of the expected calibration error


def pr_roc(path: Path, curves: Curves, figures: Figures) -> None:
    """Precision-recall and ROC curves, the mean over seeds with a band of one standard deviation.

    figures holds "auprc" and "auroc" of each name. Precision is drawn as the step function whose area is the average
    precision; ROC curves are averaged at equal false positive rate.
    """
    with figure(path, 8, 4.4 + 0.18 * len(curves)) as drawn:
        left, right = drawn.subplots(1, 2)
        zoomed = [_zoomed(axes, figures, metric) for axes, metric in ((left, "auprc"), (right, "auroc"))]
        for position, (name, seeds) in enumerate(curves.items()):
            for axes, inset, curve in ((left, zoomed[0], _precision_at), (right, zoomed[1], _sensitivity_at)):
                drawn_curves = [curve(GRID, *seed) for seed in seeds]
                for panel in (axes, inset) if inset else (axes,):
                    _mean_and_band(panel, drawn_curves, colour(position))
            left.lines[-1].set_label(f"{_with_interval('AP', figures[name]['auprc'])}  {name}")
            right.lines[-1].set_label(f"{_with_interval('AUROC', figures[name]['auroc'])}  {name}")
        prevalence = np.mean([np.mean(targets) for seeds in curves.values() for _, targets in seeds])
        left.axhline(prevalence, color=GREY, linestyle=":", linewidth=1.2)
        at, side = (0.97, "right") if zoomed[0] else (0.02, "left")
        left.text(at, prevalence + 0.01, f"prevalence {prevalence:.2f}", color=GREY, ha=side)
        right.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
        left.set(title="Precision-recall", xlabel="Recall (sensitivity)", ylabel="Precision (PPV)")
        right.set(title="ROC", xlabel="1 - specificity", ylabel="Sensitivity")
        for axes in (left, right):
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), box_aspect=1)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))


def calibration(path: Path, curves: Curves, figures: Figures) -> None:
    """Reliability diagram of each name over 15 equal-width bins, above the number of decisions (cases, images or
    pairs) in each bin.

    Seeds are pooled; counts, and the 95 % Wilson intervals drawn as vertical lines, are those of one seed on average.
    figures holds "ece" of each name.
    """
    num_columns = 4 if len(curves) == 4 else min(3, len(curves))
    num_rows = math.ceil(len(curves) / num_columns)
    width = 8.6 if num_columns == 4 else max(3.6, 2.8 * num_columns)
    with figure(path, width, 3.0 if num_columns == 4 else max(4.2, 3.6 * num_rows)) as drawn:
        grid = drawn.subplots(2 * num_rows, num_columns, height_ratios=[4, 1] * num_rows, squeeze=False, sharex=True)
        panels = list(zip(grid[::2].flat, grid[1::2].flat, strict=True))
        for position, (name, seeds) in enumerate(curves.items()):
            upper, lower = panels[position]
            ece = _with_interval("ECE", figures[name]["ece"]).replace(" [", "\n[")
            _reliability_panel(upper, lower, seeds, colour(position), ece)
            upper.set_title(name)
        for upper, lower in panels[len(curves) :]:
            upper.remove()
            lower.remove()
        for upper, lower in panels[::num_columns]:
            upper.set_ylabel("Observed fraction")
            lower.set_ylabel("Count")
        drawn.supxlabel("Predicted probability of the positive class", fontsize=9)


def confusion(
    path: Path,
    curves: Curves,
    thresholds: Mapping[str, Sequence[float]],
    classes: tuple[str, str] = ("negative", "positive"),
) -> None:
    """Confusion matrix of each name at each seed's own threshold: images, mean ± standard deviation over seeds, and the
    percentage of the row, which is also the shade.

    classes: what targets 0 and 1 are called.
    """
    num_columns = min(4, len(curves))
    num_rows = math.ceil(len(curves) / num_columns)
    with figure(path, max(2.6, 2.1 * num_columns), 2.3 * num_rows + 0.1) as drawn:
        grid = drawn.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
        for axes in list(grid.flat)[len(curves) :]:
            axes.remove()
        for axes, (name, seeds) in zip(grid.flat, curves.items(), strict=False):
            counts = [_confusion(*seed, threshold) for seed, threshold in zip(seeds, thresholds[name], strict=True)]
            _confusion_panel(axes, np.array(counts))
            axes.set(title=name, xticks=[0, 1], yticks=[0, 1])
            axes.set_xticklabels([_shortened(name) for name in classes])
            axes.set_yticklabels([_shortened(name) for name in classes], rotation=90, va="center")
            axes.set(xlabel="Decided", ylabel="True")
            axes.label_outer()


def forest(path: Path, differences: Mapping[str, Figures], label: str) -> None:
    """How much higher a metric is than the baseline's, with its 95 % interval: {panel: {name: {"difference": figure}}}.

    Intervals that exclude zero are filled.
    """
    names = list(dict.fromkeys(name for of_panel in differences.values() for name in of_panel))
    with figure(path, max(4.5, 4 * len(differences)), 1.0 + 0.42 * len(names)) as drawn:
        grid = drawn.subplots(1, len(differences), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (title, of_panel) in zip(grid, differences.items(), strict=True):
            axes.axvline(0, color=GREY, linestyle=":", linewidth=1.2)
            for name, of_name in of_panel.items():
                _difference_line(axes, names.index(name), of_name["difference"])
            axes.set(title=title, yticks=range(len(names)), ylim=(len(names) - 0.4, -0.6), xlabel=label)
            axes.set_yticklabels(names, fontsize=9)
            axes.locator_params(axis="x", nbins=4)  # small differences have long numbers
            axes.grid(axis="y", visible=False)


def cam_panel(
    path: Path,
    images: Sequence[np.ndarray],
    cams: Sequence[np.ndarray],
    titles: Sequence[str],
    sides: Sequence[tuple[str, str] | None],
) -> None:
    """Each image beside itself with its class activation map on top.

    Args:
        images: (H, W) grey or (H, W, 3) colour; grey ones are shown from their lowest to their highest value.
        cams: (H, W) in [0, 1], of the size of their image.
        titles: what to write above each, such as the score.
        sides: (side the map points to, true side), which is marked as correct or incorrect; None: nothing is marked.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    num_columns = 2 if len(images) > 1 else 1
    num_rows = math.ceil(len(images) / num_columns)
    with figure(path, 4 * num_columns + 0.6, 2.2 * num_rows + 0.05) as drawn:
        grid = drawn.subplots(num_rows, 2 * num_columns, squeeze=False)
        pairs = grid.reshape(-1, 2)
        for axes in grid.flat:
            axes.axis("off")
        for (left, right), image, cam, title, side in zip(pairs, images, cams, titles, sides, strict=False):
            left.imshow(image, cmap="gray")
            right.imshow(image, cmap="gray")
            right.imshow(cam, cmap="inferno", vmin=0, vmax=1, alpha=0.65 * cam, interpolation="bilinear")
            left.set_title(title, fontweight="normal", fontsize=9)
            _mark_side(right, side)
        scale = ScalarMappable(Normalize(0, 1), cmap="inferno")
        bar = drawn.colorbar(scale, ax=grid, shrink=0.9 / num_rows, fraction=0.03, pad=0.01, ticks=[0, 1])
        bar.set_label("activation (per image)", labelpad=-4)


def training_curves(path: Path, history: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> None:
    """One panel for each key of history, with its lines {name: [(step, value), ...]}.

    A line of more than 100 points is drawn faintly under its running mean.
    """
    num_columns = min(3, len(history))
    num_rows = math.ceil(len(history) / num_columns)
    names = list(dict.fromkeys(name for lines in history.values() for name in lines))
    with figure(path, max(4.0, 2.9 * num_columns), 2.4 * num_rows + 0.35) as drawn:
        grid = drawn.subplots(num_rows, num_columns, squeeze=False)
        for axes in list(grid.flat)[len(history) :]:
            axes.remove()
        handles = {}
        for axes, (title, lines) in zip(grid.flat, history.items(), strict=False):
            for name, points in lines.items():
                handles[name] = _training_line(axes, points, colour(names.index(name)))
            axes.set(title=title, xlabel="Step")
        drawn.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=max(1, len(handles)))


def _zoomed(axes: Axes, figures: Figures, metric: str) -> Axes | None:
    """An inset of the corner where the curves of good classifiers crowd; None where they are not that good."""
    if not all((of_method[metric]["mean"] or 0) > 0.94 for of_method in figures.values()):
        return None
    corner = (0.8, 1.005) if metric == "auprc" else (-0.005, 0.2)
    inset = axes.inset_axes((0.08 if metric == "auprc" else 0.4, 0.1, 0.5, 0.45), xlim=corner, ylim=(0.8, 1.005))
    inset.tick_params(labelsize=7)
    inset.set_xticks([0.8, 0.9, 1.0] if metric == "auprc" else [0.0, 0.1, 0.2])
    inset.set_yticks([0.8, 0.9, 1.0])
    for connector in axes.indicate_inset_zoom(inset, edgecolor=GREY, linewidth=0.8).connectors or ():
        connector.set_visible(False)
    return inset


def _precision_at(recall: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Precision at the highest threshold that reaches each recall."""
    from sklearn.metrics import precision_recall_curve

    precisions, recalls, _ = precision_recall_curve(targets, scores)
    precisions, recalls = precisions[-2::-1], recalls[-2::-1]  # recall ascending, without the added point at recall 0
    return precisions[np.minimum(np.searchsorted(recalls, recall), len(recalls) - 1)]


def _sensitivity_at(false_positive_rate: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(targets, scores)
    return np.append(0.0, np.interp(false_positive_rate[1:], fpr, tpr))


def _mean_and_band(axes: Axes, curves: list[np.ndarray], color: str) -> None:
    mean, std = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=min(1, len(curves) - 1))
    axes.fill_between(GRID, np.clip(mean - std, 0, 1), np.clip(mean + std, 0, 1), color=color, alpha=0.15, linewidth=0)
    axes.plot(GRID, mean, color=color)


def _reliability_panel(
    upper: Axes, lower: Axes, seeds: Sequence[tuple[np.ndarray, np.ndarray]], color: str, told: str
) -> None:
    """told: a text of two lines, which stands below the diagonal, or above it where the curve runs through there."""
    count, score, observed = _reliability(seeds)
    count, seen = count / len(seeds), count > 0
    low, high = _wilson(observed[seen], count[seen])
    upper.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
    upper.vlines(score[seen], low, high, color=color, alpha=0.45, linewidth=1)
    upper.plot(score[seen], observed[seen], color=color, marker="o", markersize=3.5)
    upper.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    is_taken = bool(((score[seen] > 0.4) & (observed[seen] < 0.25)).any())
    place: dict[str, Any] = {"ha": "left", "va": "top"} if is_taken else {"ha": "right", "va": "bottom"}
    upper.text(*((0.02, 0.98) if is_taken else (0.99, 0.02)), told, fontsize=8, linespacing=1.3, **place)
    lower.bar((np.arange(NUM_BINS) + 0.5) / NUM_BINS, count, 0.9 / NUM_BINS, color=color)
    lower.set(yscale="log", ylim=(0.3, 2 * count.max()))
    lower.yaxis.set_major_formatter("{x:g}")
    lower.yaxis.set_minor_formatter("")


def _reliability(seeds: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean score and fraction of positives of each bin, seeds pooled; 0 in an empty bin."""
    scores, targets = (np.concatenate(arrays) for arrays in zip(*seeds, strict=True))
    bins = np.minimum((scores * NUM_BINS).astype(int), NUM_BINS - 1)
    count, score, positive = (np.bincount(bins, weights, NUM_BINS) for weights in (None, scores, targets))
    return count, score / np.maximum(count, 1), positive / np.maximum(count, 1)


def _wilson(fraction: np.ndarray, count: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % score interval of a fraction observed in `count` of them (J. Am. Stat. Assoc. 22, 1927)."""
    centre = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(fraction * (1 - fraction) / count + (z / (2 * count)) ** 2)
    return centre - half, centre + half


def _confusion(scores: np.ndarray, targets: np.ndarray, threshold: float) -> np.ndarray:
    """(2, 2) counts, target by decision."""
    cell = 2 * np.asarray(targets, int) + (np.asarray(scores) >= threshold)
    return np.bincount(cell, minlength=4).reshape(2, 2)


def _confusion_panel(axes: Axes, counts: np.ndarray) -> None:
    """counts: (S, 2, 2)."""
    mean = counts.mean(axis=0)
    share = mean / np.maximum(mean.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1.25)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for true, decided in np.ndindex(2, 2):
        color = "white" if share[true, decided] > 0.65 else "black"
        spread = f" ± {counts[:, true, decided].std(ddof=1):.1f}" if len(counts) > 1 else ""
        said = f"{mean[true, decided]:.{0 if len(counts) == 1 else 1}f}{spread}"
        axes.text(decided, true - 0.08, f"{100 * share[true, decided]:.1f} %", ha="center", color=color, fontsize=11)
        axes.text(decided, true + 0.2, said, ha="center", color=color, fontsize=7.5)


def _difference_line(axes: Axes, position: int, of_metric: Mapping[str, Any]) -> None:
    mean, low, high = _numbers(of_metric)
    excludes_zero = low > 0 or high < 0
    axes.plot([low, high], [position, position], color=BLUE, linewidth=2)
    face = BLUE if excludes_zero else "white"
    axes.plot(mean, position, "o", color=BLUE, markerfacecolor=face, markeredgewidth=1.5, markersize=7)
    text = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.annotate(
        text, ((low + high) / 2, position), (0, 6), textcoords="offset points", ha="center", fontsize=8, bbox=box
    )


def _shortened(text: str, length: int = 14) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _numbers(of_metric: Mapping[str, Any]) -> tuple[float, float, float]:
    """Mean and interval, nan where undefined."""
    mean, low, high = (math.nan if of_metric[key] is None else of_metric[key] for key in ("mean", "ci_low", "ci_high"))
    return mean, low, high


def _with_interval(name: str, of_metric: Mapping[str, Any]) -> str:
    mean, low, high = _numbers(of_metric)
    return f"{name} {mean:.3f} [{low:.3f}, {high:.3f}]"


def _mark_side(axes: Axes, side: tuple[str, str] | None) -> None:
    if side is None:
        return
    pointed, true = side
    mark, color = ("✓", GREEN) if pointed == true else ("✗", VERMILION)
    axes.set_title(f"{mark} map: {pointed}, true: {true}", color=color, fontsize=9)


def _training_line(axes: Axes, points: Sequence[tuple[int, float]], color: str):
    steps, values = np.asarray(points, float).T
    if len(points) <= 100:
        return axes.plot(steps, values, color=color, marker="o" if len(points) <= 20 else None, markersize=3)[0]
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    window = len(points) // 25
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    return axes.plot(steps[(window - 1) // 2 : len(steps) - window // 2], mean, color=color)[0]
