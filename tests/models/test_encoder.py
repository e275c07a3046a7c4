"""Encoders: shapes, weights that come and go, and messages for what cannot be had."""

import logging
import time

import pytest
import torch
from safetensors.torch import save_file

from raymed.config import UserError
from raymed.models.encoder import EncoderConfig, build_encoder, load_weights
from raymed.models.norm import GlobalBatchNorm2d, GroupNorm2d


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """No hub, and an empty folder of checkpoints."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://10.255.255.1:9")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    "backbone, channels, size, features",
    [
        ("resnet_small", 1, 28, 128),
        ("resnet_small", 3, 97, 128),
        ("efficientnet_lite0", 1, 64, 1280),
        ("mobilenetv3_small_050", 1, 64, 1024),
    ],
)
def test_shapes(backbone, channels, size, features):
    encoder = build_encoder(EncoderConfig(backbone), channels).eval()
    images = torch.rand(2, channels, size, size)
    maps = encoder.maps(images)
    assert encoder.num_features == features and maps.ndim == 4 and maps.shape[-1] > 1
    assert encoder.pool(maps).shape == (2, features)
    assert torch.equal(encoder(images), encoder.pool(maps))


def test_built_in_network_learns_and_is_small():
    """Twenty steps tell bright left halves from bright right halves."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(), 1)
    head = torch.nn.Linear(encoder.num_features, 1)
    assert sum(p.numel() for p in encoder.parameters()) < 1e6
    label = torch.arange(64) % 2
    image = torch.rand(64, 1, 28, 28)
    image[label == 1, :, :, :14] += 0.5
    image[label == 0, :, :, 14:] += 0.5
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(20):
        logits = head(encoder(image)).squeeze(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, label.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.2


def test_convolutions_have_no_bias():
    convolutions = [m for m in build_encoder(EncoderConfig(), 1).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) > 8 and all(m.bias is None for m in convolutions)


@pytest.mark.parametrize("norm, kind", [("batch", GlobalBatchNorm2d), ("group", GroupNorm2d)])
def test_norm(norm, kind):
    encoder = build_encoder(EncoderConfig(norm=norm), 1)
    assert sum(isinstance(m, kind) for m in encoder.modules()) > 5
    assert {type(m) for m in encoder.modules() if "Norm" in type(m).__name__} == {kind}


@pytest.mark.parametrize("prefix", ["", "net.", "encoder.net."])
def test_weights_round_trip(prefix, tmp_path, caplog):
    torch.manual_seed(0)
    trained = build_encoder(EncoderConfig(), 1).eval()
    save_file({prefix + k: v for k, v in trained.net.state_dict().items()}, tmp_path / "w.safetensors")
    loaded = build_encoder(EncoderConfig(weights=str(tmp_path / "w.safetensors")), 1).eval()
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(loaded(images), trained(images))
    assert not caplog.records


def test_missing_and_unexpected_keys_are_reported(tmp_path, caplog):
    net = build_encoder(EncoderConfig(), 1).net
    state = net.state_dict()
    gone = list(state)[3]
    state.pop(gone)
    save_file({**state, "fc.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    assert load_weights(net, tmp_path / "w.safetensors") == ([gone], ["fc.weight"])
    with caplog.at_level(logging.WARNING):
        build_encoder(EncoderConfig(weights=str(tmp_path / "w.safetensors")), 1)
    assert f"1 missing keys: {gone}" in caplog.text and "1 unexpected keys: fc.weight" in caplog.text


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "w.safetensors"
    config = EncoderConfig(weights=str(path))
    with pytest.raises(UserError, match="there is no .*w.safetensors"):
        build_encoder(config, 1)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        build_encoder(config, 1)
    save_file({"a.b": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="no key of .* has a.b; wants stem"):
        build_encoder(config, 1)
    save_file(build_encoder(EncoderConfig(), 3).net.state_dict(), path)
    with pytest.raises(UserError, match=r"stem.0.weight is \(16, 3, 3, 3\), wanted \(16, 1, 3, 3\)"):
        build_encoder(config, 1)


def test_published_stems_are_adapted_to_one_channel(tmp_path):
    import timm

    published = timm.create_model("resnet10t", num_classes=10)
    save_file(published.state_dict(), tmp_path / "w.safetensors")
    net = build_encoder(EncoderConfig("resnet10t"), 1).net
    result = load_weights(net, tmp_path / "w.safetensors")
    assert result.missing == [] and result.unexpected == ["fc.bias", "fc.weight"]
    torch.testing.assert_close(net.conv1[0].weight, published.conv1[0].weight.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"backbone": "resnet_smal"}, "did you mean 'resnet_small'"),
        ({"backbone": "efficientnet-b0"}, "efficientnet_b0"),
        ({"backbone": "resnet18.a9_in1k"}, "timm knows no weights 'a9_in1k'; it has .*resnet18.a1_in1k"),
        ({"norm": "layer"}, "norm must be one of 'batch', 'group'"),
        ({"weights": "imagenet"}, "weights must be none, pretrained or the PATH"),
        ({"weights": "pretrained"}, "resnet_small has no pretrained weights"),
    ],
)
def test_config_fails_at_construction(fields, message):
    with pytest.raises(UserError, match=message):
        EncoderConfig(**fields)


def test_unreachable_hub_names_the_file_and_the_folder(elsewhere):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        build_encoder(EncoderConfig("resnet10t", weights="pretrained"), 1)
    assert time.monotonic() - start < 10
    assert "timm/resnet10t.c3_in1k/resolve/main/model.safetensors" in str(error.value)
    assert str(elsewhere / "resnet10t.c3_in1k.safetensors") in str(error.value)
    assert "--model.weights PATH" in str(error.value)


def test_a_file_placed_by_hand_takes_the_place_of_the_hub(elsewhere):
    trained = build_encoder(EncoderConfig("resnet10t"), 1).eval()
    save_file(trained.net.state_dict(), elsewhere / "resnet10t.c3_in1k.safetensors")
    loaded = build_encoder(EncoderConfig("resnet10t", weights="pretrained"), 1).eval()
    images = torch.rand(1, 1, 64, 64)
    assert torch.equal(loaded(images), trained(images))
