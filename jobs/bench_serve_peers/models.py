"""What the servers of jobs/bench_serve.py are given: classifiers, as bundles and as the peers read them, and images."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from raymed.bundle import Bundle
from raymed.config import to_dict
from raymed.data.preprocess import Preprocess
from raymed.models.encoder import EncoderConfig, build_encoder
from raymed.models.head import LinearHead
from raymed.tasks.classifier import Classifier
from raymed.tasks.golden import with_golden

BACKBONES = {"b0": ("efficientnet_b0", 224), "tiny": ("test_efficientnet", 32)}
"""Backbone and side of its input."""
BODIES = {"224": 224, "1MB": 1120}
"""Side of an image."""
NUM_IMAGES = 16
_MEAN, _STD = 0.5, 0.25


def write_bodies(folder: Path, side: int) -> None:
    """Images as PNG, and the same as JSON."""
    folder.mkdir(parents=True)
    for k in range(NUM_IMAGES):
        file = io.BytesIO()
        Image.fromarray(picture(side, k)).save(file, "PNG")
        (folder / f"{k}.png").write_bytes(file.getvalue())
        (folder / f"{k}.json").write_text(json.dumps({"image": base64.b64encode(file.getvalue()).decode()}))


def picture(side: int, seed: int) -> np.ndarray:
    """(side, side) uint8: waves under noise, which a PNG packs as it does a radiograph."""
    random = np.random.default_rng(seed)
    waves = np.add.outer(*(np.sin(np.linspace(0, random.uniform(2, 30), side)) for _ in range(2)))
    return (128 + 45 * waves + random.normal(0, 14, (side, side))).clip(0, 255).astype(np.uint8)


def write_model(folder: Path, backbone: str, size: int) -> Path:
    """A network with drawn weights that tells images apart: folder/bundle, and beside it what PlainModel reads."""
    folder.mkdir(parents=True)
    config, preprocess = EncoderConfig(backbone=backbone), Preprocess(size=size, mean=(_MEAN,), std=(_STD,))
    classifier = _classifier(config, preprocess)
    bundle = Bundle(
        kind="classifier",
        weights=dict(classifier.state_dict()),
        model={"encoder": to_dict(config)},
        preprocess=to_dict(preprocess),
        classes={"names": ["other", "positive"], "positive": "positive"},
        operating_point={"threshold": 0.5, "criterion": "youden", "chosen_on": "val"},
    )
    with_golden(bundle).save(folder / "bundle")
    _write_plain(folder, backbone, size, classifier)
    return folder


@torch.no_grad()
def _classifier(config: EncoderConfig, preprocess: Preprocess) -> Classifier:
    """Its normalisations have seen images, and its head looks along the direction in which their features differ."""
    torch.manual_seed(0)
    encoder = build_encoder(config, 1)
    classifier = Classifier(encoder, LinearHead(encoder.num_features))
    pictures = np.stack([preprocess.to_array(picture(224, 100 + k))[..., 0] for k in range(2 * NUM_IMAGES)])
    images = preprocess.normalise(torch.from_numpy(pictures)[:, None] / 255)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of what it sees
    encoder.train()(images)
    features = classifier.eval().encoder(images)
    direction = torch.linalg.svd(features - features.mean(0), full_matrices=False)[2][0]
    scores = features @ direction
    classifier.head.linear.weight[0] = direction / scores.std()
    classifier.head.linear.bias[0] = -scores.mean() / scores.std()
    return classifier


def _write_plain(folder: Path, backbone: str, size: int, classifier: Classifier) -> None:
    import timm

    head = getattr(timm.get_pretrained_cfg(backbone), "classifier", "classifier")
    renamed = {"encoder.net.": "", "head.linear.": f"{head}."}
    weights = {
        after + name.removeprefix(before): value.contiguous()
        for name, value in classifier.state_dict().items()
        for before, after in renamed.items()
        if name.startswith(before)
    }
    save_file(weights, folder / "weights.safetensors")
    config = {"backbone": backbone, "size": size, "mean": _MEAN, "std": _STD}
    (folder / "config.json").write_text(json.dumps(config))
