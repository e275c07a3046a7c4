"""What the cards of all kinds of models share: the words, the numbers, and where a model comes from."""

import importlib.metadata
import math
from typing import Any

from raymed.bundle import NOT_STATED, Bundle
from raymed.registry.config import is_stated

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
ELSEWHERE = (
    "Measured on a part of the set it was trained on (internal test): other scanners, hospitals, protocols and "
    "populations are untested."
)
SUBGROUPS = "Performance in subgroups (age, sex, device, site) was not measured."


def render(template: str, bundle: Bundle, name: str | None, context: dict[str, Any]) -> str:
    """A card as Markdown. context: what is said of this kind of model, with its `title` where there is no name."""
    from jinja2 import Environment, PackageLoader

    jinja = Environment(loader=PackageLoader("raymed.registry", ""), trim_blocks=True, lstrip_blocks=True)
    jinja.filters |= {"figure": figure, "number": number, "percent": percent, "cell": cell, "sentence": sentence}
    shared = {
        "NOT_STATED": NOT_STATED,
        "is_stated": is_stated(bundle.intended_use),
        "input": input_text(bundle),
        "counts": bundle.provenance.get("counts"),
        "patients": bundle.provenance.get("patients", {}),
        "origin": _origin(bundle),
    }
    return jinja.get_template(template).render(vars(bundle) | shared | context | ({"title": name} if name else {}))


def common_metadata(bundle: Bundle) -> dict[str, Any]:
    """The keys of metadata.json that do not depend on the kind of model."""
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "as trained"},
        "monai_version": "not used",
        "pytorch_version": version("torch"),
        "numpy_version": version("numpy"),
        "required_packages_version": {"raymed": version("raymed")},
        "authorship": NOT_STATED,
        "copyright": bundle.licences["weights"]["name"],
        "data_source": bundle.licences["data"]["source"],
        "data_type": ", ".join(bundle.contract.get("file_kinds", [])) or NOT_STATED,
        "image_classes": input_text(bundle),
        "eval_metrics": _eval_metrics(bundle.metrics),
        "intended_use": bundle.intended_use,
        "references": [],
    }


def pixels_format(bundle: Bundle) -> dict[str, Any]:
    """The image that an exported network takes, as metadata.json describes it."""
    size, channels, bits = bundle.preprocess["size"], bundle.preprocess["channels"], bundle.contract.get("bits", 8)
    return {
        "type": "image",
        "format": "grey" if channels == 1 else "rgb",
        "modality": bundle.contract.get("modality", NOT_STATED),
        "num_channels": channels,
        "spatial_shape": [size, size],
        "dtype": f"uint{bits}",
        "value_range": [0, 2**bits - 1],
        "is_patch_data": False,
        "channel_def": dict(zip("012", ["grey"] if channels == 1 else ["red", "green", "blue"], strict=False)),
    }


def input_text(bundle: Bundle) -> str:
    """What kind of image is expected, and what becomes of it."""
    known = [bundle.contract.get(name, NOT_STATED) for name in ("modality", "body_part")]
    kind = ", ".join(text for text in known if text != NOT_STATED) or "modality and body part not stated"
    size, channels = bundle.preprocess["size"], bundle.preprocess["channels"]
    return (
        f"{kind}; resized to {size} x {size} pixels ({bundle.preprocess['fit']}), {'RGB' if channels == 3 else 'grey'}"
    )


def million_weights(bundle: Bundle) -> str:
    """How many numbers the network has."""
    return f"{sum(tensor.numel() for tensor in bundle.weights.values()) / 1e6:.2f} million weights"


def interval_text(figures: list[Any]) -> str:
    """What the brackets behind figures are, or that there are none."""
    with_interval = [figure for figure in figures if isinstance(figure, dict)]
    if not with_interval:
        return "Confidence intervals were not recorded for this model."
    return f"In brackets: 95 % intervals, resampling {with_interval[0]['unit']}s."


def unknown_patients(bundle: Bundle) -> list[str]:
    """A limitation, where it is one."""
    unknown = bundle.provenance.get("counts") and None in bundle.provenance.get("patients", {}).values()
    text = "Patients are not known: images of one patient may be in training and in test, which flatters the figures."
    return [text] if unknown else []


def _eval_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """{"test_auroc": 0.91, "test_auroc_ci": [0.88, 0.94], ...}: one level, as MONAI's schema wants it."""
    flat: dict[str, Any] = {}
    for split in ("val", "test"):
        for name, value in metrics.get(split, {}).items():
            is_figure = isinstance(value, dict)
            flat[f"{split}_{name}"] = value["mean"] if is_figure else value
            flat |= {f"{split}_{name}_ci": [value["ci_low"], value["ci_high"]]} if is_figure else {}
    return flat


def _origin(bundle: Bundle) -> dict[str, str]:
    known = {name: str(value) for name, value in bundle.provenance.items() if isinstance(value, str | int)}
    known.pop("data", None)
    return known | {name: version(name) for name in ("raymed", "torch", "numpy")}


def version(package: str) -> str:
    """Of an installed package."""
    return importlib.metadata.version(package)


def figure(value: Any) -> str:
    """A number, or a figure with its interval: "0.912 (0.880 to 0.941)"."""
    if not isinstance(value, dict):
        return number(value)
    if value.get("ci_low") is None or math.isnan(value["ci_low"]):
        return number(value["mean"])
    return f"{value['mean']:.3f} ({value['ci_low']:.3f} to {value['ci_high']:.3f})"


def number(value: Any) -> str:
    """Three decimals, or "not stated"."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.3f}" if is_number else NOT_STATED


def percent(value: Any) -> str:
    """0.123 -> "12.3 %", or "not stated"."""
    return f"{value:.1%}".replace("%", " %") if isinstance(value, int | float) and math.isfinite(value) else NOT_STATED


def cell(text: Any) -> str:
    """Text that stays in one cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""
