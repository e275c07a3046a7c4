"""A classifier that was never trained, and an external test set whose labels follow it but for planted errors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.special import logit

from raymed.bundle import Bundle
from raymed.config import to_dict
from raymed.data.dataset import DataSet
from raymed.data.manifest import DataConfig
from raymed.data.preprocess import Preprocess
from raymed.models.encoder import EncoderConfig, build_encoder
from raymed.models.head import LinearHead
from raymed.tasks.classifier import Classifier
from raymed.tasks.external import LabelledData, data_of
from raymed.tasks.predictor import Predictor

SIZE, CASES, THRESHOLD = 16, 60, 0.5
POINT = {
    "threshold": THRESHOLD, "criterion": "youden", "met": True, "chosen_on": "val",
    "unit": "case", "aggregate": "mean", "image_threshold": 0.4,
}  # fmt: skip
CALIBRATION = {"kind": "platt", "applied": True, "temperature": 2.0, "bias": 0.3}


def make_bundle(seed: int = 0, **changes: Any) -> Bundle:
    """Its probabilities spread over (0, 1)."""
    torch.manual_seed(seed)
    encoder = build_encoder(EncoderConfig(), 1)
    classifier = Classifier(encoder, LinearHead(encoder.num_features))
    torch.nn.init.normal_(classifier.head.linear.weight, std=30.0)
    fields = {
        "kind": "classifier",
        "weights": dict(classifier.state_dict()),
        "model": {"encoder": to_dict(EncoderConfig())},
        "preprocess": to_dict(Preprocess(size=SIZE, mean=(0.4,), std=(0.2,))),
        "classes": {"names": ["occluded", "patent"], "positive": "occluded"},
        "operating_point": POINT,
        "calibration": CALIBRATION,
        "uncertain_band": {"low": 0.4, "high": 0.6, "error": 0.05},
        "provenance": {"run_key": "hsg-1/seed-1", "data": "d" * 64},
        "extras": {"trained_on": torch.zeros(0, dtype=torch.int64)},
    }
    bundle = Bundle(**fields | changes)
    bundle.weights["head.linear.bias"] = torch.tensor([-_median_logit(bundle)])
    return bundle


def _median_logit(bundle: Bundle) -> float:
    classifier = Classifier(build_encoder(EncoderConfig(), 1), LinearHead(128)).eval()
    classifier.load_state_dict(bundle.weights | {"head.linear.bias": torch.zeros(1)})
    given = torch.stack([torch.from_numpy(pixels(i)).float()[None] / 255 for i in range(60)])
    with torch.no_grad():
        return classifier(Preprocess(size=SIZE, mean=(0.4,), std=(0.2,)).normalise(given)).median().item()


def pixels(i: int) -> np.ndarray:
    """Image i of the hospital; those of one case are alike."""
    random = np.random.default_rng(i // 2)
    image = random.normal(random.uniform(40, 200), random.uniform(10, 50), (SIZE, SIZE))
    return (image + np.random.default_rng(1000 + i).normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Hospital:
    """manifest: of 60 cases of 56 patients, two images each. raw: (120,) what the model says of the images. targets:
    (60,) of the cases, the model's decisions but for every sixth."""

    manifest: Path
    bundle: Bundle
    raw: np.ndarray
    targets: np.ndarray

    def config(self, **changes: Any) -> DataConfig:
        """What the job would read."""
        return data_of(self.bundle, DataConfig(str(self.manifest), **changes))

    def data(self, **changes: Any) -> DataSet:
        """The data set."""
        return LabelledData.read(self.config(**changes), self.manifest.parent / "cache")


def write_hospital(folder: Path, **columns: Any) -> Hospital:
    """columns: in place of those of the manifest, 120 values each."""
    num, bundle = 2 * CASES, make_bundle()
    for i in range(num):
        Image.fromarray(pixels(i)).save(folder / f"{i:03d}.png")
    raw = np.array([p.raw_probability for p in Predictor.from_bundle(bundle)([pixels(i) for i in range(num)])])
    cases = np.arange(num) // 2
    targets = (raw.reshape(CASES, 2).mean(1) >= THRESHOLD).astype(int)
    targets[::6] = 1 - targets[::6]
    labels = np.where(targets == 1, "occluded", "patent")[cases]
    wrong = np.where(cases % 10 == 3, np.where(labels == "patent", "occluded", "patent"), labels)
    table = {
        "image": [f"{i:03d}.png" for i in range(num)],
        "label": labels,
        "patient": [f"P{min(c, 55)}" for c in cases],
        "case": [f"C{c}" for c in cases],
        "view": np.tile(["early", "late"], CASES),
        "site": np.where(cases % 2 == 0, "서울", "Busan"),
        "age": np.where(cases % 3 == 0, "27", np.where(cases % 3 == 1, "41", "")),
        "sex": "F",
        "label_reader1": labels,
        "label_reader2": np.where(cases < 5, "", wrong),
    }
    pd.DataFrame(table | columns).to_csv(folder / "manifest.csv", index=False)
    return Hospital(folder / "manifest.csv", bundle, raw, targets)


def calibrated(raw: np.ndarray) -> np.ndarray:
    """By CALIBRATION."""
    return 1 / (1 + np.exp(-(logit(raw) / 2 + 0.3)))
