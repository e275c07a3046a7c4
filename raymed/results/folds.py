"""Cross-validation: every case scored by networks that have not seen its patient.

In each repeat every case is held out once, so that a repeat's out-of-fold scores are those of the whole data set.
Ranking figures are of the scores of all folds pooled; a case is decided by the threshold that fits the out-of-fold
scores of the other folds, in which its own score and label have no say. Figures are means over repeats, with patients
(and repeats) resampled.

Source: Efron and Tibshirani, "Improvements on cross-validation: the .632+ bootstrap method", 1997, for why the figures
of one split of few cases are not enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from raymed.data.folds import CrossValidation, RepeatedFold
from raymed.metrics.bootstrap import bootstrap_ci
from raymed.metrics.classification import Statistic, binary_statistic
from raymed.metrics.levels import Level
from raymed.metrics.operating import choose, decision_statistic
from raymed.report.tables import comparison_csv, comparison_table
from raymed.storage import write_atomic
from raymed.tasks.classifier import ClassifierRecipe
from raymed.train.runs.job import Job
from raymed.train.runs.results import METRICS, decided, draw_losses, tell_images
from raymed.train.unit import Unit, load_data

_DECISIONS = {"sensitivity": "sensitivity", "recall": "sensitivity", "specificity": "specificity"}
_DECISIONS |= {"precision": "ppv", "ppv": "ppv", "npv": "npv", "accuracy": "accuracy"}


@dataclass(frozen=True)
class OutOfFold:
    """One repeat over one seed: U units (cases, ...) in ascending order of their numbers.

    scores: (U,) float64 of the network that had not seen them. targets: (U,) int64. patients: (U,). units: (U,) int64.
    decided: (U,) bool, by thresholds of the other folds. fold: (U,) int64. thresholds: one a fold, on raw scores; the
    last one is that of all folds together, for a model that is trained on everything.
    """

    scores: np.ndarray
    targets: np.ndarray
    patients: np.ndarray
    units: np.ndarray
    decided: np.ndarray
    fold: np.ndarray
    thresholds: tuple[float, ...]


def fold_units(job: Job, cv: CrossValidation, seeds: Sequence[int]) -> list[Unit]:
    """One training a fold, repeat and seed. Only the held-out part is a test split, and it is nobody's test set."""
    return [replace(job.unit(f"{fold.name}-seed-{seed}", seed), fold=fold) for seed in seeds for fold in cv.trainings()]


def out_of_fold(units: Sequence[Unit], level: Level | None = None) -> list[OutOfFold]:
    """The finished units of a cross-validation, repeat by repeat."""
    repeats: dict[tuple[int, int], list[Unit]] = {}
    for unit in units:
        repeats.setdefault((unit.seed, cast(RepeatedFold, unit.fold).repeat), []).append(unit)
    return [_pooled(of_repeat, level) for of_repeat in repeats.values()]


def _pooled(units: Sequence[Unit], level: Level | None) -> OutOfFold:
    tables = [decided(unit, "test", level) for unit in units]
    fold = np.concatenate([np.full(len(table), k) for k, table in enumerate(tables)])
    scores, targets, patients, numbers = (
        np.concatenate([getattr(table, name) for table in tables])
        for name in ("scores", "targets", "patients", "units")
    )
    rule = cast(ClassifierRecipe, units[0].recipe).decide.operating_point
    others = [fold != k for k in range(len(tables))]
    everything = np.ones(len(scores), bool)
    thresholds = tuple(choose(scores[kept], targets[kept], rule)["threshold"] for kept in (*others, everything))
    order = np.argsort(numbers, kind="stable")
    positive = scores >= np.array(thresholds)[fold]
    scores, targets, patients, numbers = scores[order], targets[order], patients[order], numbers[order]
    return OutOfFold(scores, targets, patients, numbers, positive[order], fold[order], thresholds)


def fold_figures(repeats: Sequence[OutOfFold], has_patients: bool = True) -> dict[str, Any]:
    """Figures of `binary_metrics` and of decisions over repeats, with intervals."""
    unit = "patient" if has_patients else "image"
    return bootstrap_ci([_statistic(repeat) for repeat in repeats], [r.patients for r in repeats], unit=unit)


def _statistic(repeat: OutOfFold) -> Statistic:
    """Ranking and calibration of the scores, decisions as they fell."""
    ranking = binary_statistic(repeat.scores, repeat.targets, repeat.thresholds[-1])
    decisions = decision_statistic(repeat.decided, repeat.targets)

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        found = decisions(counts)
        values = ranking(counts) | {name: found[of] for name, of in _DECISIONS.items()}
        precision, recall = values["precision"], values["recall"]
        with np.errstate(invalid="ignore"):
            return values | {"f1": 2 * precision * recall / (precision + recall)}

    return statistic


def report_folds(job: Job, units: Sequence[Unit]) -> Path:
    """End a job: the table of the out-of-fold figures, the scores, the summary. Returns its path.

    Units that are not finished, as when the budget is used up, leave nothing to report.
    """
    from rich import print as show

    recipe = cast(ClassifierRecipe, job.recipe)
    if not all(unit.result() for unit in units):
        done = sum(unit.result() is not None for unit in units)
        print(f"{done} of {len(units)} trainings are finished: {job.budget.exhausted()}. The same command goes on")
        return job.finish({}, {"run": job.folder}, best=None, ended_early=job.budget.exhausted())
    data = load_data(recipe, units[0].cache)
    level = recipe.decide.level(data)
    repeats = out_of_fold(units)
    found = {recipe.label: fold_figures(repeats, data.has_patients)}
    show(comparison_table(found, METRICS, title=_title(job, data, level, repeats)))
    extra: dict[str, Any] = {"level": level}
    if level != "image":
        images = {recipe.label: fold_figures(out_of_fold(units, "image"), data.has_patients)}
        tell_images(job, images)
        extra["image_figures"] = {recipe.label: {"test": images[recipe.label]}}
    write_atomic(job.folder / "table.csv", comparison_csv(found, METRICS))
    np.savez(job.folder / "out_of_fold.npz", **_arrays(repeats))
    (job.folder / "figures").mkdir(parents=True, exist_ok=True)
    job.outbox.artifact(draw_losses(job.folder / "figures", {recipe.label: units}), "figures")
    job.outbox.artifact(job.folder / "table.csv")
    job.outbox.metrics({f"test/{name}": found[recipe.label][name]["mean"] for name in METRICS}, 0)
    extra["operating_points"] = [repeat.thresholds[-1] for repeat in repeats]
    figures = {recipe.label: {"test": found[recipe.label]}}
    summary = job.finish(figures, {"run": job.folder, "figures": job.folder / "figures"}, best=recipe.label, **extra)
    print(f"run: {job.folder}\nMLflow: {job.where()}")
    return summary


def _arrays(repeats: Sequence[OutOfFold]) -> dict[str, Any]:
    """Scores, decisions and folds (R, U), and what is the same in all repeats."""
    first = repeats[0]
    stacked = {name: np.stack([getattr(r, name) for r in repeats]) for name in ("scores", "decided", "fold")}
    return stacked | {"targets": first.targets, "patients": first.patients, "units": first.units}


def _title(job: Job, data: Any, level: Level, repeats: Sequence[OutOfFold]) -> str:
    over = "patients" if data.has_patients else "images (no patient column)"
    num = len(repeats[0].thresholds) - 1
    return (
        f"out of fold, {num} folds x {len(repeats)}, by {level}, positive = {data.positive}, "
        f"95 % intervals over {over} and repeats"
    )
