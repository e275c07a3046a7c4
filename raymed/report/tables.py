"""Tables of methods against metrics: for the terminal, for a README, for a page, for a spreadsheet.

`figures[method][metric]` is a figure as in summary.json: {mean, std, n, ci_low, ci_high, ...}, with nan or None for
what is undefined. The best method of a metric is bold and the second underlined, as printed: methods that read the same
are marked the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from raymed.report.page import Cell, Table

if TYPE_CHECKING:
    from rich.console import Group

Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]

LOWER_IS_BETTER = frozenset({"brier", "ece", "loss", "lr_negative"})
MARKS: tuple[Literal["best"], Literal["second"]] = ("best", "second")
UNRANKED = frozenset({"chance", "concept_count"})
"""Described, not judged: neither more nor less of it is better."""
RETRIEVAL = {
    f"{direction}_recall_{k}": f"{words} R@{k}"
    for direction, words in (("i2t", "image→text"), ("t2i", "text→image"))
    for k in (1, 5, 10)
} | {"mean_recall": "mean recall"}
LABELS = RETRIEVAL | {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy_at_0.5": "accuracy@0.5",
    "f1": "F1",
    "brier": "Brier",
    "ece": "ECE",
    "box_alignment": "box alignment",
    "chance": "by chance",
    "concept_count": "concept count",
}
METRICS_PER_BLOCK = 4  # as many as fit beside the methods in 80 columns
_WIDE = 15  # characters of a label, from which on one fewer fits
COLUMNS = ("mean", "std", "n", "ci_low", "ci_high", "num_patients", "unit", "num_undefined")


def comparison_table(figures: Figures, metrics: Sequence[str], title: str | None = None) -> Group:
    """Mean ± standard deviation over seeds and the confidence interval below it, for `rich.print`.

    More metrics than fit in 80 columns follow as a second block of the same methods.
    """
    marks = {metric: _marks(figures, metric) for metric in metrics}

    def cell(method: str, metric: str) -> str:
        figure = figures[method][metric]
        style = {"best": "[bold]{}[/]", "second": "[underline]{}[/]"}.get(marks[metric].get(method, ""), "{}")
        return f"{style.format(mean_std(figure))}\n[dim]{interval(figure)}[/]"

    return _blocks(figures, metrics, [f"{label(metric)} {_arrow(metric)}" for metric in metrics], cell, title)


def difference_table(differences: Figures, metrics: Sequence[str], title: str | None = None) -> Group:
    """Mean difference from a baseline and its confidence interval; bold where the interval excludes zero."""

    def cell(method: str, metric: str) -> str:
        figure = differences[method][metric]
        excludes_zero = number(figure["ci_low"]) > 0 or number(figure["ci_high"]) < 0
        style = "[bold]{}[/]" if excludes_zero else "{}"
        return f"{style.format(decimal(figure['mean'], '+'))}\n[dim]{interval(figure, '+')}[/]"

    return _blocks(differences, metrics, [label(metric) for metric in metrics], cell, title)


def comparison_markdown(figures: Figures, metrics: Sequence[str]) -> str:
    """`comparison_table` as GitHub Markdown."""
    marks = {metric: _marks(figures, metric) for metric in metrics}
    styles = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    header = ["method", *(f"{label(metric)} {_arrow(metric)}" for metric in metrics)]
    lines = [header, ["---"] + [":-:"] * len(metrics)]
    for method, of_method in figures.items():
        cells = [
            f"{styles[marks[metric].get(method, '')].format(mean_std(of_method[metric]))}<br>"
            f"<sub>{interval(of_method[metric])}</sub>"
            for metric in metrics
        ]
        lines.append([f"`{method}`", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comparison_page(
    figures: Figures, metrics: Sequence[str], caption: str = "", notes: Mapping[str, str] | None = None
) -> Table:
    """`comparison_table` for a page; notes: method -> what stands below its name."""
    marks = {metric: _marks(figures, metric) for metric in metrics}

    def cell(method: str, metric: str) -> Cell:
        figure = figures[method][metric]
        return Cell(mean_std(figure), interval(figure), marks[metric].get(method, ""))

    rows = [
        [Cell(method, (notes or {}).get(method, "")), *(cell(method, metric) for metric in metrics)]
        for method in figures
    ]
    return Table(["", *(f"{label(name)} {_arrow(name)}".strip() for name in metrics)], rows, caption)


def comparison_csv(figures: Figures, metrics: Sequence[str]) -> str:
    """One line a method and metric with every number in full; undefined ones are empty."""
    return _csv(_rows(figures, metrics))


def split_csv(figures: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]], metrics: Sequence[str]) -> str:
    """`comparison_csv` of figures[method][split][metric], with the split as its first column."""
    splits = list(dict.fromkeys(split for of_method in figures.values() for split in of_method))
    of_split = {split: {method: of_method[split] for method, of_method in figures.items()} for split in splits}
    return _csv([{"split": split} | row for split in splits for row in _rows(of_split[split], metrics)])


def _rows(figures: Figures, metrics: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"method": method, "metric": metric} | {column: of_method[metric].get(column) for column in COLUMNS}
        for method, of_method in figures.items()
        for metric in metrics
    ]


def _csv(rows: list[dict[str, Any]]) -> str:
    import pandas as pd

    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def _blocks(figures: Figures, metrics: Sequence[str], headers: list[str], cell, title: str | None) -> Group:
    from rich import box
    from rich.console import Group
    from rich.table import Table

    tables = []
    per_block = METRICS_PER_BLOCK - (max(map(len, headers), default=0) > _WIDE)
    for start in range(0, len(metrics), per_block):
        block = slice(start, start + per_block)
        table = Table(box=box.SIMPLE_HEAD, title=None if start else title, title_justify="left", collapse_padding=True)
        table.add_column("method", overflow="fold")
        for header in headers[block]:
            table.add_column(header, justify="center", no_wrap=True)
        for method in figures:
            table.add_row(method, *(cell(method, metric) for metric in metrics[block]))
        tables.append(table)
    return Group(*tables)


def _marks(figures: Figures, metric: str) -> dict[str, Literal["best", "second"]]:
    """{method: "best" | "second"} by the printed mean; nothing is best among fewer than two."""
    means = {method: round(number(of_method[metric]["mean"]), 3) for method, of_method in figures.items()}
    means = {method: mean for method, mean in means.items() if not math.isnan(mean)}
    ranked = sorted(set(means.values()), reverse=metric not in LOWER_IS_BETTER)
    if len(means) < 2 or metric in UNRANKED:
        return {}
    of_mean = dict(zip(ranked, MARKS, strict=False))
    return {method: of_mean[mean] for method, mean in means.items() if mean in of_mean}


def mean_std(figure: Mapping[str, Any]) -> str:
    """0.950 ± 0.010, without the deviation where it is undefined."""
    digits = _digits(figure["mean"])
    std = "" if math.isnan(number(figure["std"])) else f" ± {number(figure['std']):.{digits}f}"
    return decimal(figure["mean"]) + std


def _digits(value: float | None) -> int:
    return 3 if not abs(number(value)) >= 10 else 1


def interval(figure: Mapping[str, Any], sign: str = "") -> str:
    """0.930 – 0.970, or with sign="+": -0.003, +0.020."""
    separator = ", " if sign else " – "  # a dash between signed numbers reads as a minus
    return f"{decimal(figure['ci_low'], sign)}{separator}{decimal(figure['ci_high'], sign)}"


def decimal(value: float | None, sign: str = "") -> str:
    """Three decimals, one from 10 upwards; "n/a" where undefined."""
    value = number(value)
    return "n/a" if math.isnan(value) else f"{value:{sign}.{_digits(value)}f}"


def number(value: float | None) -> float:
    """nan for None, which is how a file says that a number is undefined."""
    return math.nan if value is None else float(value)


def label(metric: str) -> str:
    """A metric as it is printed."""
    return LABELS.get(metric, metric)


def _arrow(metric: str) -> str:
    if metric in UNRANKED:
        return ""
    return "↓" if metric in LOWER_IS_BETTER else "↑"
