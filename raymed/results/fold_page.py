"""The clinical page of a cross-validation: what the procedure is worth, on every case once a repeat.

    evaluation/evaluation.html               the page                  evaluation/figures/*.png    its figures
    evaluation/cases_to_read_again.csv       disputed cases            facts.json                  what a paper tells

Each fold has a threshold of its own (`raymed.results.folds`), so no one threshold gives the decisions. The page keeps
the scores of `OutOfFold`, each beside the threshold that decided it (`Level.thresholds`): table, ROC curve, counts and
gallery are then of the same numbers as the run's table and out_of_fold.npz. To move scores until one threshold fits
would change their order between folds, and with it the AUROC. Calibrated probabilities, fitted on other folds than they
are used on, serve what is told of probabilities: Brier score, ECE, calibration and decision curve. Ranking is not told
of them: a fold with many positives leaves few to the others, whose calibration then scores it lower.

The first table tells means over repeats. What shows single cases is of one repeat, the one whose AUPRC is the median.

Source of the last argument: Parker, Guenter, Bedo, "Stratification bias in low signal microarray studies", BMC
Bioinformatics 8:326, 2007.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from raymed.bundle import NOT_STATED, Bundle
from raymed.data.dataset import DataSet
from raymed.data.folds import RepeatedFold
from raymed.metrics.bootstrap import Figure, bootstrap_ci
from raymed.metrics.classification import binary_metrics
from raymed.metrics.levels import Level as LevelName
from raymed.metrics.levels import LevelTable, unit_numbers
from raymed.metrics.operating import confusion, decision_statistic, ratio_interval, wilson
from raymed.report.clinical_figures import Level
from raymed.report.clinical_page import ClinicalRecord
from raymed.report.read_again import Doubt, find_doubts
from raymed.results.clinical_parts import (
    MOST,
    attributes_of,
    class_names,
    counted,
    level_of,
    parts,
    sentence,
    statistic_of,
)
from raymed.results.folds import OutOfFold
from raymed.results.scores import Scored, groups_of, members
from raymed.results.trained import keep_record
from raymed.results.views import pseudonyms, shown_cases
from raymed.tasks.classifier import ClassifierRecipe
from raymed.tasks.predictor import Predictor
from raymed.train.runs.job import Job
from raymed.train.unit import Unit, load_data

OTHER_FOLDS = "the out-of-fold scores of the other folds"


def write_fold_evaluation(
    job: Job,
    units: Sequence[Unit],
    repeats: Sequence[OutOfFold],
    images: Sequence[OutOfFold] = (),
    chosen_on: str = OTHER_FOLDS,
) -> Path | None:
    """Write evaluation.html, cases_to_read_again.csv and facts.json of one method; returns the page's path, or None
    where a training is not finished. Arguments as `fold_record`.

    Pictures are shown, and the page is logged, only of sets that are marked deidentified.
    """
    if not all(unit.result() for unit in units):
        return None
    recipe = cast(ClassifierRecipe, units[0].recipe)
    data = load_data(recipe, units[0].cache)
    title, device = f"{job.kind.replace('_', ' ')}: {job.name}", str(job.config.compute.resolved_device())
    pictures = recipe.data.deidentified
    record = fold_record(
        units, repeats, data, images, title=title, chosen_on=chosen_on, pictures=pictures, device=device
    )
    return keep_record(job, record, data, job.key)


def fold_record(
    units: Sequence[Unit],
    repeats: Sequence[OutOfFold],
    data: DataSet,
    images: Sequence[OutOfFold] = (),
    *,
    title: str,
    chosen_on: str = OTHER_FOLDS,
    pictures: bool = False,
    device: str = "cpu",
    n_boot: int = 2000,
) -> ClinicalRecord:
    """What a finished cross-validation found. What the record says of its making is left to the caller.

    Args:
        units: of one method, over repeats (and seeds). repeats: `out_of_fold` of them.
        data: without folds. images: the repeats by image, where something else is decided about.
        chosen_on: where thresholds and calibrations come from, in words.
        pictures: whether images may be shown. n_boot: resamples of every interval.
    """
    recipe = cast(ClassifierRecipe, units[0].recipe)
    scored = [_scored(repeat, recipe.decide.level(data), data) for repeat in repeats]
    beside = [_scored(repeat, "image", data) for repeat in images]
    at = _median(scored)
    first, level = scored[at], _level(scored, at, n_boot)
    inside = members(first.table, data, np.arange(len(data)))
    names = pseudonyms(first.table.level, recipe.resolved_data, data, inside)
    attributes, strange = attributes_of(data, inside)
    own, classes = _units_of_repeat(units, at), class_names(data)
    bundles = (Bundle.load(unit.folder / "bundle") for unit in own if pictures)
    predictors = (Predictor.from_bundle(bundle, device) for bundle in bundles)
    return ClinicalRecord(
        title=title,
        data=f"Cross-validation, {_times(len(own), 'fold')}, {_times(len(repeats), 'repeat')}: {counted(first)}.",
        sentence=("On average over the repeats, " if len(repeats) > 1 else "") + sentence(level, classes),
        levels=[level, *([_level(beside, at, n_boot)] if beside else [])],
        operating=_operating(recipe, repeats[at], first, chosen_on),
        cases=shown_cases(predictors, repeats[at].fold, data, first, inside, names, attributes, MOST),
        shown=_shown(at, len(repeats)),
        read_again=_doubts(scored, names, classes),
        more=_more(scored, chosen_on),
        model=_networks(units, data, recipe),
        notes=[*_notes(scored, repeats, recipe, chosen_on), *strange],
        **parts(first, data, inside, attributes, n_boot),
    )


def _scored(repeat: OutOfFold, level: LevelName, data: DataSet) -> Scored:
    numbers = unit_numbers(level, data.patients, data.cases, data.sides, data.rows)
    num_images = np.unique(numbers, return_counts=True)[1]
    table = LevelTable(level, repeat.scores, repeat.targets, repeat.patients, repeat.units, num_images)
    thresholds = np.array(repeat.thresholds)[repeat.fold]
    groups, unit = groups_of(data, table)
    return Scored(table, repeat.scores, math.nan, groups, unit, thresholds, repeat.calibrated)


def _median(scored: Sequence[Scored]) -> int:
    """The repeat with the median AUPRC; of an even number the lower of the two in the middle."""
    auprc = [binary_metrics(of.scores, of.table.targets, 0.5)["auprc"] for of in scored]
    return int(np.argsort(auprc, kind="stable")[(len(auprc) - 1) // 2])


def _shown(at: int, num: int) -> str:
    which = "the median" if num % 2 else "the lower of the two in the middle"
    return f"repeat {at + 1} of {num}, whose AUPRC is {which}" if num > 1 else ""


def _times(num: int, what: str) -> str:
    return f"{num} {what}{'s' * (num > 1)}"


def _units_of_repeat(units: Sequence[Unit], at: int) -> list[Unit]:
    """Those that `OutOfFold.fold` counts, in its order."""
    keys = [(unit.seed, cast(RepeatedFold, unit.fold).repeat) for unit in units]
    wanted = list(dict.fromkeys(keys))[at]
    return [unit for unit, key in zip(units, keys, strict=True) if key == wanted]


def _level(scored: Sequence[Scored], at: int, n_boot: int) -> Level:
    """Scores and decisions of one repeat, with the figures of all of them."""
    level = level_of(scored[at], n_boot=n_boot)
    if len(scored) == 1:
        return level
    groups = [of.groups for of in scored]
    options: dict[str, Any] = scored[0].options | {"n_boot": n_boot}
    figures = bootstrap_ci([statistic_of(of) for of in scored], groups, **options)
    decisions = bootstrap_ci([decision_statistic(of.decided, of.table.targets) for of in scored], groups, **options)
    means = figures | decisions | _mean_decisions(scored, decisions)
    return replace(level, figures=means, own=level.figures, num_repeats=len(scored))


def _mean_decisions(scored: Sequence[Scored], found: dict[str, Figure]) -> dict[str, Any]:
    """Figures of decisions with the analytic intervals of the mean of the repeats' counts: repeats decide about the
    same units, so they make them no more."""
    cells: Any = np.mean([list(confusion(of.decided, of.table.targets).values()) for of in scored], axis=0)
    tp, fn, fp, tn = cells.round(9).tolist()
    positive, negative = round(tp + fn), round(tn + fp)
    shares = {
        "sensitivity": (tp, positive),
        "specificity": (tn, negative),
        "ppv": (tp, tp + fp),
        "npv": (tn, tn + fn),
        "accuracy": (tp + tn, positive + negative),
    }
    ratios = {
        "lr_positive": ratio_interval(tp, positive, fp, negative),
        "lr_negative": ratio_interval(fn, positive, tn, negative),
    }
    told: dict[str, Any] = {}
    for name, (count, total) in shares.items():
        low, high = wilson(count, total)
        interval = {"analytic_low": low, "analytic_high": high, "method": "Wilson"}
        told[name] = {**found[name], **interval, "count": count, "total": total}
    for name, (low, high) in ratios.items():
        told[name] = {**found[name], "analytic_low": low, "analytic_high": high, "method": "log"}
    return told


def _doubts(scored: Sequence[Scored], names: Sequence[str], classes: tuple[str, str]) -> list[Doubt]:
    scores, decided = (np.stack([getattr(of, name) for of in scored]) for name in ("scores", "decided"))
    table = scored[0].table
    return find_doubts(names, scores, decided, table.targets, table.num_images, classes)


def _more(scored: Sequence[Scored], chosen_on: str) -> list[str]:
    """Who decided, and how steadily."""
    unit = scored[0].table.level.split("+")[-1]
    said = [
        f"Every {unit} was decided by a network that had not seen its patient, at a threshold from {chosen_on}. These "
        "are figures of the procedure, not of one model."
    ]
    if len(scored) > 1:
        decided = np.stack([of.decided for of in scored])
        differ = int((decided != decided[0]).any(axis=0).sum())
        said.append(f"{differ} of {decided.shape[1]} {unit}s are not decided alike in every repeat.")
    return said


def _operating(recipe: ClassifierRecipe, repeat: OutOfFold, scored: Scored, chosen_on: str) -> dict[str, Any]:
    *of_folds, of_all = repeat.thresholds
    return {
        "rule": recipe.decide.operating_point,
        "chosen on": chosen_on,
        "unit": scored.table.level,
        "scores of its images": recipe.decide.aggregate,
        "thresholds of the folds": ", ".join(f"{threshold:.3f}" for threshold in of_folds),
        "threshold of all folds together": round(of_all, 6),
    }


def _notes(
    scored: Sequence[Scored], repeats: Sequence[OutOfFold], recipe: ClassifierRecipe, chosen_on: str
) -> list[str]:
    changed = [
        not np.array_equal(of.probabilities[repeat.fold == k], of.scores[repeat.fold == k])
        for of, repeat in zip(scored, repeats, strict=True)
        for k in range(len(repeat.thresholds) - 1)
    ]
    return [
        "Scores, their ranking and the decisions are those of the run's table and of out_of_fold.npz.",
        "Brier score, ECE, accuracy at 0.5, calibration and decision curve are of calibrated probabilities. "
        f"Calibration ({recipe.decide.calibration}) comes from {chosen_on}; it helped, and was applied, in "
        f"{sum(changed)} of {len(changed)} folds.",
    ]


def _networks(units: Sequence[Unit], data: DataSet, recipe: ClassifierRecipe) -> dict[str, Any]:
    return {
        "networks": f"{len(units)}, one a fold and repeat; none of them is for use",
        "run": units[0].parent or NOT_STATED,
        "data": data.fingerprint,
        "method": recipe.method,
        "backbone": recipe.model.backbone,
    }
