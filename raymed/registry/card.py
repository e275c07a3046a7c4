"""The model card of a bundle: `card.md` for people and MONAI's `metadata.json` for tools, written beside the weights.

Both are made from nothing but the bundle. What the bundle does not know stands in them as "not stated"; what somebody
intends the model for is never made up. metadata.json has the keys of the MONAI bundle specification
(https://docs.monai.io/en/stable/mb_specification.html).
"""

import importlib.metadata
import math
from pathlib import Path
from typing import Any

import numpy as np

from raymed.bundle import NOT_STATED, Bundle
from raymed.config import config_hash, to_json
from raymed.data.dataset import DataSet
from raymed.registry.config import is_stated
from raymed.storage import write_atomic
from raymed.tracking import git_state

CARD, METADATA = "card.md", "metadata.json"
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
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


def write_card(folder: Path, name: str | None = None) -> Bundle:
    """Write `card.md` and `metadata.json` into a bundle's folder, in place of older ones; returns the bundle.

    name: the heading, such as that of the registered model. Raises UserError when the folder holds no bundle.
    """
    bundle = Bundle.load(folder)
    write_atomic(folder / CARD, card(bundle, name))
    write_atomic(folder / METADATA, to_json(metadata(bundle)))
    return bundle


def provenance(data: DataSet, config: Any) -> dict[str, Any]:
    """What a bundle's provenance needs for its card and its version's tags, beside run_key, seed and data.

    counts: {split: {class: images}}. patients: {split: number, or None where they are not known}. git: the commit of
    the working directory, "+changes" behind it where files differ; None without a repository. config_sha: sha256 of the
    config, a dataclass.
    """
    counts = {
        split: {name: int((data.class_codes[rows] == code).sum()) for code, name in enumerate(data.classes)}
        for split, rows in data.splits.items()
    }
    patients = {
        split: len(np.unique(data.patients[rows])) if data.has_patients else None for split, rows in data.splits.items()
    }
    git = git_state()
    commit = git["commit"] and git["commit"] + "+changes" * bool(git["dirty"])
    return {"counts": counts, "patients": patients, "git": commit, "config_sha": config_hash(config)}


def card(bundle: Bundle, name: str | None = None) -> str:
    """The card as Markdown."""
    from jinja2 import Environment, PackageLoader

    jinja = Environment(loader=PackageLoader("raymed.registry", ""), trim_blocks=True, lstrip_blocks=True)
    jinja.filters |= {"figure": _figure, "number": _number, "percent": _percent, "cell": _cell, "sentence": _sentence}
    positive, others = _classes(bundle)
    return jinja.get_template("card.md.j2").render(
        vars(bundle),
        NOT_STATED=NOT_STATED,
        title=name or f"Classifier of {positive}",
        positive=positive,
        others=others,
        classes=bundle.classes["names"],
        is_stated=is_stated(bundle.intended_use),
        input=_input(bundle),
        network=_network(bundle),
        seeds=bundle.metrics.get("seeds"),
        metrics={split: bundle.metrics.get(split, {}) for split in ("val", "test")},
        rows=ROWS.items(),
        intervals=_intervals(bundle),
        point=bundle.operating_point,
        calibration=_calibration(bundle.calibration),
        band=_band(bundle.uncertain_band),
        foreign=bundle.ood.get("separation", {}).get("foreign"),
        counts=bundle.provenance.get("counts"),
        patients=bundle.provenance.get("patients", {}),
        limitations=_limitations(bundle),
        origin=_origin(bundle),
    )


def metadata(bundle: Bundle) -> dict[str, Any]:
    """metadata.json of a MONAI bundle; the input is that of the exported network (`raymed.registry.export`)."""
    positive, others = _classes(bundle)
    contract, size = bundle.contract, bundle.preprocess["size"]
    channels, bits = bundle.preprocess["channels"], contract.get("bits", 8)
    pixels = {
        "type": "image",
        "format": "grey" if channels == 1 else "rgb",
        "modality": contract.get("modality", NOT_STATED),
        "num_channels": channels,
        "spatial_shape": [size, size],
        "dtype": f"uint{bits}",
        "value_range": [0, 2**bits - 1],
        "is_patch_data": False,
        "channel_def": dict(zip("012", ["grey"] if channels == 1 else ["red", "green", "blue"], strict=False)),
    }
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
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "as trained"},
        "monai_version": "not used",
        "pytorch_version": _version("torch"),
        "numpy_version": _version("numpy"),
        "required_packages_version": {"raymed": _version("raymed")},
        "name": f"Classifier of {positive}",
        "task": f"Binary classification of images: {positive} against {', '.join(others)}",
        "description": f"{_network(bundle)}; answers the probability of {positive}",
        "authorship": NOT_STATED,
        "copyright": bundle.licences["weights"]["name"],
        "data_source": bundle.licences["data"]["source"],
        "data_type": ", ".join(contract.get("file_kinds", [])) or NOT_STATED,
        "image_classes": _input(bundle),
        "label_classes": f"1 = {positive}, 0 = {', '.join(others)}",
        "pred_classes": f"probability of {positive}",
        "eval_metrics": _eval_metrics(bundle.metrics),
        "intended_use": bundle.intended_use,
        "references": [],
        "network_data_format": {"inputs": {"pixels": pixels}, "outputs": {"probability": probability}},
    }


def _eval_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """{"test_auroc": 0.91, "test_auroc_ci": [0.88, 0.94], ...}: one level, as MONAI's schema wants it."""
    flat: dict[str, Any] = {}
    for split in ("val", "test"):
        for name, figure in metrics.get(split, {}).items():
            is_figure = isinstance(figure, dict)
            flat[f"{split}_{name}"] = figure["mean"] if is_figure else figure
            flat |= {f"{split}_{name}_ci": [figure["ci_low"], figure["ci_high"]]} if is_figure else {}
    return flat


def _classes(bundle: Bundle) -> tuple[str, list[str]]:
    positive = bundle.classes["positive"]
    return positive, [name for name in bundle.classes["names"] if name != positive]


def _input(bundle: Bundle) -> str:
    known = [bundle.contract.get(name, NOT_STATED) for name in ("modality", "body_part")]
    kind = ", ".join(text for text in known if text != NOT_STATED) or "modality and body part not stated"
    size, channels = bundle.preprocess["size"], bundle.preprocess["channels"]
    return (
        f"{kind}; resized to {size} x {size} pixels ({bundle.preprocess['fit']}), {'RGB' if channels == 3 else 'grey'}"
    )


def _network(bundle: Bundle) -> str:
    num_weights = sum(tensor.numel() for tensor in bundle.weights.values())
    return f"{bundle.model['encoder']['backbone']} with a linear head, {num_weights / 1e6:.2f} million weights"


def _intervals(bundle: Bundle) -> str:
    """What the brackets of the table are."""
    figures = [f for split in ("test", "val") for f in bundle.metrics.get(split, {}).values() if isinstance(f, dict)]
    seeds = bundle.metrics.get("seeds", {}).get("test", {}).get("auroc", {})
    over = f" The last column is the mean over {seeds['n']} trainings that differ in their seed." if seeds else ""
    if not figures:
        return "Confidence intervals were not recorded for this model." + over
    return f"In brackets: 95 % intervals, resampling {figures[0]['unit']}s.{over}"


def _calibration(calibration: dict[str, Any]) -> str:
    if not calibration.get("applied"):
        return f"None: {calibration.get('reason', 'it was not fitted')}. The probability is the network's own."
    change = ", ".join(
        f"{label} {calibration['before'][name]:.3f} -> {calibration['after'][name]:.3f}"
        for name, label in {"nll": "log loss", "brier": "Brier score", "ece": "ECE"}.items()
    )
    return (
        f"Probability = sigmoid(logit / {calibration['temperature']:.3g} {calibration['bias']:+.3g}), fitted on the "
        f"validation split. Out of fold: {change}."
    )


def _band(band: dict[str, Any]) -> str:
    if not band:
        return "None: it was not fitted."
    referred, missed, false_alarms = (_percent(band["val"][name]) for name in ("referred", "missed", "false_alarms"))
    return (
        f"A raw probability from {band['low']:.3f} to {band['high']:.3f} is answered with `uncertain`: the decision is "
        f"not to be trusted, a person reads the image. On validation these are {referred} of the images; {missed} of "
        f"the positives lie below and {false_alarms} of the negatives above ({band['reason']})."
    )


def _limitations(bundle: Bundle) -> list[str]:
    """What follows from how the model was made."""
    positive, _ = _classes(bundle)
    counts, patients = bundle.provenance.get("counts", {}), bundle.provenance.get("patients", {})
    lines = [
        "Measured on a part of the set it was trained on (internal test): other scanners, hospitals, protocols and "
        "populations are untested.",
        "Probabilities and predictive values hold at the prevalence of the data above, not at that of a clinic.",
        "Performance in subgroups (age, sex, device, site) was not measured.",
        f"It answers one question, {positive} or not, and says nothing of any other finding.",
    ]
    if counts and None in patients.values():
        lines.append(
            "Patients are not known: images of one patient may be in training and in test, which flatters the figures."
        )
    if counts and counts["test"][positive] < FEW:
        lines.append(f"The test split has {counts['test'][positive]} images of {positive}: sensitivity is imprecise.")
    if bundle.ood:
        lines.append(
            "The check for foreign images finds what is far from the training images; it does not vouch for the rest."
        )
    return lines


def _origin(bundle: Bundle) -> dict[str, str]:
    known = {name: str(value) for name, value in bundle.provenance.items() if isinstance(value, str | int)}
    known.pop("data", None)
    return known | {name: _version(name) for name in ("raymed", "torch", "numpy")}


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _figure(value: Any) -> str:
    """A number, or a figure with its interval: "0.912 (0.880 to 0.941)"."""
    if not isinstance(value, dict):
        return _number(value)
    if value.get("ci_low") is None or math.isnan(value["ci_low"]):
        return _number(value["mean"])
    return f"{value['mean']:.3f} ({value['ci_low']:.3f} to {value['ci_high']:.3f})"


def _number(value: Any) -> str:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.3f}" if is_number else NOT_STATED


def _percent(value: Any) -> str:
    return f"{value:.1%}".replace("%", " %") if isinstance(value, int | float) and math.isfinite(value) else NOT_STATED


def _cell(text: Any) -> str:
    """Text that stays in one cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""
