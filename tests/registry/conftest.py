"""A small trained-looking bundle with everything a bundle can hold, and an MLflow store of its own."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from raymed.bundle import Bundle
from raymed.config import to_dict
from raymed.data.preprocess import Preprocess
from raymed.metrics.bootstrap import summarise_seeds
from raymed.metrics.levels import level_table
from raymed.models.encoder import EncoderConfig, build_encoder
from raymed.models.head import LinearHead
from raymed.tasks.classifier import Classifier
from raymed.tasks.predictor import Predictor, complete, with_separation
from raymed.tracking import Outbox, Tracker, connect

SIZE = 16
JOBS = Path(__file__).resolve().parents[2] / "jobs"


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    """Grey images of two kinds, not all of one size."""
    random = np.random.default_rng(0)
    return [random.integers(0, 120 + 100 * (i % 2), (SIZE + i % 3, SIZE), dtype=np.uint8) for i in range(120)]


@pytest.fixture(scope="session")
def bundle(images) -> Bundle:
    """Of a classifier whose probabilities spread over (0, 1), complete."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(), 1)
    classifier = Classifier(encoder, LinearHead(encoder.num_features))
    torch.nn.init.normal_(classifier.head.linear.weight, std=30.0)
    plain = Bundle(
        kind="classifier",
        weights=dict(classifier.state_dict()),
        model={"encoder": to_dict(EncoderConfig())},
        preprocess=to_dict(Preprocess(size=SIZE, mean=(0.4,), std=(0.2,))),
        classes={"names": ["occluded", "patent"], "positive": "occluded"},
        operating_point={"threshold": 0.5, "criterion": "youden", "chosen_on": "val"},
    )
    predictor = Predictor.from_bundle(plain)
    features = predictor.features(images)
    scores = np.array([p.raw_probability for p in predictor(images)])
    labels = (scores + np.random.default_rng(1).normal(0, 0.2, len(scores)) > 0.5).astype(np.int64)
    train, val, patients = slice(0, 60), slice(60, 120), np.arange(120)
    figures = {
        split: summarise_seeds([(scores[part], labels[part], patients[part], 0.5)], n_boot=100)
        for split, part in (("val", val), ("test", train))
    }
    whole = complete(
        plain,
        train_features=features[train],
        train_labels=labels[train],
        train_patients=patients[train],
        val_features=features[val],
        val_labels=labels[val],
        val_patients=patients[val],
        decided={"val": level_table(scores[val], labels[val], patients[val], patients[val], "mean", level="image")},
        contract={"modality": "XA", "body_part": "UTERUS", "bits": 8, "file_kinds": ["PNG", "DICOM"]},
        licences={"data": {"name": "CC BY 4.0", "source": "the hospital | ward 3"}},
    )
    whole = with_separation(whole, features[train], {"noise": features[train] * 3})
    whole.metrics = figures
    counts = {"train": {"occluded": 30, "patent": 30}, "val": {"occluded": 30, "patent": 30}}
    whole.provenance = {
        "run_key": "tune-1/final",
        "seed": 2023,
        "data": "d" * 64,
        "git": "c" * 40,
        "config_sha": "e" * 64,
        "counts": counts | {"test": {"occluded": 12, "patent": 28}},
        "patients": {"train": 20, "val": 20, "test": 11},
    }
    return whole


@pytest.fixture
def folder(bundle, tmp_path):
    """The bundle, saved."""
    return bundle.save(tmp_path / "final" / "bundle")


@pytest.fixture(scope="session")
def tracked(tmp_path_factory):
    """A storage whose sqlite store has the run that trained the bundle."""
    storage = tmp_path_factory.mktemp("tracked")
    outbox = Outbox(storage / "tracking.jsonl")
    outbox.open("tune-1/final", "final")
    outbox.close()
    with Tracker(None, "raymed", storage) as tracker:
        tracker.follow(outbox.path)
    return storage


@pytest.fixture
def place(tracked, tmp_path):
    """Where to register: a copy of that store."""
    shutil.copytree(tracked / "mlflow", tmp_path / "home" / "mlflow")
    return {"tracking": None, "storage": tmp_path / "home"}


@pytest.fixture
def client(place):
    """Of that store."""
    return connect(place["tracking"], place["storage"])


@pytest.fixture
def command(place, monkeypatch, capsys):
    """command(flags) -> (exit code, stdout, stderr) of the job in this process."""

    def run(flags: list[str], name: str = "promote_model", config: str = "PromoteModel", work: str = "change"):
        from raymed.command import command

        module = _job(name)
        monkeypatch.setattr("sys.argv", [name, *flags, "--storage", str(place["storage"])])
        code = 0
        try:
            command(getattr(module, config), getattr(module, work))
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def _job(name):
    spec = importlib.util.spec_from_file_location(name, JOBS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
