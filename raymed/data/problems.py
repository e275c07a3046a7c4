"""What is wrong with which row, and what follows: an error that lists it all, or rows left out and counted."""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from raymed.config import UserError

_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One row of the manifest that cannot be used."""

    row: int
    """Number of the data row in the file, from 1."""
    kind: str
    """What it is counted under, e.g. "unreadable image"."""
    text: str
    """The reason, for the user's own eyes."""


def settle(
    table: pd.DataFrame, problems: Iterable[Problem], on_problem: str, notes: list[str], advice: str = ""
) -> pd.DataFrame:
    """The table (with a column `row`) without the rows that have a problem.

    Args:
        on_problem: "error": any problem raises. "skip": what is left out goes to `notes`, counted by kind.
        advice: another way out, for the message.

    Raises:
        UserError: there is a problem and it is not to be skipped, or nothing is left.
    """
    problems = sorted(problems, key=lambda problem: problem.row)
    if not problems:
        return table
    rows = {problem.row for problem in problems}
    if on_problem == "error":
        lines = [f"  row {problem.row}: {problem.text}" for problem in problems[:_SHOWN]]
        lines += [f"  ... and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN)
        way_out = f"Mend them{advice}, or leave them out, counted: --data.on-problem skip"
        raise UserError("\n".join([f"{_count(rows)} of the manifest cannot be used:", *lines, way_out]))
    for kind in dict.fromkeys(problem.kind for problem in problems):
        notes.append(f"left out, {kind}: {rows_text([p.row for p in problems if p.kind == kind])}")
    if len(rows) == len(table):
        raise UserError("\n".join(["no row of the manifest is left:", *notes]))
    return table.loc[[row not in rows for row in table["row"]], :]


def rows_text(rows: list[int]) -> str:
    """[4, 9] -> "2 rows (4, 9)"; long lists are cut."""
    shown = ", ".join(map(str, rows[:_SHOWN])) + ", ..." * (len(rows) > _SHOWN)
    return f"{_count(rows)} ({shown})"


def _count(rows: list[int] | set[int]) -> str:
    return f"{len(rows)} row{'s' * (len(rows) != 1)}"
