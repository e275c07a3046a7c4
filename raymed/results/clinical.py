"""A clinical evaluation of one classifier on one data set, as its page tells it.

Nothing is fitted here: threshold and calibration are the bundle's, chosen before. Figures are of what the bundle
decides about, cases say, with those of images beside them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from raymed.bundle import NOT_STATED, Bundle
from raymed.data.dataset import DataSet
from raymed.metrics.calibration import band_figures
from raymed.report.clinical_page import ClinicalRecord
from raymed.results.clinical_parts import MOST, attributes_of, class_names, counted, level_of, parts, sentence
from raymed.results.scores import Answer, Scored, answer, members
from raymed.results.views import row_names, shown_cases
from raymed.tasks.predictor import Predictor


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
    inside = members(first.table, data, where)
    attributes, strange = attributes_of(data, inside)
    levels = [level_of(scored, prevalences, n_boot) for scored in answered.levels]
    names, by = row_names(first.table.level, data, inside), np.zeros(len(inside), np.int64)
    return ClinicalRecord(
        title=title,
        data=f"{about}: {counted(first)}.",
        sentence=sentence(levels[0], class_names(data)),
        levels=levels,
        operating=_operating(predictor, first),
        cases=shown_cases([predictor] * pictures, by, data, first, inside, names, attributes, MOST),
        more=_more(predictor, answered),
        model=_about(predictor.bundle),
        notes=["Threshold and calibration are the model's own: nothing was fitted to these images.", *strange],
        **parts(first, data, inside, attributes, n_boot),
    )


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
