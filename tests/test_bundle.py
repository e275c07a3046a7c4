"""A bundle comes back as it was, or says what is wrong with it."""

import json

import pytest
import torch

from raymed.bundle import Bundle
from raymed.config import UserError


@pytest.fixture
def bundle():
    weights = {
        "conv.weight": torch.arange(72.0).view(2, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        "half": torch.tensor([0.1, 0.2], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "grad": torch.ones(3, requires_grad=True),
    }
    return Bundle(
        kind="classifier",
        weights=weights,
        model={"encoder": {"backbone": "resnet_small"}},
        preprocess={"size": 16, "mean": [0.5]},
        classes={"names": ["a", "b"], "positive": "b"},
        operating_point={"threshold": 0.1 + 0.2},
        metrics={"val": {"auroc": 0.9}},
        provenance={"seed": 3},
    )


def test_round_trip(bundle, tmp_path):
    loaded = Bundle.load(bundle.save(tmp_path / "deep" / "bundle"))
    assert {k: v for k, v in vars(loaded).items() if k != "weights"} == {
        k: v for k, v in vars(bundle).items() if k != "weights"
    }
    assert loaded.weights.keys() == bundle.weights.keys()
    for name, tensor in bundle.weights.items():
        assert torch.equal(loaded.weights[name], tensor) and loaded.weights[name].dtype == tensor.dtype
        assert not loaded.weights[name].requires_grad


def test_saving_again_replaces_it(bundle, tmp_path):
    bundle.save(tmp_path)
    bundle.weights = {"other": torch.zeros(2)}
    bundle.kind = "detector"
    loaded = Bundle.load(bundle.save(tmp_path))
    assert loaded.kind == "detector" and set(loaded.weights) == {"other"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle.json", "model.safetensors"]


def test_a_flipped_byte_is_found(bundle, tmp_path):
    path = bundle.save(tmp_path) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="model.safetensors is damaged: its sha256 is not the one in bundle.json"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "bundle.json"])
def test_a_missing_file_is_named(bundle, tmp_path, name):
    (bundle.save(tmp_path) / name).unlink()
    with pytest.raises(UserError, match=f"is not a bundle: {name} is missing"):
        Bundle.load(tmp_path)


def test_a_newer_format_is_refused(bundle, tmp_path):
    path = bundle.save(tmp_path) / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2, "new": 1}))
    with pytest.raises(UserError, match="written by a newer raymed: this one reads bundles up to format 1"):
        Bundle.load(tmp_path)


def test_nothing_is_pickled(bundle, tmp_path):
    """The weights file is safetensors: a length, a JSON header, then raw numbers."""
    raw = (bundle.save(tmp_path) / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["count"]["dtype"] == "I64" and header["conv.weight"]["shape"] == [2, 4, 3, 3]
