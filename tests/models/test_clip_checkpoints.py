"""Published checkpoints on a small one of BiomedCLIP's shape: what open_clip makes of it, bundles, and bad files."""

import json
import time

import pytest
import torch
from tiny_biomedclip import CONTEXT, TEXT_TOWER, write_tiny_biomedclip

from raymed.config import UserError
from raymed.data.preprocess import Preprocess
from raymed.models.clip import (
    ClipConfig,
    build_clip,
    build_tokenizer,
    clip_architecture,
    clip_input,
    clip_licence,
    from_architecture,
)
from raymed.models.tokens import Tokenizer

TEXTS = ["Chest x-ray with a large effusion on the right.", "normal", "small nodule in the left upper lobe of the lung"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_biomedclip(tmp_path_factory.mktemp("checkpoints") / "biomedclip")


@pytest.fixture
def own(tmp_path):
    """A checkpoint to damage."""
    return write_tiny_biomedclip(tmp_path / "biomedclip", "open_clip_model.safetensors")


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://10.255.255.1:9")


@pytest.fixture
def no_network(monkeypatch):
    """Fails a test that has asked any other machine, also where the answer was not needed."""
    asked = []

    def refuse(*place):
        asked.append(place)
        raise OSError("there is no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    yield
    assert asked == []


def local(folder) -> ClipConfig:
    return ClipConfig(f"local-dir:{folder}")


def edit(folder, file="open_clip_config.json", **text_cfg) -> None:
    config = json.loads((folder / file).read_text())
    config["model_cfg"]["text_cfg"] |= text_cfg
    (folder / file).write_text(json.dumps(config))


def test_features_are_open_clips(folder, tmp_path):
    """open_clip looks for the text tower by its name, which is a folder here."""
    import open_clip

    offline = write_tiny_biomedclip(tmp_path / "offline")
    edit(offline, hf_model_name=str(folder))
    theirs = open_clip.create_model(f"local-dir:{offline}").eval()
    clip = build_clip(local(folder), Preprocess(channels=3)).eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    image = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_image(image), theirs.encode_image(image), rtol=0, atol=1e-6)
        torch.testing.assert_close(clip.encode_text(tokens), theirs.encode_text(tokens), rtol=0, atol=1e-6)
    assert clip.log_scale.item() == theirs.logit_scale.item() == pytest.approx(4.4454)
    assert (clip.context_length, clip.pad_id) == (CONTEXT, 0)


def test_a_cut_batch_and_one_text_alone_have_the_same_features(folder):
    clip = build_clip(local(folder), Preprocess(64, channels=3)).eval()
    tokens, lengths = build_tokenizer(local(folder))(TEXTS)
    assert tokens.shape[1] == lengths.max() < CONTEXT
    whole = torch.nn.functional.pad(tokens, (0, CONTEXT - tokens.shape[1]), value=clip.pad_id)
    expected = clip.encode_text(whole)
    torch.testing.assert_close(clip.encode_text(tokens), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(clip.encode_text(tokens[1:2, : lengths[1]]), expected[1:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [160, 48])
def test_loaded_and_rebuilt_from_json_without_network(size, folder, no_network):
    clip = build_clip(local(folder), Preprocess(size, channels=3)).eval()
    travelled = json.dumps(clip_architecture(clip))
    assert str(folder) not in travelled and TEXT_TOWER not in travelled
    again = from_architecture(json.loads(travelled), Preprocess(size, channels=3)).eval()
    again.load_state_dict(clip.state_dict())
    tokens, _ = build_tokenizer(local(folder))(TEXTS)
    image = torch.randn(3, 3, size, size)
    for found, expected in zip(again(image, tokens), clip(image, tokens), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(Tokenizer.from_json(build_tokenizer(local(folder)).to_json())(TEXTS)[0], tokens)


def test_the_text_tower_drops_out_only_in_training(folder):
    clip = build_clip(local(folder), Preprocess(48, channels=3))
    tokens, _ = build_tokenizer(local(folder))(TEXTS)
    clip.train()
    assert not torch.equal(clip.encode_text(tokens), clip.encode_text(tokens))
    clip.eval()
    assert torch.equal(clip.encode_text(tokens), clip.encode_text(tokens))


def test_what_the_folder_says(folder, tmp_path):
    assert clip_licence(local(folder)) == {"name": "mit", "source": "local-dir:biomedclip"}
    seen = clip_input(local(folder))
    assert (seen["size"], seen["channels"]) == (160, 3) and seen["std"][1] == 0.26130258
    Preprocess(**seen)
    own = write_tiny_biomedclip(tmp_path / "other")
    for card, name in [
        ("---\nlicense: other\nlicense_name: physionet-1.5.0\n---\n", "physionet-1.5.0"),
        ("---\nlicense: [cc-by-4.0, mit]\n---\n", "cc-by-4.0, mit"),
        ("---\ntags: [clip]\n---\n", "not stated"),
        ("# no front matter", "not stated"),
        ("---\nlicense: [broken\n---\n", "not stated"),
    ]:
        (own / "README.md").write_text(card)
        assert clip_licence(local(own))["name"] == name
    (own / "README.md").unlink()
    assert clip_licence(local(own)) == {"name": "not stated", "source": "local-dir:other"}


def test_safetensors_are_read_too(own, folder):
    one, two = (build_clip(local(place), Preprocess(160, channels=3)) for place in (own, folder))
    for (name, found), expected in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def damage_config(folder):
    (folder / "open_clip_config.json").write_text("{")


def damage_weights(folder):
    (folder / "open_clip_model.safetensors").write_bytes(b"not safetensors")


def other_width(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 48
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def other_depth(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_config, "open_clip_config.json is not JSON .* Copy it again"),
        (lambda f: (f / "open_clip_config.json").write_text("{}"), "no model_cfg with embed_dim, vision_cfg and"),
        (lambda f: (f / "open_clip_config.json").unlink(), "has no open_clip_config.json. Such a folder must hold"),
        (lambda f: (f / "open_clip_model.safetensors").unlink(), "no weights: open_clip_model.safetensors or"),
        (damage_weights, "open_clip_model.safetensors does not fit model.name .*, or is damaged: "),
        (other_width, "does not fit model.name .*size mismatch for text.proj"),
        (other_depth, "another architecture than .*: 16 weights are missing .text.transformer.encoder.layer.2"),
        (lambda f: edit(f, pooler="cls"), "open_clip cannot build it: .*unexpected keyword argument 'pooler'"),
    ],
)  # fmt: skip
def test_bad_folders(damage, message, own):
    damage(own)
    with pytest.raises(UserError, match=message):
        build_clip(local(own), Preprocess(160, channels=3))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*nowhere. Such a folder must hold open_clip_config.json"):
        build_clip(local(tmp_path / "nowhere"), Preprocess(160))


def test_size_must_be_a_multiple_of_the_patch(folder):
    with pytest.raises(UserError, match="preprocess.size must be a multiple of 16, .* got 50"):
        build_clip(local(folder), Preprocess(50, channels=3))


def test_unreachable_hub_says_what_to_bring(no_hub):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        build_clip(ClipConfig("hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"), Preprocess(224))
    assert time.monotonic() - start < 10
    for part in ("hf download microsoft/BiomedCLIP-PubMedBERT_256", "--model.name local-dir:FOLDER", "tokenizer.json",
                 "open_clip_config.json", "open_clip_model.safetensors or open_clip_pytorch_model.bin"):  # fmt: skip
        assert part in str(error.value)


def test_unknown_text_tower_without_its_config(own, no_hub):
    (own / "config.json").unlink()
    edit(own, hf_model_name="someone/other-bert")
    with pytest.raises(UserError, match=f"huggingface.co/someone/other-bert/.*config.json at {own}/config.json"):
        build_clip(local(own), Preprocess(160, channels=3))


def test_biomedclips_text_tower_is_tried_where_the_folder_has_no_config(own, no_hub):
    """Which is right for the real one; this one is smaller."""
    (own / "config.json").unlink()
    with pytest.raises(UserError, match="size mismatch for text"):
        build_clip(local(own), Preprocess(160, channels=3))
    assert TEXT_TOWER in (own / "open_clip_config.json").read_text()


def test_from_the_hubs_cache_without_network(folder, no_hub, monkeypatch):
    """Files that are there are not asked for."""
    import huggingface_hub

    def cached(repo, file, **_):
        assert repo == "org/name"
        path = folder / file
        return str(path) if path.is_file() else huggingface_hub._CACHED_NO_EXIST

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr("raymed.models.clip_files._KNOWN_TEXT_TOWERS", {TEXT_TOWER: tower(folder)})
    clip = build_clip(ClipConfig("hf-hub:org/name"), Preprocess(160, channels=3))
    expected = build_clip(local(folder), Preprocess(160, channels=3))
    assert torch.equal(clip.text.proj[0].weight, expected.text.proj[0].weight)
    assert clip_licence(ClipConfig("hf-hub:org/name")) == {"name": "mit", "source": "hf-hub:org/name"}


def tower(folder) -> dict:
    return json.loads((folder / "config.json").read_text())
