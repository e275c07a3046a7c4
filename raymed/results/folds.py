"""Cross-validation: every case scored by networks that have not seen its patient.

In each repeat every case is held out once, so that a repeat's out-of-fold scores are those of the whole data set.
Networks differ in the scale of their scores, and pooled as they are a case may rank higher for the fold it fell into;
so each network's scores are first brought to probabilities by Platt scaling on its own validation split. Ranking
figures are of these, of all folds pooled; a case is decided by the threshold that fits the held-out cases of the other
folds, and calibrated by what those give: the network that scores it and the rule that decides it have not seen its
label. In a nested cross-validation threshold and calibration come from inside the fold's training part. Figures are
means over repeats, with patients (and repeats) resampled; methods are compared over the same folds, repeats, patients.

Source: Efron and Tibshirani, "Improvements on cross-validation: the .632+ bootstrap method", 1997, for why the figures
of one split of few cases are not enough.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from raymed.data.dataset import DataSet
from raymed.data.folds import CrossValidation, RepeatedFold
from raymed.metrics.bootstrap import bootstrap_ci, mean_statistic, paired_bootstrap_difference, summarise_seeds
from raymed.metrics.calibration import Calibration, logit_of
from raymed.metrics.classification import Statistic, binary_statistic
from raymed.metrics.levels import Level, LevelTable
from raymed.metrics.operating import choose, decision_statistic
from raymed.metrics.reliability import fit_calibrator
from raymed.report import figures as draw
from raymed.report.tables import comparison_csv, comparison_markdown, comparison_table, difference_table
from raymed.storage import write_atomic
from raymed.tasks.classifier import ClassifierRecipe
from raymed.train.runs.job import Job
from raymed.train.runs.results import METRICS, best_on_validation, decided, draw_losses, over, prediction, tell_images
from raymed.train.unit import Unit, load_data, unit_data

Inner = Mapping[str, Sequence[Unit]]
"""Key of a fold's training -> trainings inside its training part, each of whose cases is in one validation split."""

_DECISIONS = {"sensitivity": "sensitivity", "recall": "sensitivity", "specificity": "specificity"}
_DECISIONS |= {"precision": "ppv", "ppv": "ppv", "npv": "npv", "accuracy": "accuracy"}


@dataclass(frozen=True)
class OutOfFold:
    """One repeat over one seed: U units (cases, ...) in ascending order of their numbers.

    scores: (U,) float64 of the network that had not seen them, on one scale. targets: (U,) int64. patients: (U,).
    units: (U,) int64. decided: (U,) bool, by thresholds of the other folds (nested: of inner ones). fold: (U,) int64.
    thresholds: one a fold, on that scale; the last one is that of all folds together.
    calibrated: (U,) float64, the scores by the calibration of the same cases as the thresholds.
    """

    scores: np.ndarray
    targets: np.ndarray
    patients: np.ndarray
    units: np.ndarray
    decided: np.ndarray
    fold: np.ndarray
    thresholds: tuple[float, ...]
    calibrated: np.ndarray


def folds_of(cv: str) -> Sequence[RepeatedFold | None]:
    """What a job trains its methods on: the folds of FOLDSxREPEATS, or, of "", the data's own splits (None)."""
    return CrossValidation.parse(cv).trainings() if cv else (None,)


def out_of_fold(units: Sequence[Unit], level: Level | None = None, inner: Inner | None = None) -> list[OutOfFold]:
    """The finished units of a cross-validation, repeat by repeat; inner: of a nested one, what thresholds come from."""
    repeats: dict[tuple[int, int], list[Unit]] = {}
    for unit in units:
        repeats.setdefault((unit.seed, cast(RepeatedFold, unit.fold).repeat), []).append(unit)
    return [_pooled(of_repeat, level, inner) for of_repeat in repeats.values()]


def _pooled(units: Sequence[Unit], level: Level | None, inner: Inner | None) -> OutOfFold:
    tables = [_table(unit, "test", level) for unit in units]
    fold = np.concatenate([np.full(len(table), k) for k, table in enumerate(tables)])
    decide = cast(ClassifierRecipe, units[0].recipe).decide
    held_out = _joined(tables)
    calibrated, thresholds = np.empty(len(fold)), []
    for k, unit in enumerate(units):
        others = [table for other, table in enumerate(tables) if other != k]
        known = _joined([_table(u, "val", level) for u in inner[unit.key]] if inner else others)
        thresholds.append(choose(known["scores"], known["targets"], decide.operating_point)["threshold"])
        calibrator, _ = fit_calibrator(decide.calibration, known["scores"], known["targets"], known["patients"])
        calibrated[fold == k] = calibrator(logit_of(tables[k].scores))
    of_all = choose(held_out["scores"], held_out["targets"], decide.operating_point)["threshold"]
    arrays = held_out | {
        "decided": held_out["scores"] >= np.array(thresholds)[fold],
        "fold": fold,
        "calibrated": calibrated,
    }
    order = np.argsort(held_out["units"], kind="stable")
    in_order = {name: array[order] for name, array in arrays.items()}
    return OutOfFold(**in_order, thresholds=(*thresholds, of_all))


def _table(unit: Unit, split: str, level: Level | None) -> LevelTable:
    """What a unit says of a split of its fold, by its own validation split on the scale of probabilities; what a case
    is does not depend on the fold."""
    unit = replace(unit, fold=None)
    val, found = (decided(unit, name, level) for name in ("val", split))
    platt = Calibration.fit(logit_of(val.scores), val.targets.astype(np.float64))
    return replace(found, scores=platt(logit_of(found.scores)))


def _joined(tables: Sequence[LevelTable]) -> dict[str, np.ndarray]:
    names = ("scores", "targets", "patients", "units")
    return {name: np.concatenate([getattr(table, name) for table in tables]) for name in names}


def fold_figures(repeats: Sequence[OutOfFold], unit: str = "patient") -> dict[str, Any]:
    """Figures of `binary_metrics` and of decisions over repeats, with intervals."""
    return bootstrap_ci([_statistic(repeat) for repeat in repeats], [r.patients for r in repeats], unit=unit)


def fold_differences(
    repeats: Sequence[OutOfFold], baseline: Sequence[OutOfFold], unit: str = "patient"
) -> dict[str, Any]:
    """How much higher each of `fold_figures` is than the baseline's, paired: the same repeats, folds and resamples."""
    ours, theirs = ([_statistic(repeat) for repeat in of_method] for of_method in (repeats, baseline))
    return paired_bootstrap_difference(ours, theirs, [repeat.patients for repeat in repeats], unit=unit)


def _statistic(repeat: OutOfFold) -> Statistic:
    """Ranking and calibration of the scores, decisions as they fell, Brier score after calibration."""
    ranking = binary_statistic(repeat.scores, repeat.targets, repeat.thresholds[-1])
    decisions = decision_statistic(repeat.decided, repeat.targets)
    mended = mean_statistic("brier_calibrated", (repeat.calibrated - repeat.targets) ** 2)

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        found = decisions(counts)
        values = ranking(counts) | {name: found[of] for name, of in _DECISIONS.items()} | mended(counts)
        precision, recall = values["precision"], values["recall"]
        with np.errstate(invalid="ignore"):
            return values | {"f1": 2 * precision * recall / (precision + recall)}

    return statistic


def report_folds(
    job: Job,
    methods: Mapping[str, Sequence[Unit]],
    baseline: str | None = None,
    best: str | None = None,
    inner: Inner | None = None,
    **extra: Any,
) -> Path:
    """End a job: tables of the out-of-fold figures, curves, the scores, the summary. Returns its path.

    methods: name -> units over the same seeds and folds; those that are not finished, as when the budget is used up,
    are left out. baseline: method that the others are compared with, patient by patient. best: the method to name so;
    None = by the mean of the folds' validation parts. inner: of a nested cross-validation.
    """
    from rich import print as show

    recipe = cast(ClassifierRecipe, job.recipe)
    extra |= {"ended_early": job.budget.exhausted()}
    methods, unfinished = _finished(methods)
    if unfinished:
        print(f"{unfinished}: {job.budget.exhausted()}. The same command goes on", flush=True)
    if not methods:
        return job.finish({}, {"run": job.folder}, best=None, **extra)
    data = load_data(recipe, next(iter(methods.values()))[0].cache)
    level = recipe.decide.level(data)
    pooled = {name: out_of_fold(units, inner=inner) for name, units in methods.items()}
    of_cases = {name: fold_figures(repeats, data.grouped_by) for name, repeats in pooled.items()}
    figures = {name: {"val": _on_validation(methods[name]), "test": found} for name, found in of_cases.items()}
    chosen = best if best in methods else best_on_validation(figures)
    show(comparison_table(of_cases, METRICS, title=_title(data, level, pooled[chosen])))
    beside = methods if level != "image" else {}
    images = {name: out_of_fold(units, "image", inner) for name, units in beside.items()}
    of_images = {name: fold_figures(repeats, data.grouped_by) for name, repeats in images.items()}
    if of_images:
        tell_images(job, of_images)
        extra["image_figures"] = {name: {"test": found} for name, found in of_images.items()}
    if baseline in methods and len(methods) > 1:
        others = {name: repeats for name, repeats in pooled.items() if name != baseline}
        found = {name: fold_differences(of, pooled[baseline], data.grouped_by) for name, of in others.items()}
        show(difference_table(found, METRICS, f"minus {baseline}, out of fold, paired by patient"))
        extra["differences"] = {"baseline": baseline} | {name: {"test": of} for name, of in found.items()}
    if best is None and len(methods) > 1:
        extra["note"] = _CHOICE.format(best=chosen, num=len(methods))
    _write(job, methods, pooled, of_cases)
    job.outbox.metrics({f"test/{name}": of_cases[chosen][name]["mean"] for name in METRICS}, 0)
    from raymed.results.fold_page import OTHER_FOLDS, write_fold_evaluation  # which imports from here

    source = "cross-validation inside the fold's training part" if inner else OTHER_FOLDS
    page = write_fold_evaluation(job, methods[chosen], pooled[chosen], images.get(chosen, ()), source)
    paths = {"run": job.folder, "figures": job.folder / "figures"} | ({"evaluation": page} if page else {})
    extra |= {"level": level, "operating_points": [repeat.thresholds[-1] for repeat in pooled[chosen]]}
    summary = job.finish(figures, paths, best=chosen, **extra)
    before, after = (of_cases[chosen][name]["mean"] for name in ("brier", "brier_calibrated"))
    print(f"calibration ({recipe.decide.calibration}) of {chosen}: Brier score {before:.3f}, afterwards {after:.3f}")
    print("\n".join([*([extra["note"]] if "note" in extra else []), *(f"{k}: {path}" for k, path in paths.items())]))
    print(f"MLflow: {job.where()}")
    return summary


_CHOICE = (
    "best on validation: {best}, of {num} methods. Patients of one fold's validation part are held out in another, so "
    "that its figures are a little too good"
)


def _finished(methods: Mapping[str, Sequence[Unit]]) -> tuple[dict[str, Sequence[Unit]], str]:
    """The methods of which all trainings are finished, and how many are, where some are not."""
    done = {name: [unit.result() is not None for unit in units] for name, units in methods.items()}
    kept = {name: units for name, units in methods.items() if units and all(done[name])}
    total, num = sum(map(len, done.values())), sum(map(sum, done.values()))
    return kept, "" if num == total else f"{num} of {total} trainings are finished"


def _on_validation(units: Sequence[Unit]) -> dict[str, Any]:
    """Means over the validation parts of all folds."""
    whole = [replace(unit, fold=None) for unit in units]
    return summarise_seeds([prediction(unit, "val") for unit in whole], unit_data(whole[0]).grouped_by)


def _write(
    job: Job, methods: Mapping[str, Sequence[Unit]], pooled: Mapping[str, Sequence[OutOfFold]], figures: Any
) -> None:
    """Tables, curves and the methods' scores, each beside its trainings."""
    folder = job.folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    curves = {name: [(repeat.scores, repeat.targets) for repeat in repeats] for name, repeats in pooled.items()}
    draw.pr_roc(folder / "pr_roc.png", curves, figures)
    draw.calibration(folder / "calibration.png", curves, figures)
    for picture in (folder / "pr_roc.png", folder / "calibration.png", draw_losses(folder, methods)):
        job.outbox.artifact(picture, "figures")
    tables = {"table.csv": comparison_csv(figures, METRICS), "table.md": comparison_markdown(figures, METRICS)}
    for name, text in tables.items():
        write_atomic(job.folder / name, text)
        job.outbox.artifact(job.folder / name)
    for name, repeats in pooled.items():
        np.savez(methods[name][0].folder.parent / "out_of_fold.npz", **_arrays(repeats))


def _arrays(repeats: Sequence[OutOfFold]) -> dict[str, Any]:
    """Scores, decisions and folds (R, U), and what is the same in all repeats."""
    first = repeats[0]
    names = ("scores", "decided", "fold", "calibrated")
    stacked: dict[str, Any] = {name: np.stack([getattr(r, name) for r in repeats]) for name in names}
    return stacked | {"targets": first.targets, "patients": first.patients, "units": first.units}


def _title(data: DataSet, level: Level, repeats: Sequence[OutOfFold]) -> str:
    num = len(repeats[0].thresholds) - 1
    return (
        f"out of fold, {num} folds x {len(repeats)}, by {level}, positive = {data.positive}, "
        f"95 % intervals over {over(data)} and repeats"
    )
