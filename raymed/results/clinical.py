"""A clinical evaluation of one classifier on one data set, as its page tells it.

Nothing is fitted here: threshold and calibration are the bundle's, chosen before. Figures are of what the bundle
decides about, cases say, with those of images beside them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raymed.bundle import NOT_STATED, Bundle
from raymed.data.dataset import DataSet
from raymed.metrics.agreement import UNREAD, agreement_figures, reader_points, readings_of
from raymed.metrics.bootstrap import Figure, bootstrap_ci
from raymed.metrics.calibration import band_figures
from raymed.metrics.classification import binary_statistic
from raymed.metrics.decision_curve import decision_curve
from raymed.metrics.operating import decision_figures, fixed_rate_statistic
from raymed.metrics.reliability import calibration_curve, recalibration_statistic
from raymed.metrics.subgroups import age_band, subgroup_figures
from raymed.report.clinical_figures import CalibrationCurve, Level, widest
from raymed.report.clinical_page import ClinicalRecord
from raymed.report.tables import decimal, interval
from raymed.results.scores import Answer, Scored, answer, members
from raymed.results.views import shown_cases
from raymed.tasks.predictor import Predictor

MOST = 12
"""Cases of each result in the gallery."""
_AGE = re.compile(r"\d{1,3}")
_CASES_A_BIN = 15


def clinical_record(
    predictor: Predictor,
    data: DataSet,
    where: np.ndarray,
    *,
    title: str,
    about: str = "External test set",
    pictures: bool = False,
    prevalences: Sequence[float] = (),
    n_boot: int = 2000,
) -> ClinicalRecord:
    """Evaluate a model. What the record says of its making (command, config, environment) is left to the caller.

    Args:
        data: read with the model's preprocessing, its positive class the model's.
        where: (N,) indices of the images to score.
        title: of the page. about: what the images are.
        pictures: whether images may be shown: only of sets that are known to show nobody's identity.
        prevalences: at which predictive values are told. n_boot: resamples of every interval.

    Raises:
        UserError: as `answer`; a reading that is no class.
    """
    answered = answer(predictor, data, where)
    first = answered.levels[0]
    inside = members(first, data, where)
    attributes, strange = _attributes(data, inside)
    levels = [_level(scored, prevalences, n_boot) for scored in answered.levels]
    readings, names = _readings(data, inside, predictor.bundle.classes["names"])
    options: dict[str, Any] = first.options | {"n_boot": n_boot}
    both = levels[0].has_both_classes
    classes = class_names(data)
    return ClinicalRecord(
        title=title,
        data=f"{about}: {_counted(answered, data)}.",
        sentence=_sentence(levels[0], classes),
        levels=levels,
        classes=classes,
        operating=_operating(predictor, first),
        calibration=_calibration(first, options) if both else {},
        decision=vars(decision_curve(first.scores, first.table.targets, first.groups, **options)) if both else None,
        readers=_reader_figures(readings, names, first, options),
        agreement=agreement_figures(readings, names, first.groups, **options) if len(names) > 1 else {},
        subgroups=[
            vars(group)
            for group in subgroup_figures(
                first.scores, first.table.targets, first.groups, first.threshold, attributes, **options
            )
        ],
        cases=shown_cases(predictor, data, first, inside, attributes, MOST, pictures),
        more=_more(predictor, answered),
        model=_about(predictor.bundle),
        notes=["Threshold and calibration are the model's own: nothing was fitted to these images.", *strange],
    )


def class_names(data: DataSet) -> tuple[str, str]:
    """What targets 0 and 1 are called."""
    others = [name for name in data.classes if name != data.positive]
    return others[0] if len(others) == 1 else f"not {data.positive}", data.positive


def _level(scored: Scored, prevalences: Sequence[float], n_boot: int) -> Level:
    """Ranking, decisions, and rates at fixed rates."""
    scores, targets, groups = scored.scores, scored.table.targets, scored.groups
    options: dict[str, Any] = scored.options | {"n_boot": n_boot}
    statistics = [binary_statistic(scores, targets, scored.threshold), fixed_rate_statistic(scores, targets)]
    found = {k: of for s in statistics for k, of in bootstrap_ci([s], [groups], **options).items()}
    found |= decision_figures(scored.decided, targets, groups, prevalences=prevalences, **options)
    return Level(scored.table.level, scores, targets, scored.threshold, found, scored.num_patients)


def _calibration(scored: Scored, options: Mapping[str, Any]) -> dict[str, CalibrationCurve]:
    """Of the raw scores and the calibrated ones; of one of them where calibration changes nothing."""
    ways = {"before calibration": scored.table.scores, "after calibration": scored.scores}
    if np.allclose(scored.table.scores, scored.scores, rtol=0, atol=1e-12):
        ways = {"as predicted": scored.scores}
    return {way: _curve(scores, scored, options) for way, scores in ways.items()}


def _curve(scores: np.ndarray, scored: Scored, options: Mapping[str, Any]) -> CalibrationCurve:
    targets, groups = scored.table.targets, scored.groups
    num_bins = int(np.clip(len(scores) // _CASES_A_BIN, 3, 10))
    bins = calibration_curve(scores, targets, groups, num_bins=num_bins, **options)
    return CalibrationCurve(bins, bootstrap_ci([recalibration_statistic(scores, targets)], [groups], **options))


def _readings(data: DataSet, inside: Sequence[np.ndarray], classes: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """(U, R) readings of units, 1 = positive, and the names of those R readers who have read any.

    A unit is positive to a reader who has called any of its images so.
    """
    columns = {name: texts.tolist() for name, texts in data.readers.items()}
    if not columns:
        return np.empty((len(inside), 0), np.int64), []
    by_class = readings_of(columns, classes)
    positive = classes.index(data.positive)
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


def _attributes(data: DataSet, inside: Sequence[np.ndarray]) -> tuple[dict[str, list[str]], list[str]]:
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


def _common(values: np.ndarray) -> str:
    stated = sorted(set(values.tolist()) - {""})
    return "several" if len(stated) > 1 else (stated or [""])[0]


def _sentence(level: Level, classes: tuple[str, str]) -> str:
    """What the decisions came to."""
    parts = []
    for metric, name, verb in (("sensitivity", classes[1], "found"), ("specificity", classes[0], "cleared")):
        of = level.figures[metric]
        if of["total"]:
            parts.append(f"{of['count']} of {of['total']} {name} {level.unit}s are {verb} ({metric} {_value(of)})")
    sentence = "; ".join(parts) + "."
    return sentence if not level.has_both_classes else f"{sentence} AUROC {_value(level.figures['auroc'])}."


def _value(of: Mapping[str, Any]) -> str:
    return f"{decimal(of['mean'])}, 95 % CI {interval(widest(of)).replace(' – ', ' to ')}"


def _counted(answered: Answer, data: DataSet) -> str:
    """79 cases (158 images) of 76 patients."""
    first = answered.levels[0]
    unit, num = first.table.level.split("+")[-1], len(first.table)
    images = "" if unit == "image" else f" ({len(answered.where)} images)"
    patients = len(np.unique(data.patients[answered.where]))
    return f"{num} {unit}s{images}" + (f" of {patients} patients" if data.has_patients else "")


def _operating(predictor: Predictor, scored: Scored) -> dict[str, Any]:
    point = predictor.bundle.operating_point
    facts = {
        "rule": point.get("criterion", NOT_STATED),
        "chosen on": point.get("chosen_on", NOT_STATED),
        "unit": scored.table.level,
        "scores of its images": point.get("aggregate", "mean"),
        "threshold": round(scored.threshold, 6),
        "threshold before calibration": round(point["threshold"], 6),
    }
    return facts | ({} if point.get("met", True) else {"rule met there": False})


def _more(predictor: Predictor, answered: Answer) -> list[str]:
    """How many decisions are not to be trusted, and images that are not like those the model knows."""
    first, band, found = answered.levels[0], predictor.bundle.uncertain_band, []
    unit = first.table.level.split("+")[-1]
    if band:
        at = predictor.bundle.operating_point["threshold"]
        of = band_figures(first.table.scores, first.table.targets, at, band["low"], band["high"])
        referred, outside, inside = (_share(of[n]) for n in ("referred", "accuracy_outside", "accuracy_inside"))
        found.append(
            f"{referred} of {unit}s lie in the model's uncertain band, for a person to read. Of decisions outside it "
            f"{outside} are right, inside it {inside}."
        )
    if answered.foreign is not None and answered.foreign.any():
        num = len(answered.foreign)
        found.append(f"{int(answered.foreign.sum())} of {num} images are not like those that the model was trained on.")
    return found


def _share(value: float) -> str:
    return "none" if np.isnan(value) else f"{100 * value:.0f} %"


def _about(bundle: Bundle) -> dict[str, Any]:
    licences = {f"licence of {part}": what["name"] for part, what in bundle.licences.items()}
    calibration = bundle.calibration.get("method", "none") if bundle.calibration.get("applied") else "none"
    return {
        "run": bundle.provenance.get("run_key", NOT_STATED),
        "training data": bundle.provenance.get("data", NOT_STATED),
        "backbone": bundle.model["encoder"].get("backbone", NOT_STATED),
        "calibration": calibration,
        "intended use": bundle.intended_use,
    } | licences
