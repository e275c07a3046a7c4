"""A storage in a bucket: artifacts and registered models lie there too, and MLflow finds them."""

import subprocess
import sys

import pytest
import torch

from raymed.bundle import Bundle
from raymed.registry import RegisterConfig, register
from raymed.registry.register import bundle_folder
from raymed.registry.store import fetch_bundle
from raymed.storage import resolve_storage
from raymed.tracking import Outbox, Tracker, connect

LOAD = """
import sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/hsg@candidate")
print("ROWS", len(model.predict(model.input_example)))
"""


@pytest.fixture
def storage(s3, monkeypatch):
    """The working copy of a folder in a bucket."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return resolve_storage(f"{s3.url}/storage")


def test_a_run_and_its_model_in_a_bucket(bundle, s3, storage, tmp_path):
    bundle.save(storage / "final/bundle")
    (storage / "figure.svg").write_text("<svg/>")
    outbox = Outbox(storage / "tracking.jsonl")
    outbox.open("tune-1/final", "final")
    outbox.artifact(storage / "figure.svg", "figures")
    outbox.artifact(storage / "final/bundle", "bundle")
    outbox.close()
    with Tracker(None, "exp", storage) as tracker:
        tracker.follow(outbox.path)
    registered = register(storage / "final/bundle", RegisterConfig(), "hsg", tracking=None, storage=storage)

    client = connect(None, storage)
    run = client.get_run(tracker.run_id("tune-1/final"))
    place = f"{s3.url}/storage/mlflow/artifacts"
    assert run.info.artifact_uri.startswith(place) and registered.run_id == run.info.run_id
    assert client.tracking_uri == f"sqlite:///{storage}/mlflow/mlflow.db"
    with open(client.download_artifacts(run.info.run_id, "figures/figure.svg")) as file:
        assert file.read() == "<svg/>"
    logged = Bundle.load(f"{run.info.artifact_uri}/bundle")
    assert all(torch.equal(logged.weights[name], tensor) for name, tensor in bundle.weights.items())
    fetched = Bundle.load(fetch_bundle(client, "models:/hsg@candidate", tmp_path / "fetched"))
    assert fetched.weights.keys() == bundle.weights.keys()
    assert not (storage / "mlartifacts").exists() and not any("mlflow.db" in key for key in s3.keys())

    elsewhere = [sys.executable, "-c", LOAD, client.tracking_uri]
    done = subprocess.run(elsewhere, capture_output=True, text=True, timeout=200)
    assert "ROWS 1" in done.stdout, done.stderr[-2000:]


def test_the_folder_of_a_bundle_in_a_bucket_is_a_copy(bundle, s3):
    bundle.save(f"{s3.url}/bundle")
    for text in ("first", "second"):
        with bundle_folder(f"{s3.url}/bundle") as folder:
            assert not (folder / "card.md").exists() and Bundle.load(folder).kind == "classifier"
            (folder / "card.md").write_text(text)
    assert not folder.exists()
