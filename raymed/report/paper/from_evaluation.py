"""What a clinical evaluation found, as parts of a `PaperRecord`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from raymed.report.clinical_figures import CalibrationCurve, Level
from raymed.report.clinical_page import ClinicalRecord
from raymed.report.paper.record import Confusion, Curve, Curves, Figures, OperatingPoint, Subgroup
from raymed.report.tables import number

_SYNONYMS = ("recall", "precision", "accuracy_at_0.5", "threshold")


def evaluation_facts(found: ClinicalRecord) -> dict[str, Any]:
    """Fields of a `PaperRecord` that follow from an evaluation: `PaperRecord(**evaluation_facts(found), cohort=...)`.

    Intervals of decisions: see `Statistics.analytic`, which is left to the caller with the rest of `Statistics`.
    """
    headline = found.levels[0]
    independent = headline.num_patients == len(headline.scores)
    readers = {
        name: {metric: _interval(figure, independent) for metric, figure in of["reference"].items()}
        for name, of in found.readers.items()
        if of.get("reference")
    }
    return {
        "unit": headline.unit,
        "positive": found.classes[1],
        "operating_point": OperatingPoint(
            found.operating.get("rule"), float(headline.threshold), found.operating.get("chosen on")
        ),
        "performance": {_name(level): _quoted(level) for level in found.levels},
        "confusion": _confusion(headline),
        "subgroups": [_subgroup(group) for group in found.subgroups],
        "readers": readers,
        "agreement": {f"Kappa, {names}": of["kappa"] for names, of in found.agreement.items() if "kappa" in of},
        "curves": Curves(
            {_name(level): _roc(level) for level in found.levels},
            {_name(level): _precision_recall(level) for level in found.levels},
            {name.capitalize(): _calibration(curve) for name, curve in found.calibration.items()},
            _decision(found.decision) if found.decision else {},
        ),
    }


def _name(level: Level) -> str:
    return level.name.capitalize()


def _quoted(level: Level) -> Figures:
    """The level's figures with the intervals that a paper quotes."""
    independent = level.num_patients == len(level.scores)
    return {m: _interval(figure, independent) for m, figure in level.figures.items() if m not in _SYNONYMS}


def _interval(figure: Mapping[str, Any], independent: bool) -> Mapping[str, Any]:
    low, high = number(figure.get("analytic_low")), number(figure.get("analytic_high"))
    if math.isnan(low) or math.isnan(high):
        return figure
    if not independent:
        low, high = np.nanmin([low, number(figure["ci_low"])]), np.nanmax([high, number(figure["ci_high"])])
    return dict(figure) | {"ci_low": float(low), "ci_high": float(high)}


def _confusion(level: Level) -> Confusion:
    counts = np.bincount(2 * np.asarray(level.targets, int) + level.decided, minlength=4).tolist()
    tn, fp, fn, tp = counts
    return Confusion(tp, fp, fn, tn)


def _subgroup(group: Mapping[str, Any]) -> Subgroup:
    independent = group.get("num_patients") == group["num"]
    figures = {name: group[name] for name in ("auroc", "sensitivity", "specificity") if group.get(name)}
    return Subgroup(
        group["attribute"],
        group["group"],
        group["num"],
        group["num_positive"],
        {name: _interval(figure, independent) for name, figure in figures.items()},
    )


def _roc(level: Level) -> Curve:
    from sklearn.metrics import roc_curve

    false_positive_rate, sensitivity, _ = roc_curve(level.targets, level.scores)
    return Curve(false_positive_rate.tolist(), sensitivity.tolist())


def _precision_recall(level: Level) -> Curve:
    """Precision as the step function whose area is the average precision: of the thresholds with one recall it has the
    highest, since those below it add no more than false positives."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(level.targets, level.scores)
    recall, precision = recall[::-1], precision[::-1]
    gains = np.flatnonzero(np.diff(recall)) + 1
    recall, precision = np.append(0.0, recall[gains]), precision[gains]
    return Curve(np.repeat(recall, 2)[1:-1].tolist(), np.repeat(precision, 2).tolist())


def _calibration(curve: CalibrationCurve) -> Curve:
    columns = ("mean_score", "fraction", "ci_low", "ci_high")
    x, y, low, high = ([number(b.get(name)) for b in curve.bins] for name in columns)
    return Curve(x, y, low, high)


def _decision(found: Mapping[str, np.ndarray]) -> dict[str, Curve]:
    lines = {name: np.asarray(values).tolist() for name, values in found.items()}
    x = lines["thresholds"]
    return {
        "Model": Curve(x, lines["model"], lines.get("model_low"), lines.get("model_high")),
        "Treat all": Curve(x, lines["treat_all"]),
        "Treat none": Curve(x, [0.0] * len(x)),
    }
