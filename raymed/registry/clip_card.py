"""What the card of a CLIP says beyond what all cards say."""

from typing import Any

from raymed.bundle import NOT_STATED, Bundle
from raymed.registry.card_text import (
    ELSEWHERE,
    SUBGROUPS,
    interval_text,
    million_weights,
    pixels_format,
    unknown_patients,
)

ROWS = {
    f"{short}_recall_{k}": f"{long}, R@{k}"
    for short, long in (("i2t", "Image to text"), ("t2i", "Text to image"))
    for k in (1, 5, 10)
} | {"mean_recall": "Mean of these"}
LOSSES = {
    "info_nce": "InfoNCE",
    "siglip": "SigLIP",
    "dcl": "DCL (decoupled)",
    "hn_nce": "HN-NCE (hard negatives)",
    "dhn_nce": "DHN-NCE (decoupled, hard negatives)",
}


def context(bundle: Bundle) -> dict[str, Any]:
    """Names of `clip_card.md.j2`."""
    return {
        "title": "CLIP of medical images and texts",
        "dimension": _dimension(bundle),
        "text": f"up to {_context_length(bundle)} tokens of the model's own tokenizer; languages as in the captions",
        "context_length": _context_length(bundle),
        "network": f"{_towers(bundle)}, {million_weights(bundle)}",
        "loss": f"{LOSSES.get(bundle.model['method'], bundle.model['method'])}, on images and their captions",
        "temperature": bundle.model["temperature"],
        "seeds": bundle.metrics.get("seeds"),
        "metrics": {split: bundle.metrics.get(split, {}) for split in ("val", "test")},
        "rows": ROWS.items(),
        "intervals": interval_text([f for split in ("test", "val") for f in bundle.metrics.get(split, {}).values()]),
        "zero_shot": _zero_shot(bundle),
        "classes": bundle.classes.get("names", []),
        "calibration": _calibration(bundle.calibration),
        "fingerprint_of": "pixels, captions and splits",
        "limitations": _limitations(bundle),
    }


def described(bundle: Bundle) -> dict[str, Any]:
    """The keys of metadata.json that speak of this kind of model."""
    dimension, context_length = _dimension(bundle), _context_length(bundle)
    tokens = {"type": "tokens", "format": "text", "dtype": "int64", "spatial_shape": [f"1 to {context_length}"]}
    embedding = {
        "type": "embedding",
        "format": "unit norm",
        "modality": "n/a",
        "num_channels": dimension,
        "spatial_shape": [],
        "dtype": "float32",
        "value_range": [-1, 1],
        "is_patch_data": False,
        "channel_def": {},
    }
    return {
        "name": "CLIP of medical images and texts",
        "task": "Embedding of images and texts in one space: retrieval, and classes that sentences describe",
        "description": f"{_towers(bundle)}, {million_weights(bundle)}",
        "label_classes": "none: captions",
        "pred_classes": f"embeddings of {dimension} numbers",
        "network_data_format": {
            "inputs": {"pixels": pixels_format(bundle), "tokens": tokens},
            "outputs": {"image_embedding": embedding, "text_embedding": embedding},
        },
    }


def _zero_shot(bundle: Bundle) -> list[tuple[str, Any, Any]]:
    """(finding, its AUROC, that of the control), the mean over findings last."""
    found, control = (bundle.metrics.get(name, {}) for name in ("zero_shot", "zero_shot_shuffled"))
    names = [name for name in found if name.startswith("auroc/")]
    rows = [(name.removeprefix("auroc/").replace("_", " "), found[name], control.get(name)) for name in names]
    mean = [("Mean over findings", found["macro_auroc"], control.get("macro_auroc"))] if "macro_auroc" in found else []
    return rows + mean


def _calibration(calibration: dict[str, Any]) -> str:
    if not calibration:
        return "A cosine, which is no probability: compare it with those of other texts for the same image."
    before, after = (calibration[when]["ece"] for when in ("before", "after"))
    return (
        "A cosine, and the probability that image and text belong together, of a pair that is as likely matched as "
        f"random; fitted on the validation split, ECE on the test split {before:.3f} -> {after:.3f}."
    )


def _limitations(bundle: Bundle) -> list[str]:
    """What follows from how the model was made."""
    lines = [
        ELSEWHERE,
        SUBGROUPS,
        "It repeats what captions say and how often they say it: what they leave out, or get wrong, it cannot know.",
        "Models of this kind are weak at negation, counts and sides: a sentence with `no` may be near to one without.",
        *unknown_patients(bundle),
    ]
    if NOT_STATED in (bundle.licences["weights"]["name"], bundle.licences["data"]["name"]):
        lines.append("A licence, of the weights or of the data, is not stated: ask before passing the model on.")
    return lines


def _dimension(bundle: Bundle) -> int:
    return bundle.model["architecture"]["clip"]["embed_dim"]


def _context_length(bundle: Bundle) -> int:
    return bundle.model["architecture"]["clip"]["text_cfg"].get("context_length", 77)


def _towers(bundle: Bundle) -> str:
    """The two encoders, in words."""
    architecture = bundle.model["architecture"]
    vision, text, foreign = *(architecture["clip"][f"{part}_cfg"] for part in ("vision", "text")), architecture["text"]
    image = vision.get("timm_model_name") or f"vision tower of {_layers(vision.get('layers'), vision.get('width'))}"
    if foreign:
        return f"{image} and {foreign['model_type']}"
    return f"{image} and text transformer of {_layers(text.get('layers'), text.get('width'))}"


def _layers(layers: Any, width: Any) -> str:
    number = sum(layers) if isinstance(layers, list) else layers  # of a residual network, by stage
    return f"{number or NOT_STATED} layers, width {width or NOT_STATED}"
