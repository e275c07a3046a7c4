"""What a classifier's card says beyond what all cards say."""

from typing import Any

from raymed.bundle import Bundle
from raymed.registry.card_text import (
    ELSEWHERE,
    SUBGROUPS,
    interval_text,
    million_weights,
    percent,
    pixels_format,
    unknown_patients,
)

ROWS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "precision": "Positive predictive value",
    "f1": "F1",
    "accuracy": "Accuracy",
    "brier": "Brier score",
    "ece": "Expected calibration error",
}
FEW = 50  # positives; a 95 % interval of the sensitivity is then wider than about +-0.1


def context(bundle: Bundle) -> dict[str, Any]:
    """Names of `classifier_card.md.j2`."""
    positive, others = _classes(bundle)
    return {
        "title": f"Classifier of {positive}",
        "positive": positive,
        "others": others,
        "classes": bundle.classes["names"],
        "network": _network(bundle),
        "seeds": bundle.metrics.get("seeds"),
        "metrics": {split: bundle.metrics.get(split, {}) for split in ("val", "test")},
        "rows": ROWS.items(),
        "intervals": _intervals(bundle),
        "point": bundle.operating_point,
        "calibration": _calibration(bundle.calibration),
        "band": _band(bundle.uncertain_band),
        "foreign": bundle.ood.get("separation", {}).get("foreign"),
        "fingerprint_of": "pixels, labels and splits",
        "limitations": _limitations(bundle),
    }


def described(bundle: Bundle) -> dict[str, Any]:
    """The keys of metadata.json that speak of this kind of model."""
    positive, others = _classes(bundle)
    probability = {
        "type": "probabilities",
        "format": "classification",
        "modality": "n/a",
        "num_channels": 1,
        "spatial_shape": [],
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": False,
        "channel_def": {"0": positive},
    }
    return {
        "name": f"Classifier of {positive}",
        "task": f"Binary classification of images: {positive} against {', '.join(others)}",
        "description": f"{_network(bundle)}; answers the probability of {positive}",
        "label_classes": f"1 = {positive}, 0 = {', '.join(others)}",
        "pred_classes": f"probability of {positive}",
        "network_data_format": {
            "inputs": {"pixels": pixels_format(bundle)},
            "outputs": {"probability": probability},
        },
    }


def _classes(bundle: Bundle) -> tuple[str, list[str]]:
    positive = bundle.classes["positive"]
    return positive, [name for name in bundle.classes["names"] if name != positive]


def _network(bundle: Bundle) -> str:
    return f"{bundle.model['encoder']['backbone']} with a linear head, {million_weights(bundle)}"


def _intervals(bundle: Bundle) -> str:
    """What the brackets of the table are."""
    seeds = bundle.metrics.get("seeds", {}).get("test", {}).get("auroc", {})
    over = f" The last column is the mean over {seeds['n']} trainings that differ in their seed." if seeds else ""
    return interval_text([f for split in ("test", "val") for f in bundle.metrics.get(split, {}).values()]) + over


def _calibration(calibration: dict[str, Any]) -> str:
    if not calibration.get("applied"):
        return f"None: {calibration.get('reason', 'it was not fitted')}. The probability is the network's own."
    change = ", ".join(
        f"{label} {calibration['before'][name]:.3f} -> {calibration['after'][name]:.3f}"
        for name, label in {"nll": "log loss", "brier": "Brier score", "ece": "ECE"}.items()
    )
    kind = calibration.get("kind", "platt")
    if kind == "isotonic":
        formula = f"bends with {len(calibration['logits'])} knots (isotonic regression on the logit)"
    else:
        formula = f"= sigmoid(logit / {calibration['temperature']:.3g} {calibration.get('bias', 0.0):+.3g})"
    return f"Probability {formula}, fitted on the validation split. Out of fold: {change}."


def _band(band: dict[str, Any]) -> str:
    if not band:
        return "None: it was not fitted."
    referred, missed, false_alarms = (percent(band["val"][name]) for name in ("referred", "missed", "false_alarms"))
    return (
        f"A raw probability from {band['low']:.3f} to {band['high']:.3f} is answered with `uncertain`: the decision is "
        f"not to be trusted, a person reads the image. On validation these are {referred} of the images; {missed} of "
        f"the positives lie below and {false_alarms} of the negatives above ({band['reason']})."
    )


def _limitations(bundle: Bundle) -> list[str]:
    """What follows from how the model was made."""
    positive, _ = _classes(bundle)
    counts = bundle.provenance.get("counts", {})
    lines = [
        ELSEWHERE,
        "Probabilities and predictive values hold at the prevalence of the data above, not at that of a clinic.",
        SUBGROUPS,
        f"It answers one question, {positive} or not, and says nothing of any other finding.",
        *unknown_patients(bundle),
    ]
    if counts and counts["test"][positive] < FEW:
        lines.append(f"The test split has {counts['test'][positive]} images of {positive}: sensitivity is imprecise.")
    if bundle.ood:
        lines.append(
            "The check for foreign images finds what is far from the training images; it does not vouch for the rest."
        )
    return lines
