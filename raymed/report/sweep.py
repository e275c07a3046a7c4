"""The report of a sweep: report.html, trials.csv, table.csv and figures/*.png in one folder.

`SweepRecord` holds all that is told, as plain data; nothing is computed here but counts and curves. What cannot be
drawn (one trial, one seed, no finalist) is a sentence in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raymed.report import figures as draw
from raymed.report import sweep_search
from raymed.report.page import Block, Bullets, Lead, Picture, Section, Text, repeat_blocks, write_page
from raymed.report.sweep_record import SearchRecord, SweepRecord, count, listed
from raymed.report.sweep_verdict import SPLITS, tone, verdict_blocks
from raymed.report.tables import comparison_page, split_csv
from raymed.storage import write_atomic

METRICS = ("auroc", "auprc", "accuracy", "sensitivity", "specificity", "precision", "f1", "brier", "ece")


def write_sweep_report(folder: Path, record: SweepRecord) -> Path:
    """Write report.html, trials.csv, table.csv and figures/*.png into the folder; return the page's path."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "trials.csv", trials_csv(record))
    write_atomic(folder / "table.csv", split_csv(record.figures, _metrics(record)))
    sections = [
        Section("Verdict", _verdict(folder, record)),
        Section("Results", _results(record)),
        Section("Curves", _curves(folder, record)),
        Section("Configurations", sweep_search.configurations(record)),
        Section("The search", sweep_search.search(folder, record)),
        Section("Hyper-parameters", sweep_search.hyper_parameters(folder, record)),
        Section("Where the models look", _inside(record)),
        Section("Further figures", [Picture(path, caption) for path, caption in record.pictures]),
        Section("Repeat", repeat_blocks(record.command, record.environment, record.config)),
        Section("Notes", [Bullets(record.notes)] if record.notes else []),
    ]
    subtitle = f"{record.data} Positive class: {record.positive}."
    return write_page(folder / "report.html", record.title, subtitle, _lead(record), sections)


def trials_csv(record: SearchRecord) -> str:
    """One row a trial: number, status, value, last rung, a column a seed and a column a hyper-parameter.

    A parameter that is None reads "none", one that the trial does not have is empty, as is a value that is not finite.
    """
    import pandas as pd

    rows = [
        {"number": trial["number"], "status": trial["status"], "value": _cell(trial["value"])}
        | {"last_rung": max(map(int, trial["rungs"]), default=None)}
        | {f"seed_{s}": _cell(v) for s, v in zip(record.search_seeds, trial["per_seed"], strict=False)}
        | {name: _param_cell(value) for name, value in trial["params"].items()}
        for trial in record.trials
    ]
    columns = [
        "number",
        "status",
        "value",
        "last_rung",
        *(f"seed_{seed}" for seed in record.search_seeds),
        *record.space,
    ]
    table = pd.DataFrame(rows, columns=list(dict.fromkeys([*columns, *(n for row in rows for n in row)])), dtype=object)
    return table.to_csv(index=False, lineterminator="\n")


def _cell(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _param_cell(value: Any) -> Any:
    return str(value).lower() if value is None or isinstance(value, bool) else value


def _metrics(record: SweepRecord) -> list[str]:
    """The swept metric first, then those that every method has."""
    have = [split for of_method in record.figures.values() for split in of_method.values()]
    ordered = dict.fromkeys((record.metric, *METRICS))
    return [metric for metric in ordered if all(metric in of_split for of_split in have)]


def _lead(record: SweepRecord) -> Lead:
    first, _, rest = record.sentence.partition(". ")
    first = first[:1].upper() + first[1:].removesuffix(".") + "."
    flatters = "The more often a test split is opened, the more its figures flatter."
    more = [*([rest] if rest else []), *([flatters] if record.num_test_openings > 1 else [])]
    verdict = record.verdicts.get("test", {}).get(record.chosen, {}).get("verdict", record.sentence)
    numbers = {
        "configurations tried": str(record.num_configurations),
        "cut early by ASHA": str(sum(trial["status"] == "stopped" for trial in record.trials)),
        "seeds in the search": str(len(record.search_seeds)),
        f"finalists besides {record.baseline}": str(len(record.finalists)),
        "fresh seeds in the final": str(len(record.final_seeds)) if record.figures else "0",
        "times this test split has been opened": str(record.num_test_openings),
    }
    return Lead(first, more, tone(str(verdict)), numbers)


def _verdict(folder: Path, record: SweepRecord) -> list[Block]:
    if not record.figures:
        return [Text("There were no finals: nothing was trained on fresh seeds.", quiet=True)]
    if not any(record.verdicts.values()):
        return [Text(f"No configuration besides {record.baseline} reached the final: nothing to compare.", quiet=True)]
    about = Text(
        f"Finalists were chosen on validation and trained again, paired with {record.baseline}, on "
        f"{count(len(record.final_seeds), 'fresh seed')} ({listed(record.final_seeds)}) that the search never "
        f"saw. Chosen: {record.chosen}."
    )
    return [about, *verdict_blocks(folder, record.verdicts, record.metric, record.baseline, record.chosen)]


def _results(record: SweepRecord) -> list[Block]:
    blocks: list[Block] = []
    for split, name in SPLITS.items():
        of_split = {method: of_method[split] for method, of_method in record.figures.items() if split in of_method}
        seeds = len(record.final_seeds)
        what = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so without a deviation"
        ranked = " Best in bold, second underlined." if len(of_split) > 1 else ""
        caption = f"The {name} split: {what}; 95 % interval below.{ranked} Thresholds are tuned on validation."
        if of_split:
            blocks.append(comparison_page(of_split, _metrics(record), caption, {record.chosen: "chosen"}))
    return blocks


def _curves(folder: Path, record: SweepRecord) -> list[Block]:
    curves = {method: splits["test"] for method, splits in record.predictions.items() if splits.get("test")}
    if not curves:
        return [Text("There are no predictions of the test split to draw.", quiet=True)]
    if any(len(np.unique(targets)) < 2 for seeds in curves.values() for _, targets in seeds):
        return [Text("The test split holds one class only: it has no curves.", quiet=True)]
    of_test = {method: record.figures[method]["test"] for method in curves}
    paths = {name: folder / "figures" / f"{name}.png" for name in ("pr_roc", "calibration", "confusion")}
    draw.pr_roc(paths["pr_roc"], curves, of_test)
    draw.calibration(paths["calibration"], curves, of_test)
    draw.confusion(paths["confusion"], curves, record.thresholds, (record.negative, record.positive))
    several = max(map(len, curves.values())) > 1
    bands = "lines are means over seeds, bands one standard deviation" if several else "one seed, so without bands"
    mean = "mean ± standard deviation over seeds" if several else "of one seed"
    return [
        Picture(
            paths["pr_roc"], f"Precision-recall and ROC curves of the test split; {bands}. Brackets: 95 % intervals."
        ),
        Picture(
            paths["calibration"],
            "Reliability on the test split over 15 bins, seeds pooled, with 95 % Wilson intervals; below, how many "
            "images of one seed each bin holds on average.",
        ),
        Picture(
            paths["confusion"],
            f"Decisions on the test split at the threshold tuned on validation: percentages of the row, and below them "
            f"images, {mean}.",
        ),
    ]


def _inside(record: SweepRecord) -> list[Block]:
    pictures = [Picture(path, caption) for path, caption in record.heat_maps]
    if not record.inside:
        return [*pictures]
    names = list(next(iter(record.inside.values())))
    figures = {m: {"auroc": record.figures[m]["test"]["auroc"], **of} for m, of in record.inside.items()}
    caption = (
        "Discrimination beside where it comes from, on images of the test split whose finding is marked. Box alignment "
        "is the share of the heat map that lies in the marked region, by chance the region's share of the image; "
        "concept count is in how many places of the region a unit responds strongly, and is described, not judged."
    )
    return [comparison_page(figures, ["auroc", *names], caption), *pictures]
