"""The cohort by split, counted from a table with one row an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raymed.config import UserError
from raymed.report.paper.record import SPLITS, Group, Spread

if TYPE_CHECKING:
    from pandas import DataFrame

CATEGORIES = ("sex", "site", "scanner", "modality")
QUANTITIES = ("age",)
COUNTED = {"patients": ["patient"], "cases": ["patient", "case"]}

_SHOWN = 5


def cohort_of(
    table: DataFrame,
    unit: str = "case",
    *,
    categories: Sequence[str] = CATEGORIES,
    quantities: Sequence[str] = QUANTITIES,
) -> dict[str, Group]:
    """{"all": ..., "train": ..., ...}: the parts of a cohort that there are, counted by unit.

    Args:
        table: one row an image, with the columns label, split (a key of SPLITS) and, where known, patient, case, side,
            year, and those of `categories` and `quantities`; an empty cell = not recorded.
        unit: patient, case, side (of a case) or image. What is not the same in all images of a unit, such as the
            scanner, is that of its first.

    Raises:
        UserError: a column that the unit needs is missing, or the images of a unit have several labels or splits.
    """
    keys = _keys(table, unit)
    if keys:
        _require_one(table, keys, unit, "label")
        _require_one(table, keys, unit, "split")
    groups = {"all": _group(table, keys, categories, quantities)}
    for name in SPLITS:
        part = table.loc[table["split"] == name, :]
        if len(part):
            groups[name] = _group(part, keys, categories, quantities)
    return groups


def _keys(table: DataFrame, unit: str) -> list[str]:
    """Columns that together name a unit; [] = every row is one."""
    needed = {"image": [], "patient": ["patient"], "case": ["case"], "side": ["case", "side"]}
    if unit not in needed:
        raise UserError(f"unit must be one of {', '.join(needed)}, got {unit!r}")
    if missing := [name for name in needed[unit] if name not in table]:
        raise UserError(f"a cohort by {unit} needs the column {missing[0]!r}; the table has {', '.join(table.columns)}")
    return ["patient"] * (unit in ("case", "side") and "patient" in table) + needed[unit]


def _require_one(table: DataFrame, keys: list[str], unit: str, column: str) -> None:
    num_values = table.groupby(keys, sort=False)[column].transform("nunique").tolist()
    if rows := [row for row, num in enumerate(num_values, 1) if num > 1]:
        more = ", ..." * (len(rows) > _SHOWN)
        raise UserError(
            f"{len(rows)} images belong to a {unit} whose images have several values of {column!r}: rows "
            f"{', '.join(map(str, rows[:_SHOWN]))}{more}. Count by a smaller unit, or mend the manifest"
        )


def _group(part: DataFrame, keys: list[str], categories: Sequence[str], quantities: Sequence[str]) -> Group:
    units = part.drop_duplicates(keys) if keys else part
    counts = {
        name: len(part.drop_duplicates([c for c in columns if c in part]))
        for name, columns in COUNTED.items()
        if columns[-1] in part
    }
    return Group(
        counts | {"images": len(part)},
        len(units),
        _values(units["label"].tolist()),
        {name: _values(units[name].tolist()) for name in categories if name in units},
        {name: spread for name in quantities if name in units and (spread := _spread(units[name].tolist()))},
        _years(part["year"].tolist()) if "year" in part else None,
    )


def _values(cells: Sequence[Any]) -> dict[str, int]:
    """Value -> how often, most frequent first; what is not recorded last."""
    counts = Counter("" if cell != cell or cell is None else str(cell).strip() for cell in cells)
    return dict(sorted(counts.items(), key=lambda item: (item[0] == "", -item[1], item[0])))


def _spread(cells: Sequence[Any]) -> Spread | None:
    known = _numbers(cells)
    if not known:
        return None
    std = float(np.std(known, ddof=1)) if len(known) > 1 else float("nan")
    return Spread(float(np.mean(known)), std, min(known), max(known), len(known))


def _years(cells: Sequence[Any]) -> tuple[int, int] | None:
    known = _numbers(cells)
    return (int(min(known)), int(max(known))) if known else None


def _numbers(cells: Sequence[Any]) -> list[float]:
    """Those of the cells that are numbers."""
    import pandas as pd

    found = np.asarray(pd.to_numeric(pd.Series(cells, dtype=object), errors="coerce"), np.float64)
    return found[~np.isnan(found)].tolist()
