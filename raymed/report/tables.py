"""Tables of methods against metrics: for the terminal, for a README, for a spreadsheet.

`figures[method][metric]` is a figure as in summary.json: {mean, std, n, ci_low, ci_high, ...}, with nan or None for
what is undefined. The best method of a metric is bold and the second underlined, as printed: methods that read the same
are marked the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]

LOWER_IS_BETTER = frozenset({"brier", "ece", "loss"})
LABELS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy_at_0.5": "accuracy@0.5",
    "f1": "F1",
    "brier": "Brier",
    "ece": "ECE",
}
METRICS_PER_BLOCK = 4  # as many as fit beside the methods in 80 columns
COLUMNS = ("mean", "std", "n", "ci_low", "ci_high", "num_patients", "unit", "num_undefined")


def comparison_table(figures: Figures, metrics: Sequence[str], title: str | None = None) -> Group:
    """Mean ± standard deviation over seeds and the confidence interval below it, for `rich.print`.

    More metrics than fit in 80 columns follow as a second block of the same methods.
    """
    marks = {metric: _marks(figures, metric) for metric in metrics}

    def cell(method: str, metric: str) -> str:
        figure = figures[method][metric]
        style = {"best": "[bold]{}[/]", "second": "[underline]{}[/]"}.get(marks[metric].get(method, ""), "{}")
        return f"{style.format(_mean_std(figure))}\n[dim]{_interval(figure)}[/]"

    return _blocks(figures, metrics, [f"{_label(metric)} {_arrow(metric)}" for metric in metrics], cell, title)


def difference_table(differences: Figures, metrics: Sequence[str], title: str | None = None) -> Group:
    """Mean difference from a baseline and its confidence interval; bold where the interval excludes zero."""

    def cell(method: str, metric: str) -> str:
        figure = differences[method][metric]
        excludes_zero = _number(figure["ci_low"]) > 0 or _number(figure["ci_high"]) < 0
        style = "[bold]{}[/]" if excludes_zero else "{}"
        return f"{style.format(_decimal(figure['mean'], '+'))}\n[dim]{_interval(figure, '+')}[/]"

    return _blocks(differences, metrics, [_label(metric) for metric in metrics], cell, title)


def comparison_markdown(figures: Figures, metrics: Sequence[str]) -> str:
    """`comparison_table` as GitHub Markdown."""
    marks = {metric: _marks(figures, metric) for metric in metrics}
    styles = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    header = ["method", *(f"{_label(metric)} {_arrow(metric)}" for metric in metrics)]
    lines = [header, ["---"] + [":-:"] * len(metrics)]
    for method, of_method in figures.items():
        cells = [
            f"{styles[marks[metric].get(method, '')].format(_mean_std(of_method[metric]))}<br>"
            f"<sub>{_interval(of_method[metric])}</sub>"
            for metric in metrics
        ]
        lines.append([f"`{method}`", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comparison_csv(figures: Figures, metrics: Sequence[str]) -> str:
    """One line a method and metric with every number in full; undefined ones are empty."""
    import pandas as pd

    rows = [
        {"method": method, "metric": metric} | {column: of_method[metric].get(column) for column in COLUMNS}
        for method, of_method in figures.items()
        for metric in metrics
    ]
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def _blocks(figures: Figures, metrics: Sequence[str], headers: list[str], cell, title: str | None) -> Group:
    from rich import box
    from rich.console import Group
    from rich.table import Table

    tables = []
    for start in range(0, len(metrics), METRICS_PER_BLOCK):
        block = slice(start, start + METRICS_PER_BLOCK)
        table = Table(box=box.SIMPLE_HEAD, title=None if start else title, title_justify="left", collapse_padding=True)
        table.add_column("method", overflow="fold")
        for header in headers[block]:
            table.add_column(header, justify="center", no_wrap=True)
        for method in figures:
            table.add_row(method, *(cell(method, metric) for metric in metrics[block]))
        tables.append(table)
    return Group(*tables)


def _marks(figures: Figures, metric: str) -> dict[str, str]:
    """{method: "best" | "second"} by the printed mean; nothing is best among fewer than two."""
    means = {method: round(_number(of_method[metric]["mean"]), 3) for method, of_method in figures.items()}
    means = {method: mean for method, mean in means.items() if not math.isnan(mean)}
    ranked = sorted(set(means.values()), reverse=metric not in LOWER_IS_BETTER)
    if len(means) < 2:
        return {}
    return {method: ("best", "second")[ranked.index(mean)] for method, mean in means.items() if mean in ranked[:2]}


def _mean_std(figure: Mapping[str, Any]) -> str:
    std = "" if math.isnan(_number(figure["std"])) else f" ± {_decimal(figure['std'])}"
    return _decimal(figure["mean"]) + std


def _interval(figure: Mapping[str, Any], sign: str = "") -> str:
    separator = ", " if sign else " – "  # a dash between signed numbers reads as a minus
    return f"{_decimal(figure['ci_low'], sign)}{separator}{_decimal(figure['ci_high'], sign)}"


def _decimal(value: float | None, sign: str = "") -> str:
    value = _number(value)
    return "n/a" if math.isnan(value) else f"{value:{sign}.3f}"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _label(metric: str) -> str:
    return LABELS.get(metric, metric)


def _arrow(metric: str) -> str:
    return "↓" if metric in LOWER_IS_BETTER else "↑"
