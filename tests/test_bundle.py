"""A bundle comes back as it was, or says what is wrong with it."""

import json

import pytest
import torch

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.storage import working_copy


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
        contract={"modality": "DX", "size": 16, "file_kinds": ["PNG"]},
        calibration={"applied": True, "temperature": 2.0, "bias": -0.5},
        uncertain_band={"low": 0.2, "high": 0.6},
        ood={"k": 5, "thresholds": {"mahalanobis": 3.5, "knn": 0.25}},
        licences={"weights": {"name": "MIT", "source": "here"}, "data": {"name": "CC BY 4.0", "source": "there"}},
        intended_use="research",
        extras={"ood.means": torch.arange(6.0).view(2, 3), "ood.bank": torch.eye(3)[:2]},
    )


def described(bundle):
    return {name: value for name, value in vars(bundle).items() if name not in ("weights", "extras")}


def test_round_trip(bundle, tmp_path):
    loaded = Bundle.load(bundle.save(tmp_path / "deep" / "bundle"))
    assert described(loaded) == described(bundle)
    for group in ("weights", "extras"):
        assert getattr(loaded, group).keys() == getattr(bundle, group).keys()
        for name, tensor in getattr(bundle, group).items():
            found = getattr(loaded, group)[name]
            assert torch.equal(found, tensor) and found.dtype == tensor.dtype and not found.requires_grad


def test_saving_again_replaces_it(bundle, tmp_path):
    bundle.save(tmp_path)
    bundle.weights = {"other": torch.zeros(2)}
    bundle.kind, bundle.extras = "detector", {}
    loaded = Bundle.load(bundle.save(tmp_path))
    assert loaded.kind == "detector" and set(loaded.weights) == {"other"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "extras.safetensors"])
def test_a_flipped_byte_is_found(name, bundle, tmp_path):
    path = bundle.save(tmp_path) / name
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"{name} is damaged: its sha256 is not the one in bundle.json"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "bundle.json", "extras.safetensors"])
def test_a_missing_file_is_named(name, bundle, tmp_path):
    (bundle.save(tmp_path) / name).unlink()
    with pytest.raises(UserError, match=f"is not (a bundle|whole): {name} is missing"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("cut", "why"),
    [
        (lambda text: text[: len(text) // 2], "JSONDecodeError"),
        (lambda text: "[1, 2]", "TypeError"),
        (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "format"}), "KeyError: 'format'"),
        (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "kind"}), "unknown: kind"),
        (lambda text: json.dumps(json.loads(text) | {"more": 1}), "unknown: more"),
        (lambda text: json.dumps(json.loads(text) | {"sha256": {}}), "unknown: sha256"),
    ],
)
def test_a_damaged_description_is_refused(cut, why, bundle, tmp_path):
    path = bundle.save(tmp_path) / "bundle.json"
    path.write_text(cut(path.read_text()))
    with pytest.raises(UserError, match=f"bundle.json is damaged .*{why}"):
        Bundle.load(tmp_path)


def test_a_newer_format_is_refused(bundle, tmp_path):
    path = bundle.save(tmp_path) / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 4, "new": 1}))
    with pytest.raises(UserError, match="written by a newer raymed: this one reads bundles up to format 3"):
        Bundle.load(tmp_path)


def test_format_1_is_read(bundle, tmp_path):
    """What it did not know is empty or not stated."""
    path = bundle.save(tmp_path) / "bundle.json"
    new = ("contract", "calibration", "uncertain_band", "ood", "licences", "intended_use")
    old = {name: value for name, value in json.loads(path.read_text()).items() if name not in new} | {"format": 1}
    old["sha256"].pop("extras.safetensors")
    path.write_text(json.dumps(old))
    loaded = Bundle.load(tmp_path)
    assert torch.equal(loaded.weights["conv.weight"], bundle.weights["conv.weight"]) and loaded.extras == {}
    assert loaded.contract == loaded.calibration == loaded.uncertain_band == loaded.ood == {}
    assert (
        loaded.intended_use == loaded.licences["data"]["name"] == loaded.licences["weights"]["source"] == "not stated"
    )


def test_the_json_is_strict(bundle, tmp_path):
    bundle.metrics = {"test": {"precision": float("nan")}}
    text = (bundle.save(tmp_path) / "bundle.json").read_text()
    assert "NaN" not in text and Bundle.load(tmp_path).metrics == {"test": {"precision": None}}


def test_nothing_is_pickled(bundle, tmp_path):
    """The weights file is safetensors: a length, a JSON header, then raw numbers."""
    raw = (bundle.save(tmp_path) / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["count"]["dtype"] == "I64" and header["conv.weight"]["shape"] == [2, 4, 3, 3]


def test_a_bundle_in_a_bucket(bundle, s3, tmp_path):
    place = f"{s3.url}/models/bundle"
    assert bundle.save(place) == place
    files = ("bundle.json", "extras.safetensors", "model.safetensors")
    assert sorted(s3.keys()) == [f"models/bundle/{file}" for file in files]
    assert s3.get("models/bundle/model.safetensors") == (bundle.save(tmp_path) / "model.safetensors").read_bytes()
    loaded = Bundle.load(place)
    assert described(loaded) == described(bundle)
    assert torch.equal(loaded.weights["conv.weight"], bundle.weights["conv.weight"])
    assert torch.equal(loaded.extras["ood.means"], bundle.extras["ood.means"])
    bundle.weights, bundle.extras = {"other": torch.zeros(2)}, {}
    bundle.save(place)
    assert sorted(s3.keys()) == ["models/bundle/bundle.json", "models/bundle/model.safetensors"]
    assert set(Bundle.load(place).weights) == {"other"} and Bundle.load(place).extras == {}


def test_a_bundle_in_a_working_copy_comes_from_its_bucket(bundle, s3):
    bundle.save(f"{s3.url}/runs/one/bundle")
    assert described(Bundle.load(working_copy(f"{s3.url}/runs/one/bundle"))) == described(bundle)


def test_a_damaged_or_missing_bundle_in_a_bucket(bundle, s3, tmp_path):
    place = bundle.save(f"{s3.url}/bundle")
    raw = bytearray(s3.get("bundle/model.safetensors"))
    raw[-5] ^= 1
    s3.put("bundle/model.safetensors", bytes(raw))
    with pytest.raises(UserError, match="model.safetensors is damaged: its sha256 is not the one in bundle.json"):
        Bundle.load(place)
    with pytest.raises(UserError, match=f"{s3.url}/none"):
        Bundle.load(f"{s3.url}/none")
    with pytest.raises(UserError, match=f"{tmp_path / 'none'}"):
        Bundle.load(tmp_path / "none")
