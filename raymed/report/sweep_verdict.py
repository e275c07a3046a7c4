"""How verdicts are shown: tables of differences from a baseline, their sentences, a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymed.report import figures as draw
from raymed.report.page import Block, Bullets, Cell, Picture, Table
from raymed.report.sweep_record import count
from raymed.report.tables import decimal, label, number

SPLITS = {"test": "test", "val": "validation"}

Verdicts = Mapping[str, Mapping[str, Any]]
"""Method -> Verdict of `raymed.metrics.verdict`."""


def verdict_blocks(
    folder: Path, verdicts: Mapping[str, Verdicts], metric: str, baseline: str, chosen: str
) -> list[Block]:
    """Tables and sentences of "val" and "test", as far as there are any, and figures/differences.png below a folder."""
    blocks: list[Block] = []
    panels = {}
    for split in ("val", "test"):
        if of_split := verdicts.get(split):
            blocks.append(_table(split, of_split, metric, baseline, chosen))
            blocks.append(Bullets([str(verdict["sentence"]) for verdict in of_split.values()]))
            panels[f"{SPLITS[split].capitalize()} split"] = of_split
    path = folder / "figures" / "differences.png"
    draw.forest(path, panels, f"{label(metric)} minus that of {baseline}")
    caption = (
        f"Difference in {label(metric)} from {baseline}, paired by seed and patient, with its 95 % "
        "interval. Filled: the interval excludes zero, before correction for several finalists."
    )
    return [*blocks, Picture(path, caption)]


def _table(split: str, verdicts: Verdicts, metric: str, baseline: str, chosen: str) -> Table:
    header = ["", f"{label(metric)} minus {baseline}", "p", "p (Holm)", "verdict"]
    rows = [
        [
            Cell(name, "chosen" if name == chosen else ""),
            _difference(v["difference"]),
            _p(v["p"]),
            _p(v["p_holm"]),
            Cell(str(v["verdict"]), mark=tone(str(v["verdict"]))),
        ]
        for name, v in verdicts.items()
    ]
    caption = (
        f"Verdict on the {SPLITS[split]} split. Mean difference over seeds, 95 % interval below it; p (Holm) is "
        f"corrected for {count(len(verdicts), 'finalist')}."
    )
    return Table(header, rows, caption)


def _difference(figure: Mapping[str, Any]) -> Cell:
    """In four decimals: finalists differ by less than a table of results shows."""
    mean, low, high = (number(figure[key]) for key in ("mean", "ci_low", "ci_high"))
    return Cell(f"{mean:+.4f}", f"{low:+.4f}, {high:+.4f}")


def _p(value: float | None) -> str:
    return "< 0.001" if number(value) < 0.001 else decimal(value)


def tone(verdict: str) -> Any:
    """Of a verdict, for `Lead` and `Cell`."""
    if verdict.startswith("cannot"):
        return "open"
    return "good" if verdict.startswith("above") else "neutral"
