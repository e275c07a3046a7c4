"""A small model that decides about cases, and cases to ask it about: what the tests of predictions share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from raymed.bundle import Bundle
from raymed.config import to_dict
from raymed.data.preprocess import Preprocess
from raymed.metrics.levels import level_table
from raymed.models.encoder import EncoderConfig, build_encoder
from raymed.models.head import LinearHead
from raymed.results.predict import bundle_hash
from raymed.results.predict_table import Origin
from raymed.tasks.classifier import Classifier
from raymed.tasks.predictor import Predictor, complete

SIZE = 16
THRESHOLD, BAND, TEMPERATURE, BIAS = 0.75, (0.7, 0.85), 0.5, 0.7
POINT = {"threshold": THRESHOLD, "criterion": "youden", "chosen_on": "val", "unit": "case", "aggregate": "mean"}


def make_bundle(**point: str) -> Bundle:
    """A complete bundle of random weights, whose scores spread over (0, 1); two views a case are usual.

    point: changes its operating point.
    """
    random = np.random.default_rng(0)
    images = [random.integers(0, 120 + 100 * (i % 2), (SIZE, SIZE), dtype=np.uint8) for i in range(80)]
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(), 1)
    classifier = Classifier(encoder, LinearHead(encoder.num_features))
    torch.nn.init.normal_(classifier.head.linear.weight, std=30.0)
    plain = Bundle(
        kind="classifier",
        weights=dict(classifier.state_dict()),
        model={"encoder": to_dict(EncoderConfig())},
        preprocess=to_dict(Preprocess(size=SIZE, mean=(0.4,), std=(0.2,))),
        classes={"names": ["개통", "occluded"], "positive": "occluded"},
        operating_point=POINT | point,
        provenance={"run_key": "train-1/final"},
    )
    predictor = Predictor.from_bundle(plain)
    features = predictor.features(images)
    scores = np.array([p.raw_probability for p in predictor(images)])
    labels = (scores + random.normal(0, 0.2, len(scores)) > 0.5).astype(np.int64)
    train, val, patients = slice(0, 40), slice(40, 80), np.arange(80)
    whole = complete(
        plain,
        train_features=features[train],
        train_labels=labels[train],
        train_patients=patients[train],
        val_features=features[val],
        val_labels=labels[val],
        val_patients=patients[val],
        decided={"val": level_table(scores[val], labels[val], patients[val], patients[val], "mean", level="case")},
        contract={"views_per_case": 2},
    )
    planted = {"applied": True, "temperature": TEMPERATURE, "bias": BIAS}
    band = whole.uncertain_band | {"low": BAND[0], "high": BAND[1]}
    return replace(whole, calibration=planted, uncertain_band=band)


def origin_of(bundle: Bundle) -> Origin:
    """What its answers are signed with."""
    use = bundle.intended_use
    return Origin("train-1/final", "", bundle_hash(bundle), "size=16", "train-1/final", use, research_only=True)


def write_images(folder: Path, num_cases: int) -> pd.DataFrame:
    """Two images a case and a manifest of them, manifest.csv, without labels; returns its rows."""
    random = np.random.default_rng(5)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in range(num_cases):
        for side in ("left", "right"):
            name, high = f"{case:03d}_{side}.png", random.integers(60, 256)
            Image.fromarray(random.integers(0, high, (20, SIZE + case % 5), dtype=np.uint8)).save(folder / name)
            rows.append({"image": name, "case": f"C-{case:03d}", "patient": f"P-{case // 2:03d}", "side": side})
    table = pd.DataFrame(rows)
    table.to_csv(folder / "manifest.csv", index=False)
    return table


def read_rows(path: Path) -> pd.DataFrame:
    """A CSV as text."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)
