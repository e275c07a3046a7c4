"""One file makes a new kind of model: with no other change every protocol asks it, and DICOM shows what it finds."""

import base64
import io
import shutil
import sys
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import torch
from dicom_helpers import content, flaws, texts
from fastapi.testclient import TestClient
from PIL import Image

from raymed.bundle import Bundle
from raymed.serve import handlers
from raymed.serve.app import create_app
from raymed.serve.dicom.multipart import DICOM, read_related, write_related

BRIGHT = np.s_[10:20, 30:50]


@pytest.fixture
def client(tmp_path, monkeypatch, app_config):
    """Of a server of a bundle of the new kind."""
    shutil.copy(Path(__file__).with_name("spots_handler.txt"), tmp_path / "spots.py")
    monkeypatch.setattr(handlers, "__path__", [*handlers.__path__, str(tmp_path)])
    bundle = Bundle(
        kind="spots",
        weights={"weight": torch.ones(1, 1, 1, 1), "bias": torch.zeros(1)},
        model={},
        preprocess={"range": "0 to 1"},
        classes={},
    )
    models = (f"spots={bundle.save(tmp_path / 'bundle')}",)
    with TestClient(create_app(app_config(models=models))) as started:
        yield started
    sys.modules.pop(f"{handlers.__name__}.spots")
    monkeypatch.delattr(handlers, "spots", raising=False)


@pytest.fixture
def drawn() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 100, (48, 64), dtype=np.uint8)
    pixels[BRIGHT] = 200
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def mask_of(told):
    return np.frombuffer(base64.b64decode(told["mask"]), np.uint8).reshape(told["shape"])


def test_it_is_asked_by_files_by_tensors_and_described(client, drawn):
    assert client.get("/readyz").status_code == 200
    answer = client.post("/v1/models/spots:predict", files=[("file", drawn), ("file", drawn)]).json()
    expected = np.zeros((48, 64), np.uint8)
    expected[BRIGHT] = 1
    assert answer["result"]["kind"] == "spots" and answer["decision"] is None and answer["reasons"]
    assert all(np.array_equal(mask_of(told), expected) for told in answer["result"]["images"])
    lower = client.post("/v1/models/spots:predict?at_least=0", content=drawn).json()["result"]["images"][0]
    assert lower["share"] == 1
    wrong = client.post("/v1/models/spots:predict?at_least=high", content=drawn)
    assert wrong.status_code == 422 and wrong.json()["field"] == "at_least"
    assert client.get("/v1/models/spots").json()["finds"] == "bright spots"

    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(drawn).decode()]}
    asked = {"inputs": [tensor], "parameters": {"at_least": 0.5}}
    outputs = {
        each["name"]: each["data"] for each in client.post("/v2/models/spots/infer", json=asked).json()["outputs"]
    }
    assert outputs["images.share"] == pytest.approx([expected.mean()])
    described = client.get("/v2/models/spots").json()
    assert described["platform"] == "raymed_spots" and "at_least" in {each["name"] for each in described["inputs"]}
    schema = client.get("/openapi.json").json()["components"]["schemas"]
    assert "at_least" in schema["Fields"]["properties"]
    assert {"$ref": "#/components/schemas/SpotsResult"} in schema["Answer"]["properties"]["result"]["anyOf"]


def test_dicom_shows_what_it_finds(client, sent):
    study = next(study for study in sent if not any("NumberOfFrames" in ds for ds in study))
    body, kind = write_related([content(ds) for ds in study])

    def asked(accept, **query):
        headers = {"Content-Type": kind, "Accept": accept}
        return client.post("/v1/models/spots/studies", content=body, params={"at_least": 0.5} | query, headers=headers)

    done = asked(f'multipart/related; type="{DICOM}"', results=["report", "overlay", "segmentation"])
    assert done.status_code == 200, done.text
    parts = read_related(done.content, done.headers["content-type"])
    report, *pictures = [pydicom.dcmread(io.BytesIO(part)) for part in parts]
    assert report.Modality == "SR" and flaws(report) == [] and "where it is bright" in texts(report)
    assert [ds.Modality for ds in pictures] == ["OT", "SEG"] * len(study)
    told = asked("application/json").json()["result"]["images"]
    assert 0 < np.mean([image["share"] for image in told]) < 1
    for overlay, part, image in zip(pictures[::2], parts[2::2], told, strict=True):
        assert flaws(overlay) == [] and "It shows: bright spot." in overlay.DerivationDescription
        segment = highdicom.seg.segread(io.BytesIO(part))
        assert segment.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "bright spot"
        assert np.array_equal(segment.pixel_array > 0, mask_of(image) > 0)
