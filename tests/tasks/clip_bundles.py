"""A small CLIP as a bundle, with everything that using it needs; its weights are random."""

import io

import numpy as np
import torch
from PIL import Image

from raymed.bundle import Bundle
from raymed.config import to_dict
from raymed.data.preprocess import Preprocess
from raymed.models.clip import ClipConfig, build_clip, build_tokenizer, clip_architecture, clip_licence, merged_state

PREPROCESS = Preprocess(size=32, mean=(0.4,), std=(0.2,))


def clip_bundle(config: ClipConfig | None = None, preprocess: Preprocess = PREPROCESS) -> Bundle:
    """As a training would leave it."""
    config = config or ClipConfig()
    torch.manual_seed(0)
    clip = build_clip(config, preprocess)
    return Bundle(
        kind="clip",
        weights=merged_state(clip),
        model={
            "architecture": clip_architecture(clip),
            "tokenizer": build_tokenizer(config).to_json(),
            "method": "dhn_nce",
            "temperature": 0.1,
        },
        preprocess=to_dict(preprocess),
        classes={"names": ["mass", "nodule"], "positive": "not stated"},
        provenance={"run_key": "train-1/final", "seed": 1, "data": "d" * 64},
        licences={"weights": clip_licence(config), "data": {"name": "CC BY 4.0", "source": "drawn"}},
    )


def some_images(num: int = 6) -> list[np.ndarray]:
    """Grey images, 8 and 16 bits, and colour, of several sizes."""
    random = np.random.default_rng(3)
    kinds = [((32, 32), np.uint8, 255), ((40, 28), np.uint16, 65535), ((20, 36, 3), np.uint8, 255)]
    images = []
    for i in range(num):
        shape, dtype, largest = kinds[i % 3]
        ramp = np.linspace(0, 0.5, shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
        images.append(((ramp * (i % 6 + 1) / 6 + random.uniform(0, 0.5, shape)) * largest).astype(dtype))
    return images


def png(image: np.ndarray) -> bytes:
    """The content of a file with this image."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


TEXTS = [
    "a small nodule in the left lung",
    "no finding",
    "two large masses, mild, on the patient's right side of the breast, and further on nothing that is worth a word",
    "x-ray",
    "a calcification of the brain; severe",
    "word " * 200,
]
