"""Which of two classifiers is better on images that neither has seen.

Both decide about the same cases, each at its own threshold, and every resample of patients is the same for both: the
interval is that of the difference (`paired_bootstrap_difference`). One metric, stated beforehand, decides; where its
interval holds 0 the answer is "cannot tell", which is not that they are alike.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raymed.bundle import Bundle
from raymed.config import UserError, check_choice
from raymed.data.dataset import DataSet
from raymed.data.problems import rows_text
from raymed.metrics.bootstrap import Figure, bootstrap_ci, paired_bootstrap_difference
from raymed.metrics.classification import Statistic, binary_statistic
from raymed.metrics.operating import decision_statistic
from raymed.report.tables import (
    LOWER_IS_BETTER,
    comparison_csv,
    comparison_table,
    decimal,
    difference_table,
    interval,
    label,
    number,
)
from raymed.results.scores import Answer, Scored, answer, check_same_units
from raymed.results.seen import knows_training_set, unseen
from raymed.storage import write_atomic
from raymed.tasks.predictor import Predictor
from raymed.train.runs.job import Job
from raymed.train.runs.openings import open_test

METRICS = ("auroc", "auprc", "sensitivity", "specificity", "ppv", "npv", "accuracy", "f1", "brier", "ece")


def report_comparison(
    job: Job, models: Mapping[str, tuple[Bundle, DataSet]], metric: str, allow_unknown: bool = False
) -> Path:
    """Compare two models on the test split of a job's data, report, and return the path of the summary.

    Args:
        models: location -> bundle, and the job's data as it reads them; two.
        metric: one of `METRICS`, by which one is better.
        allow_unknown: go on where a model does not say what it was trained on.

    Raises:
        UserError: a model was trained on a patient (unless such are left out), or does not say; the models find
            different things, or decide about different units.
    """
    from rich import print as show

    check_choice("metric", metric, METRICS)
    names, notes = short_names(list(models)), []
    named = dict(zip(names, models.values(), strict=True))
    where = _new_to_both(job, named, allow_unknown, notes)
    _check_same_rows([data for _, data in models.values()])
    device = str(job.config.compute.resolved_device())
    answers = [answer(Predictor.from_bundle(bundle, device), data, where) for bundle, data in models.values()]
    check_same_units(answers)
    openings = open_test(job.storage, job.data, job.key)
    found, differences = compared(names, answers)
    unit = answers[0].levels[0].table.level
    sentence = verdict(names, differences[unit], metric, answers[0].levels[0])
    for level, of_level in found.items():
        show(comparison_table(of_level, METRICS, title=f"by {level}"))
        show(difference_table(_one(names, differences[level]), METRICS, f"difference, by {level}"))
    write_atomic(job.folder / "table.csv", comparison_csv(found[unit], METRICS))
    csv = comparison_csv({level: of for level, of in differences.items()}, METRICS)
    write_atomic(job.folder / "differences.csv", csv.replace("method", "level", 1))
    for table in ("table.csv", "differences.csv"):
        job.outbox.artifact(job.folder / table)
    job.outbox.metrics({f"difference/{name}": differences[unit][name]["mean"] for name in METRICS}, 0)
    figures = {name: {level: found[level][name] for level in found} for name in names}
    extra = {
        "models": dict(zip(names, models, strict=True)),
        "sentence": sentence,
        "metric": metric,
        "differences": differences,
        "test_openings": openings,
    }
    summary = job.finish(figures, {"run": job.folder}, notes=[*notes, *job.data.notes], **extra)
    told = [f"{name}: {model}" for name, model in zip(names, models, strict=True)]
    print("\n".join([sentence, *told, *notes, f"run: {job.folder}", f"MLflow: {job.where()}"]))
    return summary


def compared(names: Sequence[str], answers: Sequence[Answer]) -> tuple[dict[str, Any], dict[str, Any]]:
    """({level: {model: figures}}, {level: figures of the first model minus those of the second}) at every level that
    both have."""
    found: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for mine, theirs in zip(*(of.levels for of in answers), strict=False):
        statistics = [_statistic(scored) for scored in (mine, theirs)]
        level, groups = mine.table.level, mine.groups
        found[level] = {
            name: bootstrap_ci([statistic], [groups], **mine.options)
            for name, statistic in zip(names, statistics, strict=True)
        }
        first, second = statistics
        differences[level] = paired_bootstrap_difference([first], [second], [groups], **mine.options)
    return found, differences


def short_names(models: Sequence[str]) -> list[str]:
    """Two locations without the folders that they have in common: RUN/seed-1/bundle and RUN/seed-2/bundle are seed-1
    and seed-2."""
    first, second = (model.rstrip("/").split("/") for model in models)
    start = len(os.path.commonprefix([first, second]))
    end = len(os.path.commonprefix([first[start:][::-1], second[start:][::-1]]))
    parts = ["/".join(names[start : len(names) - end]) for names in (first, second)]
    return parts if all(parts) else list(models)


def verdict(names: Sequence[str], differences: Mapping[str, Figure], metric: str, scored: Scored) -> str:
    """Which is better, in one sentence, or that it cannot be told."""
    of = differences[metric]
    low, high = number(of["ci_low"]), number(of["ci_high"])
    told = f"{label(metric)} differs by {decimal(of['mean'], '+')} (95 % CI {interval(of, '+').replace(', ', ' to ')})"
    over = f"over {len(scored.table)} {scored.table.level}s, {names[0]} minus {names[1]}"
    if not (low > 0 or high < 0):
        return f"Cannot tell which is better: {told} {over}."
    first = (low > 0) != (metric in LOWER_IS_BETTER)
    return f"{names[not first]} is better: {told} {over}."


def _new_to_both(
    job: Job, models: Mapping[str, tuple[Bundle, DataSet]], allow_unknown: bool, notes: list[str]
) -> np.ndarray:
    """The images of patients whom neither model has seen."""
    unknown = [name for name, (bundle, _) in models.items() if not knows_training_set(bundle)]
    if unknown and not allow_unknown:
        raise UserError(
            f"{' and '.join(unknown)} does not say what it was trained on, so that it may have seen these patients: "
            "train it anew, or take the responsibility with --allow-unknown-training-set"
        )
    notes += [f"It is not known whether {name} has seen these patients." for name in unknown]
    return unseen(models, job.data.splits["test"], job.recipe.data.on_problem, notes)


def _check_same_rows(sets: Sequence[DataSet]) -> None:
    """Raise UserError where one of two models cannot read an image that the other can."""
    if differing := sorted(set(sets[0].rows.tolist()) ^ set(sets[1].rows.tolist())):
        raise UserError(f"only one of the models can use {rows_text(differing)}: leave them out of the manifest")


def _statistic(scored: Scored) -> Statistic:
    ranking = binary_statistic(scored.scores, scored.table.targets, scored.threshold)
    decisions = decision_statistic(scored.decided, scored.table.targets)
    return lambda counts: ranking(counts) | decisions(counts)


def _one(names: Sequence[str], differences: Mapping[str, Figure]) -> dict[str, Any]:
    return {f"{names[0]} minus {names[1]}": differences}
