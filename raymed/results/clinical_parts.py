"""What the clinical pages of a model and of a cross-validation have in common: figures of one level, and the parts of a
`ClinicalRecord` that follow from scores, data and nothing else."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raymed.data.dataset import DataSet
from raymed.metrics.agreement import UNREAD, agreement_figures, reader_points, readings_of
from raymed.metrics.bootstrap import Figure, bootstrap_ci
from raymed.metrics.classification import Statistic, binary_statistic
from raymed.metrics.decision_curve import decision_curve
from raymed.metrics.operating import decision_figures, fixed_rate_statistic
from raymed.metrics.reliability import calibration_curve, recalibration_statistic
from raymed.metrics.subgroups import age_band, subgroup_figures
from raymed.report.clinical_figures import CalibrationCurve, Level, widest
from raymed.report.tables import decimal, interval
from raymed.results.scores import Scored

MOST = 12
"""Cases of each result in the gallery."""
_DECISIONS = ("accuracy", "sensitivity", "recall", "specificity", "precision", "f1")
_PROBABILITIES = ("brier", "ece", "accuracy_at_0.5")
_AGE = re.compile(r"\d{1,3}")
_CASES_A_BIN = 15


def level_of(scored: Scored, prevalences: Sequence[float] = (), n_boot: int = 2000) -> Level:
    """A level of a page, with ranking, decisions, and rates at fixed rates."""
    options: dict[str, Any] = scored.options | {"n_boot": n_boot}
    targets, groups = scored.table.targets, scored.groups
    found = dict(bootstrap_ci([statistic_of(scored)], [groups], **options))
    found |= decision_figures(scored.decided, targets, groups, prevalences=prevalences, **options)
    thresholds = scored.thresholds
    return Level(
        scored.table.level, scored.scores, targets, scored.threshold, found, scored.num_patients, thresholds=thresholds
    )


def statistic_of(scored: Scored) -> Statistic:
    """`binary_metrics` and rates at fixed rates of row counts: the ranking is that of the scores, decisions as they
    fell, and what is told of probabilities is told of the calibrated ones."""
    scores, targets = scored.scores, scored.table.targets
    ranking, rates = binary_statistic(scores, targets, 0.5), fixed_rate_statistic(scores, targets)
    decisions = binary_statistic(scored.decided.astype(float), targets, 0.5)
    probabilities = binary_statistic(scored.probabilities, targets, 0.5)

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        found = ranking(counts)
        for names, of in ((_DECISIONS, decisions(counts)), (_PROBABILITIES, probabilities(counts))):
            found |= {name: of[name] for name in names}
        return found | rates(counts)

    return statistic


def parts(
    scored: Scored,
    data: DataSet,
    inside: Sequence[np.ndarray],
    attributes: Mapping[str, Sequence[str]],
    n_boot: int = 2000,
) -> dict[str, Any]:
    """Fields of a `ClinicalRecord`: classes, calibration, decision, readers, agreement, subgroups.

    Args:
        scored: U units. inside: the images of each. attributes: name -> U texts.
    """
    options: dict[str, Any] = scored.options | {"n_boot": n_boot}
    readings, names = _readings(data, inside)
    both = len(np.unique(scored.table.targets)) == 2
    curve = decision_curve(scored.probabilities, scored.table.targets, scored.groups, **options) if both else None
    return {
        "classes": class_names(data),
        "calibration": _calibration(scored, options) if both else {},
        "decision": None if curve is None else vars(curve),
        "readers": _reader_figures(readings, names, scored, options),
        "agreement": agreement_figures(readings, names, scored.groups, **options) if len(names) > 1 else {},
        "subgroups": _subgroups(scored, attributes, options),
    }


def class_names(data: DataSet) -> tuple[str, str]:
    """What targets 0 and 1 are called."""
    others = [name for name in data.classes if name != data.positive]
    return others[0] if len(others) == 1 else f"not {data.positive}", data.positive


def attributes_of(data: DataSet, inside: Sequence[np.ndarray]) -> tuple[dict[str, list[str]], list[str]]:
    """Attribute -> value of each unit, of those that tell units apart, and what is to be noted; ages as bands.

    Images of one unit that differ in it, as two scanners of one case, are "several".
    """
    found, notes = {}, []
    for name, values in data.groups.items():
        if name == "age":
            whole = [age if _AGE.fullmatch(age) else "" for age in values.tolist()]
            if strange := sum(bool(age) for age in values.tolist()) - sum(map(bool, whole)):
                notes.append(f"age: {strange} rows are not in whole years, and count as not stated")
            values = np.array(age_band(whole))
        of_units = [_common(values[images]) for images in inside]
        if len(set(of_units)) > 1:
            found[name] = of_units
    return found, notes


def sentence(level: Level, classes: tuple[str, str]) -> str:
    """What the decisions came to."""
    said = []
    for metric, name, verb in (("sensitivity", classes[1], "found"), ("specificity", classes[0], "cleared")):
        of = level.figures[metric]
        if of["total"]:
            said.append(
                f"{round(of['count'], 1):g} of {of['total']} {name} {level.unit}s are {verb} ({metric} {_value(of)})"
            )
    found = "; ".join(said) + "."
    return found if not level.has_both_classes else f"{found} AUROC {_value(level.figures['auroc'])}."


def counted(scored: Scored) -> str:
    """79 cases (158 images) of 76 patients."""
    unit, num = scored.table.level.split("+")[-1], len(scored.table)
    images = "" if unit == "image" else f" ({scored.table.num_images.sum()} images)"
    return f"{num} {unit}s{images}" + ("" if scored.num_patients is None else f" of {scored.num_patients} patients")


def _calibration(scored: Scored, options: Mapping[str, Any]) -> dict[str, CalibrationCurve]:
    """Of the raw scores and the calibrated ones; of one of them where calibration changes nothing."""
    ways = {"before calibration": scored.table.scores, "after calibration": scored.probabilities}
    if np.allclose(*ways.values(), rtol=0, atol=1e-12):
        ways = {"as predicted": scored.probabilities}
    return {way: _curve(scores, scored, options) for way, scores in ways.items()}


def _curve(scores: np.ndarray, scored: Scored, options: Mapping[str, Any]) -> CalibrationCurve:
    targets, groups = scored.table.targets, scored.groups
    num_bins = int(np.clip(len(scores) // _CASES_A_BIN, 3, 10))
    bins = calibration_curve(scores, targets, groups, num_bins=num_bins, **options)
    return CalibrationCurve(bins, bootstrap_ci([recalibration_statistic(scores, targets)], [groups], **options), scores)


def _readings(data: DataSet, inside: Sequence[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """(U, R) readings of units, 1 = positive, and the names of those R readers who have read any.

    A unit is positive to a reader who has called any of its images so.
    """
    columns = {name: texts.tolist() for name, texts in data.readers.items()}
    if not columns:
        return np.empty((len(inside), 0), np.int64), []
    by_class = readings_of(columns, data.classes)
    positive = data.classes.index(data.positive)
    by_image = np.where(by_class == UNREAD, UNREAD, (by_class == positive).astype(np.int64))
    readings = np.stack([by_image[images].max(axis=0) for images in inside])
    some = (readings != UNREAD).any(axis=0)
    names = [name.removeprefix("label_").replace("_", " ") for name, kept in zip(columns, some, strict=True) if kept]
    return readings[:, some], names


def _reader_figures(
    readings: np.ndarray, names: Sequence[str], scored: Scored, options: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, Figure]]]:
    """Each reader against the reference standard, and against the others where there are such."""
    targets, groups = scored.table.targets, scored.groups
    if len(names) > 1:
        return reader_points(readings, names, groups, targets, **options)  # type: ignore[return-value]
    if not names:
        return {}
    read = readings[:, 0] != UNREAD
    own = decision_figures(readings[read, 0] == 1, targets[read], groups[read], **options)
    return {names[0]: {"reference": dict(own)}}


def _subgroups(
    scored: Scored, attributes: Mapping[str, Sequence[str]], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Ranking by the scores, and decisions as they fell, which are scores of 0 and 1."""
    targets, groups = scored.table.targets, scored.groups
    ranked, decided = (
        subgroup_figures(scores, targets, groups, 0.5, attributes, **options)
        for scores in (scored.scores, scored.decided.astype(float))
    )
    rates = [{name: getattr(group, name) for name in ("sensitivity", "specificity")} for group in decided]
    return [vars(group) | of_group for group, of_group in zip(ranked, rates, strict=True)]


def _common(values: np.ndarray) -> str:
    stated = sorted(set(values.tolist()) - {""})
    return "several" if len(stated) > 1 else (stated or [""])[0]


def _value(of: Mapping[str, Any]) -> str:
    return f"{decimal(of['mean'])}, 95 % CI {interval(widest(of)).replace(' – ', ' to ')}"
