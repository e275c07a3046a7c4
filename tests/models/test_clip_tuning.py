"""What of a CLIP is trained: locks, partial unfreezing, layer-wise rates, LoRA, and activations computed again."""

import copy

import pytest
import torch
from tiny_biomedclip import write_tiny_biomedclip
from tiny_clip import write_tiny_clip
from torch import Tensor, nn

from raymed.config import UserError
from raymed.data.preprocess import Preprocess
from raymed.models.checkpointing import checkpoint_activations
from raymed.models.clip import (
    Clip,
    ClipConfig,
    build_clip,
    clip_architecture,
    from_architecture,
    lr_scales,
    merged_state,
)
from raymed.models.clip_tuning import depths


@pytest.fixture(scope="module")
def biomedclip(tmp_path_factory):
    return f"local-dir:{write_tiny_biomedclip(tmp_path_factory.mktemp('tuning') / 'biomedclip')}"


@pytest.fixture(scope="module")
def own_towers(tmp_path_factory):
    return f"local-dir:{write_tiny_clip(tmp_path_factory.mktemp('tuning') / 'own')}"


@pytest.fixture(params=["own towers", "biomedclip"])
def name(request, own_towers, biomedclip):
    """open_clip's own towers with nn.MultiheadAttention; timm's and BERT."""
    return own_towers if request.param == "own towers" else biomedclip


def build(name: str, seed: int = 0, **fields) -> Clip:
    torch.manual_seed(seed)
    return build_clip(ClipConfig(name, **fields), Preprocess(32, channels=3))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, 100, (4, 8), generator=generator)
    return torch.randn(4, 3, 32, 32, generator=generator), tokens


def loss_of(clip: Clip) -> Tensor:
    image, text, scale, _ = clip(*batch())
    logits = scale * nn.functional.normalize(image) @ nn.functional.normalize(text).T
    return nn.functional.cross_entropy(logits, torch.arange(4))


def train(clip: Clip, steps: int = 3) -> Clip:
    clip.train()
    optimiser = torch.optim.SGD([p for p in clip.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        torch.manual_seed(step)
        optimiser.zero_grad()
        loss_of(clip).backward()
        optimiser.step()
    return clip.eval()


def moved(clip: Clip, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in clip.state_dict().items() if not torch.equal(value, before[name])}


def snapshot(clip: Clip) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in clip.state_dict().items()}


def test_a_locked_tower_does_not_move_and_does_not_drop_out(name):
    clip = build(name, lock_text=True)
    before = snapshot(clip)
    found = moved(train(clip), before)
    assert "log_scale" in found and not any(n.startswith("text.") for n in found)
    assert any(n.startswith("visual.") for n in found)
    clip.train()
    tokens = batch()[1]
    assert torch.equal(clip.encode_text(tokens), clip.encode_text(tokens))
    assert clip.visual.training and not clip.text.training and not clip.encode_text(tokens).requires_grad


def test_partial_unfreezing(biomedclip):
    fields = {"lock_image": True, "image_unlocked_groups": 2, "lock_text": True, "text_unlocked_layers": 1}
    clip = build(biomedclip, **fields)
    trained = {n for n, p in clip.named_parameters() if p.requires_grad}
    assert {n.split(".attn")[0].split(".mlp")[0] for n in trained if n.startswith("visual")} == {
        "visual.trunk.blocks.5.norm1.weight", "visual.trunk.blocks.5.norm1.bias", "visual.trunk.blocks.5",
        "visual.trunk.blocks.5.norm2.weight", "visual.trunk.blocks.5.norm2.bias",
        "visual.trunk.norm.weight", "visual.trunk.norm.bias", "visual.head.proj.weight",
    }  # fmt: skip
    assert {n for n in trained if n.startswith("text")} == {"text.proj.0.weight", "text.proj.2.weight"}
    before = snapshot(clip)
    assert moved(train(clip), before) == trained - {"bias"}
    everything = build(biomedclip, lock_image=True, image_unlocked_groups=8, lock_text=True, text_unlocked_layers=4)
    assert all(p.requires_grad for p in everything.parameters())


def test_more_unlocked_than_there_is(name):
    with pytest.raises(UserError, match="model.text_unlocked_layers must be <= [64] for this tower .* got 20"):
        build(name, lock_text=True, text_unlocked_layers=20)
    with pytest.raises(UserError, match="model.image_unlocked_groups must be <= 8 .*its embeddings, its 6 blocks and"):
        build(name, lock_image=True, image_unlocked_groups=9)


def test_depths_of_open_clips_own_towers(own_towers):
    clip = build(own_towers)
    image, text = depths(clip.visual), depths(clip.text)
    assert image["conv1.weight"] == image["class_embedding"] == image["positional_embedding"] == 0
    assert image["transformer.resblocks.0.attn.in_proj_weight"] == 1 and image["ln_pre.weight"] == 0
    assert image["transformer.resblocks.5.mlp.c_fc.bias"] == image["ln_post.weight"] == 6 and image["proj"] == 7
    assert text["token_embedding.weight"] == text["positional_embedding"] == 0
    assert text["transformer.resblocks.3.ln_1.weight"] == text["ln_final.bias"] == 4 and text["text_projection"] == 5


def test_small_can_be_unlocked_from_its_last_stage_on():
    clip = build("small", lock_image=True, image_unlocked_groups=2)
    trained = {n for n, p in clip.visual.named_parameters() if p.requires_grad}
    assert "head.proj.weight" in trained and {n.rsplit(".", 2)[0] for n in trained - {"head.proj.weight"}} == {
        "trunk.layer4.0", "trunk.layer4.0.downsample"
    }  # fmt: skip
    with pytest.raises(UserError, match="model.image_unlocked_groups must be <= 6 .*its 4 blocks and .* got 9"):
        build("small", lock_image=True, image_unlocked_groups=9)


@pytest.mark.parametrize("architecture, blocks", [("RN50", 4), ("convnext_base", 4), ("ViT-B-16-SigLIP", 12)])
def test_depths_of_other_image_towers(architecture, blocks):
    """On the meta device: only names are looked at."""
    import open_clip

    config = open_clip.get_model_config(architecture)
    config["text_cfg"] = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 64, "context_length": 8}
    config.pop("custom_text", None)
    with torch.device("meta"):
        tower = open_clip.CustomTextCLIP(**config).visual
    found = depths(tower)
    assert found.keys() == dict(tower.named_parameters()).keys()
    assert set(found.values()) == set(range(max(found.values()) + 1)) and max(found.values()) > blocks
    first, last = list(found.values())[0], max(found.values())
    assert first == 0 and sum(depth == last for depth in found.values()) < 20


def test_learning_rates_decay_from_the_top(name):
    clip = build(name, layer_decay=0.5)
    scales = lr_scales(clip, ClipConfig(name, layer_decay=0.5))
    assert scales.keys() == dict(clip.named_parameters()).keys()
    assert scales["log_scale"] == scales["bias"] == 1.0
    if name.endswith("own"):
        assert scales["visual.proj"] == scales["text.text_projection"] == 1.0
        assert scales["visual.conv1.weight"] == 0.5**7 and scales["text.token_embedding.weight"] == 0.5**5
        assert scales["text.transformer.resblocks.3.ln_1.weight"] == 0.5
    else:
        assert scales["visual.head.proj.weight"] == scales["text.proj.2.weight"] == 1.0
        assert scales["visual.trunk.pos_embed"] == 0.5**7 and scales["visual.trunk.blocks.5.norm1.weight"] == 0.5
        assert scales["text.transformer.embeddings.word_embeddings.weight"] == 0.5**3
        assert scales["text.transformer.encoder.layer.1.attention.self.query.weight"] == 0.5
    assert set(lr_scales(clip, ClipConfig(name)).values()) == {1.0}


def test_lora_starts_as_the_network_and_trains_little(name):
    plain, clip = build(name).eval(), build(name, lora_rank=4).eval()
    for found, expected in zip(clip(*batch()), plain(*batch()), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    before = snapshot(clip)
    found = moved(train(clip), before)
    trained = {n for n, p in clip.named_parameters() if p.requires_grad} - {"bias"}
    assert found == trained and all(".lora_" in n for n in trained - {"log_scale"})
    assert {n.split(".")[0] for n in trained} == {"visual", "text", "log_scale"}
    share = sum(p.numel() for p in clip.parameters() if p.requires_grad) / sum(p.numel() for p in plain.parameters())
    assert share < 0.2


def test_lora_merged_is_a_plain_network(name):
    clip = train(build(name, lora_rank=4, lora_alpha=8), steps=5)
    plain = from_architecture(clip_architecture(clip), Preprocess(32, channels=3)).eval()
    before = plain.state_dict().keys()
    state = merged_state(clip)
    assert state.keys() == before and not any(value.requires_grad for value in state.values())
    plain.load_state_dict(state)
    expected = clip(*batch())
    for found, wanted in zip(plain(*batch()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    untrained = build(name).eval()(*batch())
    assert (expected[1] - untrained[1]).abs().max() > 1e-3  # LoRA has changed something
    for found, wanted in zip(clip(*batch()), expected, strict=True):  # and merging nothing
        assert torch.equal(found, wanted)


def test_without_lora_the_merged_state_is_the_state(name):
    clip = build(name)
    state = merged_state(clip)
    assert state.keys() == clip.state_dict().keys()
    assert all(torch.equal(value, state[n]) for n, value in clip.state_dict().items())


def test_lora_goes_on_the_tower_that_is_not_locked(biomedclip):
    clip = build(biomedclip, lora_rank=2, lock_text=True)
    assert {n.split(".")[0] for n, p in clip.named_parameters() if p.requires_grad} == {"visual", "log_scale", "bias"}
    scales = lr_scales(clip, ClipConfig(layer_decay=0.5))
    assert scales["visual.trunk.blocks.5.attn.qkv.lora_A.default.weight"] == 0.5


def test_lora_state_comes_back(name):
    """As a checkpoint does it: another one of the same config takes the state."""
    clip = train(build(name, lora_rank=4))
    again = build(name, seed=1, lora_rank=4).eval()
    again.load_state_dict(clip.state_dict())
    for found, expected in zip(again(*batch()), clip(*batch()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("fields", [{}, {"lora_rank": 4}, {"lock_text": True, "text_unlocked_layers": 2}])
def test_activations_computed_again(name, fields):
    plain = build(name, **fields).train()
    clip = copy.deepcopy(plain)
    assert checkpoint_activations(clip)
    for each in (plain, clip):
        torch.manual_seed(3)  # of dropout
        loss_of(each).backward()
    expected = dict(plain.named_parameters())
    for n, parameter in clip.named_parameters():
        if expected[n].grad is None:
            assert parameter.grad is None, n
        else:
            torch.testing.assert_close(parameter.grad, expected[n].grad, rtol=1e-4, atol=1e-7, msg=n)


def test_dropout_repeats_with_the_generator(biomedclip):
    """What replaying a micro-batch needs."""
    clip = build(biomedclip).train()
    losses = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        losses.append(loss_of(clip).item())
    assert losses[0] == losses[1] != losses[2]
