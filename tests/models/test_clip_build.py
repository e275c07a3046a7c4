"""The built-in pair and open_clip's architectures: shapes, texts cut to the batch, and rebuilding from JSON."""

import json
from itertools import product

import pytest
import torch

from raymed.config import UserError
from raymed.data.preprocess import Preprocess
from raymed.models.clip import (
    Clip,
    ClipConfig,
    build_clip,
    build_tokenizer,
    clip_architecture,
    clip_input,
    clip_licence,
    from_architecture,
)
from raymed.models.clip_files import _BERT_BASE, Published, _plain, published, text_tower_config

TEXTS = ["a small nodule in the left lung", "no finding", "severe cardiomegaly, and an effusion on both sides"]


def small(size: int = 48, channels: int = 1, seed: int = 0) -> Clip:
    torch.manual_seed(seed)
    return build_clip(ClipConfig(), Preprocess(size, channels=channels)).eval()


@pytest.mark.parametrize("size, channels", [(28, 1), (37, 3), (48, 1), (64, 3), (224, 1)])
def test_small(size, channels):
    clip = small(size, channels)
    tokens, _ = build_tokenizer(ClipConfig())(TEXTS)
    image, text, scale, bias = clip(torch.randn(3, channels, size, size), tokens)
    assert image.shape == text.shape == (3, 128)
    assert scale.item() == pytest.approx(1 / 0.07) and bias.item() == -10 and scale.shape == bias.shape == ()
    assert 5e6 < sum(p.numel() for p in clip.parameters()) < 7e6
    assert {"log_scale", "bias"} < dict(clip.named_parameters()).keys()


def test_an_image_of_small_is_encoded_as_if_it_were_alone():
    """Nothing is normalised over the batch: workers and micro-batches make no difference."""
    clip, image = small().train(), torch.randn(4, 1, 48, 48)
    torch.testing.assert_close(clip.encode_image(image)[1:2], clip.encode_image(image[1:2]), rtol=1e-5, atol=1e-6)


def test_a_grey_image_is_three_equal_channels():
    clip = small()
    image = torch.randn(2, 1, 48, 48)
    torch.testing.assert_close(clip.encode_image(image), clip.encode_image(image.repeat(1, 3, 1, 1)))


def shape_at(shade: str, shape: str, side: str) -> torch.Tensor:
    """(1, 40, 40)"""
    y, x = torch.meshgrid(torch.arange(40) - 20, torch.arange(40) - (10 if side == "left" else 30), indexing="ij")
    inside = x**2 + y**2 < 49 if shape == "disc" else (x.abs() < 6) & (y.abs() < 6)
    return (inside * (2.0 if shade == "bright" else -2.0))[None]


def test_small_learns_pairs():
    """Eight images and their captions: the symmetric cross-entropy falls fast, and moves both towers."""
    clip = small(40).train()
    kinds = list(product(("dark", "bright"), ("disc", "square"), ("left", "right")))
    tokens, _ = build_tokenizer(ClipConfig())([f"a {shade} {shape} at {side}" for shade, shape, side in kinds])
    images = torch.stack([shape_at(*kind) for kind in kinds])
    optimiser = torch.optim.AdamW(clip.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        image, text, scale, _ = clip(images, tokens)
        logits = scale * torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
        target = torch.arange(8)
        loss = torch.stack([torch.nn.functional.cross_entropy(each, target) for each in (logits, logits.T)]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert clip.log_scale.grad is not None and clip.bias.grad is None


def test_a_batch_cut_to_its_longest_text_has_the_same_features():
    clip = small()
    tokens, lengths = build_tokenizer(ClipConfig())(TEXTS)
    assert tokens.shape[1] == lengths.max() < clip.context_length
    whole = torch.nn.functional.pad(tokens, (0, clip.context_length - tokens.shape[1]))
    close = {"rtol": 1e-5, "atol": 5e-6}
    torch.testing.assert_close(clip.encode_text(tokens), clip.encode_text(whole), **close)
    torch.testing.assert_close(clip.encode_text(tokens[1:2, : lengths[1]]), clip.encode_text(tokens)[1:2], **close)


def tiny(**text) -> dict:
    return {
        "clip": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
            "text_cfg": {"context_length": 20, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2, **text},
        },
        "image_norm": "batch",
        "text": None,
        "pad_id": 1,
    }


@pytest.mark.parametrize(
    "text, cuttable",
    [
        ({}, True),
        ({"pool_type": "first"}, True),
        ({"pool_type": "eos", "eos_id": 63}, True),
        ({"no_causal_mask": True, "pool_type": "last", "proj_bias": True}, False),  # SigLIP's
        ({"pool_type": "last"}, False),
        ({"embed_cls": True}, False),  # CoCa's
    ],
)
def test_texts_may_be_cut_for_every_kind_of_text_tower(text, cuttable):
    """Towers that read the padding are given it."""
    torch.manual_seed(0)
    clip = from_architecture(tiny(**text), Preprocess(32)).eval()
    assert clip._cuttable == cuttable
    tokens = torch.tensor([[5, 9, 63, 1, 1, 1], [6, 9, 8, 7, 3, 63]])
    whole = torch.nn.functional.pad(tokens, (0, 14), value=1)
    features = clip.encode_text(tokens)
    assert features.shape == (2, 16) and not torch.allclose(features[0], features[1])
    torch.testing.assert_close(features, clip.encode_text(whole), rtol=0, atol=1e-6)
    torch.testing.assert_close(clip.text(whole), clip.encode_text(whole), rtol=0, atol=1e-6)


def test_rebuilt_from_json():
    clip = small()
    again = from_architecture(json.loads(json.dumps(clip_architecture(clip))), Preprocess(48))
    assert list(again.state_dict()) == list(clip.state_dict())
    again.load_state_dict(clip.state_dict())
    image, tokens = torch.randn(2, 1, 48, 48), torch.randint(1, 4000, (2, 9))
    for found, expected in zip(again.eval()(image, tokens), clip(image, tokens), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_an_architecture_of_open_clip_is_open_clips():
    """The same weights in open_clip's own model give the same features; a batch of this width needs its whole context
    there. The file is one that its trainer writes, of the older form without a text tower of its own."""
    import open_clip

    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-S-32", pretrained=None).eval()
    with torch.no_grad():
        theirs.logit_scale.fill_(3.0)
    clip = build_from(theirs.state_dict())
    image = torch.randn(2, 3, 224, 224)
    tokens = open_clip.get_tokenizer("ViT-S-32")(TEXTS[:2])
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_image(image), theirs.encode_image(image), rtol=0, atol=1e-5)
        torch.testing.assert_close(clip.encode_text(tokens[:, :20]), theirs.encode_text(tokens), rtol=0, atol=1e-5)
    assert clip.log_scale.item() == 3.0 and clip.bias.item() == -10


def build_from(state: dict) -> Clip:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "epoch_1.pt")
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
        config = ClipConfig("ViT-S-32", str(path))
        assert clip_licence(config) == {"name": "not stated", "source": "epoch_1.pt"}
        assert clip_input(config)["mean"] == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
        return build_clip(config, Preprocess(224, channels=3)).eval()


def test_what_is_known_of_a_name():
    assert clip_input(ClipConfig()) == {}
    assert clip_licence(ClipConfig()) == {"name": "none needed", "source": "small, trained from random weights"}
    assert clip_input(ClipConfig("ViT-B-16")) == {"size": 224, "channels": 3}
    assert clip_licence(ClipConfig("ViT-B-16"))["name"] == "none needed"
    seen = clip_input(ClipConfig("ViT-B-16-SigLIP", "webli"))
    assert seen == {"size": 224, "channels": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3, "fit": "stretch"}
    Preprocess(**seen)


def test_weights_bring_their_activation():
    """OpenAI's were trained with QuickGELU, whatever the architecture's name says."""
    assert published(ClipConfig("ViT-B-32", "openai")).model["quick_gelu"]
    assert not published(ClipConfig("ViT-B-32", "laion2b_s34b_b79k")).model["quick_gelu"]


def test_biomedclips_text_tower_is_known_without_its_config():
    from transformers import BertConfig

    model = {"text_cfg": {"hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"}}
    found = text_tower_config(Published("hf-hub:microsoft/BiomedCLIP", _plain(model), {}, None, ()))
    assert found == _BERT_BASE
    default = BertConfig().to_dict()
    assert {name: default[name] for name in found} == found


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "ViT-B-17"}, "architecture of open_clip, got 'ViT-B-17' .did you mean 'ViT-B-"),
        ({"name": "hf-hub:biomedclip"}, "model.name must be hf-hub:ORG/NAME, got 'hf-hub:biomedclip'"),
        ({"name": "local-dir:"}, "model.name must be local-dir:PATH"),
        ({"pretrained": "openai"}, "model.pretrained must be None for small, got 'openai'"),
        ({"name": "ViT-B-16", "pretrained": "imagenet"}, "must be a tag of ViT-B-16 .openai, .* or the PATH"),
        ({"image_unlocked_groups": 2}, "model.image_unlocked_groups is 2, but only a locked tower has some"),
        ({"text_unlocked_layers": -1, "lock_text": True}, "model.text_unlocked_layers must be >= 0, got -1"),
        ({"layer_decay": 0.0}, "model.layer_decay must be > 0 and <= 1, got 0"),
        ({"layer_decay": float("nan")}, "model.layer_decay must be"),
        ({"lora_rank": -1}, "model.lora_rank must be >= 0"),
        ({"lora_alpha": 0}, "model.lora_alpha must be >= 1"),
        ({"lora_rank": 4, "lock_image": True, "lock_text": True}, "both towers are locked"),
    ],
)
def test_config_fails_at_construction(fields, message):
    with pytest.raises(UserError, match=message):
        ClipConfig(**fields)


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("small", None, "preprocess.size must be stated for model.name small"),
        ("ViT-S-32", 40, "preprocess.size must be a multiple of 32, the patch of ViT-S-32, got 40"),
    ],
)
def test_sizes_that_do_not_fit(name, size, message):
    with pytest.raises(UserError, match=message):
        build_clip(ClipConfig(name), Preprocess(size))
