"""A table of a paper, written as CSV, LaTeX (booktabs) and Word.

A cell holds its numbers, not their text. CSV has every number in full, each in a column of its own; LaTeX and Word have
what is printed, "0.912 (0.871 to 0.948)".
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymed.report.paper.record import Spread
from raymed.report.tables import decimal, number


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval."""

    figure: Mapping[str, Any]

    def __str__(self) -> str:
        low, high = self.figure.get("ci_low"), self.figure.get("ci_high")
        if low is None or high is None:
            return decimal(self.figure["mean"])
        return f"{decimal(self.figure['mean'])} ({decimal(low)} to {decimal(high)})"

    @property
    def numbers(self) -> dict[str, Any]:
        """Ending of the CSV column -> number."""
        return {"": self.figure["mean"], "CI low": self.figure.get("ci_low"), "CI high": self.figure.get("ci_high")}


@dataclass(frozen=True)
class Share:
    """A count among a total."""

    count: int
    total: int

    @property
    def percent(self) -> float:
        """Of the total; nan of nothing."""
        return 100 * self.count / self.total if self.total else float("nan")

    def __str__(self) -> str:
        return f"{self.count} ({self.percent:.1f} %)" if self.total else str(self.count)

    @property
    def numbers(self) -> dict[str, Any]:
        """As `Estimate.numbers`."""
        return {"": self.count, "%": self.percent}


@dataclass(frozen=True)
class Mean:
    """A quantity's mean ± standard deviation and range."""

    spread: Spread

    def __str__(self) -> str:
        s = self.spread
        deviation = "" if s.num < 2 else f" ± {s.std:.1f}"
        return f"{s.mean:.1f}{deviation} ({s.low:g} to {s.high:g})"

    @property
    def numbers(self) -> dict[str, Any]:
        """As `Estimate.numbers`."""
        s = self.spread
        return {"": s.mean, "SD": s.std, "lowest": s.low, "highest": s.high}


Cell = Estimate | Share | Mean | int | str | None


@dataclass(frozen=True)
class Row:
    """A line of a table; lines of one `group` stand together below its name."""

    name: str
    cells: Sequence[Cell]
    group: str = ""


@dataclass(frozen=True)
class PaperTable:
    """A table; `name` is that of its files and of its label in LaTeX."""

    name: str
    title: str
    columns: Sequence[str]
    """The first is that of the rows' names."""
    rows: Sequence[Row]
    notes: str = ""


def printed(cell: Cell) -> str:
    """A cell as it is read; a dash where there is nothing."""
    return "–" if cell is None or cell == "" else str(cell)


def to_csv(table: PaperTable) -> str:
    """UTF-8 text with a byte order mark, without which Excel takes Hangul for another encoding."""
    endings = [_endings([row.cells[i] for row in table.rows]) for i in range(len(table.columns) - 1)]
    header = [
        f"{column} {ending}".strip() for column, of in zip(table.columns[1:], endings, strict=True) for ending in of
    ]
    grouped = any(row.group for row in table.rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(["group"] if grouped else []), table.columns[0], *header])
    for row in table.rows:
        values = [_numbers(cell).get(e, "") for cell, of in zip(row.cells, endings, strict=True) for e in of]
        writer.writerow([*([row.group] if grouped else []), row.name, *map(_exact, values)])
    return "\ufeff" + text.getvalue()


def to_latex(table: PaperTable) -> str:
    """A `table` environment for \\input; needs the package booktabs, and kotex (with XeLaTeX) where there is Hangul."""
    width = len(table.columns)
    lines: list[str] = []
    for row, heading in with_headings(table.rows):
        if heading:
            lines.append(rf"\multicolumn{{{width}}}{{l}}{{{escaped(heading)}}} \\")
        name = (r"\quad " if row.group else "") + escaped(row.name)
        lines.append(" & ".join([name, *(escaped(printed(cell)) for cell in row.cells)]) + r" \\")
    text = "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption{{{escaped(table.title)}}}",
            rf"\label{{tab:{table.name.removeprefix('table_')}}}",
            r"\begin{tabular}{" + "l" + "r" * (width - 1) + "}",
            r"\toprule",
            " & ".join(map(escaped, table.columns)) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            *([rf"\par\smallskip\footnotesize {escaped(table.notes)}"] if table.notes else []),
            r"\end{table}",
            "",
        ]
    )
    needs = "% \\usepackage{booktabs}" + " and, for Hangul, \\usepackage{kotex} under XeLaTeX" * _has_hangul(text)
    return f"{needs}\n{text}"


def with_headings(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """Each row with the heading that stands above it, "" for most."""
    before = ["", *(row.group for row in rows)]
    return [(row, row.group if row.group != above else "") for row, above in zip(rows, before, strict=False)]


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "−": "$-$",
    "–": "--",
    "—": "---",
    "°": r"$^\circ$",
}


def escaped(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(_LATEX.get(character, character) for character in text)


def _numbers(cell: Cell) -> dict[str, Any]:
    return cell.numbers if isinstance(cell, Estimate | Share | Mean) else {"": cell}


def _endings(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(ending for cell in cells for ending in _numbers(cell))) or [""]


def _exact(value: Any) -> str:
    """A number in full; nothing where it is undefined."""
    if isinstance(value, float):
        return "" if number(value) != number(value) else repr(value)
    return "" if value is None else str(value)


def _has_hangul(text: str) -> bool:
    return any("HANGUL" in unicodedata.name(character, "") for character in text)
