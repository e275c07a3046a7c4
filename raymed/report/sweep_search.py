"""The sections of a sweep's report that tell of the search: its configurations, its course, its hyper-parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from raymed.report import sweep_figures
from raymed.report.axis import option_text
from raymed.report.importance import MIN_FOR_IMPORTANCE, importance, importance_figure
from raymed.report.page import Block, Cell, Picture, Table, Text
from raymed.report.sweep_record import SearchRecord, SweepRecord, Trial, count, finished, listed, short_names, were
from raymed.report.tables import number
from raymed.space import Choice, Dimension

TOP = 10  # trials listed on the page; all are in trials.csv


def configurations(record: SweepRecord) -> list[Block]:
    """What was searched, and what the finals trained."""
    by_number = {trial["number"]: trial for trial in record.trials}
    of_method = {
        m: by_number[record.trial_of[m]]["params"] for m in record.figures if record.trial_of.get(m) in by_number
    }
    if not of_method:
        return []
    rows = [
        [name, describe(dimension), *(option_text(params[name]) for params in of_method.values())]
        for name, dimension in record.space.items()
    ]
    return [Table(["", "searched", *of_method], rows, f"Configurations of the final. Chosen: {record.chosen}.")]


def describe(dimension: Dimension) -> str:
    """A dimension in words."""
    if isinstance(dimension, Choice):
        return "one of " + ", ".join(map(option_text, dimension.options))
    return f"{dimension.low:g} – {dimension.high:g}" + (", log" if dimension.log else "")


def search(folder: Path, record: SearchRecord) -> list[Block]:
    """How trials were suggested and cut, their history, and the best of them."""
    status = Counter(trial["status"] for trial in record.trials)
    done = finished(record.trials)
    blocks: list[Block] = [
        Text(_suggested(record)),
        Text(
            f"Each was trained with {count(len(record.search_seeds), 'seed')} ({listed(record.search_seeds)}) and "
            f"judged by the mean {record.objective}. Of {len(record.trials)}, ASHA cut {status['stopped']} at a rung "
            f"before the last evaluation, {status['failed']} failed and {status['finished']} finished"
            + (f"; {status['running']} had not ended." if status["running"] else ".")
        ),
    ]
    if table := _rung_table(record):
        blocks.append(table)
    if len(done) < 2:
        told = "One trial finished" if done else "No trial finished"
        return [*blocks, Text(f"{told}: there is no history to draw.", quiet=True)]
    path = folder / "figures" / "history.png"
    sweep_figures.history(path, record.trials, record.objective, record.mode, record.generation_size, _marked(record))
    caption = (
        f"The search. Left: every trial's {record.objective}"
        + (", mean over seeds, thin lines span the seeds" if len(record.search_seeds) > 1 else "")
        + (", dotted lines part the generations" if record.generation_size else "")
        + ". Right: the same at every rung. The best so far also rises where nothing but noise is searched. Triangles "
        "lie outside the picture."
    )
    return [*blocks, Picture(path, caption), _top_table(record, done)]


def _suggested(record: SearchRecord) -> str:
    tried = f"{count(record.num_configurations, 'configuration')} {were(record.num_configurations)} tried"
    if not record.generation_size:
        return f"{tried}, suggested one by one."
    return (
        f"{tried} in {count(record.num_generations, 'generation')} of {record.generation_size}. Suggestions were made "
        "by generation: those of one did not see each other's results, only those of the generations before."
    )


def _rung_table(record: SearchRecord) -> Table | None:
    """What ASHA cut where; None where it cut nothing."""
    reached = Counter(int(rung) for trial in record.trials for rung in trial["rungs"])
    cut = Counter(max(map(int, t["rungs"])) for t in record.trials if t["status"] == "stopped" and t["rungs"])
    if not cut:
        return None
    rows = [
        [f"evaluation {rung}", str(reached[rung]), str(cut[rung]), _share(cut[rung], reached[rung])]
        for rung in sorted(cut)
    ]
    return Table(["rung", "trials that reached it", "cut there", "share"], rows, "What ASHA cut.")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"


def _top_table(record: SearchRecord, done: Sequence[Trial]) -> Table:
    ordered = sorted(done, key=lambda trial: number(trial["value"]), reverse=record.mode == "max")[:TOP]
    names = short_names(list(record.space))
    rows = [
        [
            str(t["number"]),
            Cell(_four(t["value"]), _seeds_text(t)),
            *(option_text(t["params"][name]) for name in record.space),
        ]
        for t in ordered
    ]
    what = "finished trials" if len(done) <= TOP else f"best {TOP} of {len(done)} finished trials"
    return Table(["trial", record.objective, *names.values()], rows, f"The {what}; every trial is in trials.csv.")


def _seeds_text(trial: Trial) -> str:
    return " ".join(map(_four, trial["per_seed"])) if len(trial["per_seed"]) > 1 else ""


def hyper_parameters(folder: Path, record: SearchRecord) -> list[Block]:
    """Sensitivity, parallel coordinates and importance; a sentence where too few trials have finished."""
    done = finished(record.trials)
    if len(done) < 2:
        return [Text("With fewer than two finished trials nothing can be said of any hyper-parameter.", quiet=True)]
    num_seeds, marked = len(record.search_seeds), _marked(record)
    paths = {name: folder / "figures" / f"{name}.png" for name in ("sensitivity", "parallel", "importance")}
    sweep_figures.sensitivity(paths["sensitivity"], record.trials, record.space, record.objective, marked, num_seeds)
    seeds = (
        "small ones their seeds, the band one standard deviation over seeds"
        if num_seeds > 1
        else "of one seed, so no band"
    )
    caption = (
        f"Sensitivity: {record.objective} of each trial against each hyper-parameter. Large dots are finished trials, "
        f"{seeds}. Trials that ASHA cut are hollow: their value is that of an earlier evaluation, and they enter no "
        "line; triangles lie outside the picture. Later trials crowd where earlier ones did well, so that other "
        "hyper-parameters differ along an axis too."
    )
    blocks: list[Block] = [Picture(paths["sensitivity"], caption), *_outside(record)]
    if len(record.space) < 2:
        return [
            *blocks,
            Text("With one hyper-parameter there is no importance to share, and no second axis.", quiet=True),
        ]
    sweep_figures.parallel(paths["parallel"], record.trials, record.space, record.objective, record.mode, marked)
    blocks.append(
        Picture(
            paths["parallel"],
            "Every trial as a line, finished ones coloured by value. Cut ones are grey and have none.",
        )
    )
    return [*blocks, _importance(paths["importance"], record, len(done))]


def _outside(record: SearchRecord) -> list[Block]:
    """Which values lie outside the space, as those of the recipe as it stands may."""
    found = [
        f"{name} = {option_text(trial['params'][name])} of trial {trial['number']}"
        for trial in record.trials
        for name, dimension in record.space.items()
        if not dimension.contains(trial["params"][name])
    ]
    told = (
        f"Outside the searched space, so drawn at the edge of an axis or as an option of its own: {'; '.join(found)}."
    )
    return [Text(told, quiet=True)] if found else []


def _importance(path: Path, record: SearchRecord, num_finished: int) -> Block:
    shares = importance(record.trials, record.space, len(record.search_seeds))
    if shares is None:
        few = num_finished < MIN_FOR_IMPORTANCE
        reason = (
            f"{num_finished} finished trials are too few"
            if few
            else "the finished trials do not differ, or lack values"
        )
        return Text(f"Importance is not shown: {reason}.", quiet=True)
    importance_figure(path, shares)
    caption = (
        f"Importance of each hyper-parameter by fANOVA over {num_finished} finished trials: bars are means, dots the "
        "search seeds. It is the share of the value's variance, where the search went, and has no direction."
    )
    return Picture(path, caption)


def _marked(record: SearchRecord) -> dict[int, tuple[str, str]]:
    """The baseline's and the chosen trial, for figures."""
    marked = {}
    if record.baseline in record.trial_of:
        marked[record.trial_of[record.baseline]] = (record.baseline, "D")
    if record.chosen in record.trial_of and record.chosen != record.baseline:
        marked[record.trial_of[record.chosen]] = (f"chosen: {record.chosen}", "*")
    return marked


def _four(value: float | None) -> str:
    """Trials at the top of a sweep differ in the fourth decimal."""
    return "n/a" if math.isnan(number(value)) else f"{number(value):.4f}"
