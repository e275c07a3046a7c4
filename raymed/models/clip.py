"""CLIP: an image encoder and a text encoder into one space (Radford et al. 2021), of any architecture of open_clip.

`build_clip` makes one from published weights or anew, `build_tokenizer` the tokenizer that goes with it; `clip_input`
and `clip_licence` say what images the weights were trained with and under which licence they may be used. A trained one
is its `state_dict` (`merged_state` with LoRA) and `clip_architecture`, plain JSON from which `from_architecture` builds
it again without any file or network.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymed.config import UserError
from raymed.data.preprocess import Preprocess
from raymed.models.clip_config import SMALL, ClipConfig
from raymed.models.clip_files import image_input, licence_of, published, text_tower_config, tokenizer_of, weights_file
from raymed.models.clip_tuning import add_lora, lock, lr_scales, merged_state
from raymed.models.norm import GroupNorm2d, use_global_batchnorm, use_groupnorm
from raymed.models.tokens import Tokenizer, open_clip_tokenizer

__all__ = [
    "Clip",
    "ClipConfig",
    "build_clip",
    "build_tokenizer",
    "clip_architecture",
    "clip_input",
    "clip_licence",
    "from_architecture",
    "has_weights",
    "lr_scales",
    "merged_state",
]

SIGLIP_BIAS = -10.0
"""Where the bias of SigLIP starts: nearly all pairs of a batch are negatives (Zhai et al. 2023, section 3.2)."""
_SMALL_VOCABULARY = 4096
_PLACES = ("hf_model_name", "hf_tokenizer_name")
"""Of a text_cfg: names and folders that a network, once built, has nothing to do with."""


class Clip(nn.Module):
    """Two encoders, a temperature and a bias.

    Attributes:
        visual, text: open_clip's towers.
        log_scale: () parameter, log(1 / temperature).
        bias: () parameter, which only SigLIP uses.
        context_length, pad_id: what the text tower takes.
        at_rest: towers locked as a whole ("visual", "text"); they stay in eval mode, so that nothing in them moves.
    """

    visual: Any
    text: Any

    def __init__(self, towers: Any, architecture: dict[str, Any], size: int | None):
        """
        Args:
            towers: an open_clip.CustomTextCLIP.
            architecture: what `clip_architecture` says.
            size: height and width of the images; None = what the tower was built for.
        """
        super().__init__()
        self.architecture = architecture
        normalised = use_groupnorm if architecture["image_norm"] == "group" else use_global_batchnorm
        self.visual, self.text = normalised(towers.visual), towers.text
        bias = torch.tensor(SIGLIP_BIAS) if towers.logit_bias is None else towers.logit_bias.detach()
        self.log_scale = nn.Parameter(towers.logit_scale.detach().float().reshape(()).clone())
        self.bias = nn.Parameter(bias.float().reshape(()).clone())
        self.context_length: int = architecture["clip"]["text_cfg"].get("context_length", 77)
        self.at_rest: tuple[str, ...] = ()
        own = architecture["text"] is None
        self.pad_id: int = architecture["pad_id"] if own else self.text.config.pad_token_id
        self._cuttable = not own or _reads_only_backwards(self.text)
        if own:
            self.text.transformer.register_forward_pre_hook(_cut_mask, with_kwargs=True)
        if size is not None and hasattr(getattr(self.visual, "trunk", self.visual), "set_input_size"):
            self.visual.set_input_size(size)

    def forward(self, image: Tensor, *tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """image: (B, 1 or 3, H, W) normalised; tokens: (B, L) int64, padded with pad_id, L up to context_length; or
        several of these, B texts together, each of an L of its own.

        Returns (image features (B, D), text features (B, D), both not normalised; scale () = exp(log_scale); bias ()).
        """
        text = torch.cat([self.encode_text(part) for part in tokens])
        return self.encode_image(image), text, self.log_scale.exp(), self.bias

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) normalised -> (B, D). Grey images are seen as three equal channels."""
        return self.visual(image.expand(-1, 3, -1, -1))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> (B, D). The padding does not count, so a batch may be cut to its longest text: a tower that
        would see it (SigLIP's) is given the whole context."""
        if not self._cuttable:
            tokens = F.pad(tokens, (0, self.context_length - tokens.shape[1]), value=self.pad_id)
        return self.text(tokens)

    def train(self, mode: bool = True) -> "Clip":
        """As nn.Module.train, but for locked towers: no dropout, no moving statistics."""
        super().train(mode)
        for tower in self.at_rest:
            self.get_submodule(tower).eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass. Not reentrant, since the first blocks may be frozen."""
        self.visual.set_grad_checkpointing(enable)
        if self.architecture["text"] is None:
            self.text.set_grad_checkpointing(enable)
        elif enable:
            self.text.transformer.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.text.transformer.activation_checkpointing_disable()


def build_clip(config: ClipConfig, preprocess: Preprocess) -> Clip:
    """A CLIP for images of `preprocess.size`, with its published weights, or drawn from torch's global generator.

    Position embeddings are resampled to that size; None keeps the checkpoint's. Raises UserError where files cannot be
    had, weights are of another architecture, or the size does not fit.
    """
    architecture, weights = _described(config, preprocess.size)
    try:
        towers = _towers(architecture, preprocess.size)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # fields and timm names it does not know
        raise UserError(f"model.name {config.name}: open_clip cannot build it: {error}") from error
    if weights is not None:
        _load(towers, weights, config.name)
    _check_size(towers.visual, preprocess.size, config.name)
    clip = Clip(towers, architecture, preprocess.size)
    if config.name == SMALL:
        _open_residual_branches(clip.visual)
    _prepare(clip, config)
    return clip


def build_tokenizer(config: ClipConfig) -> Tokenizer:
    """The tokenizer of the text tower. Raises UserError where its files cannot be had."""
    if config.name == SMALL:
        return open_clip_tokenizer(77, vocabulary=_SMALL_VOCABULARY)
    return tokenizer_of(published(config))


def clip_input(config: ClipConfig) -> dict[str, Any]:
    """{"size", "channels"} that the image tower is built for and, with weights, {"mean", "std"} of the channels that
    they were trained with: fields of a `Preprocess`. {} for "small", which takes what it is given."""
    return {} if config.name == SMALL else image_input(published(config))


def clip_licence(config: ClipConfig) -> dict[str, str]:
    """{"name", "source"} of the weights' licence, from the front matter of the checkpoint's model card."""
    if config.name == SMALL:
        return {"name": "none needed", "source": "small, trained from random weights"}
    return licence_of(published(config))


def has_weights(config: ClipConfig) -> bool:
    """Whether a model begins with published weights."""
    return config.name != SMALL and bool(published(config).weights)


def clip_architecture(clip: Clip) -> dict[str, Any]:
    """Plain JSON from which `from_architecture` builds the same network, without its weights."""
    return deepcopy(clip.architecture)


def from_architecture(architecture: dict[str, Any], preprocess: Preprocess) -> Clip:
    """A CLIP to load a `state_dict` into. No file is read and no network asked."""
    return Clip(_towers(architecture, preprocess.size), architecture, preprocess.size)


def _described(config: ClipConfig, size: int | None) -> tuple[dict[str, Any], Path | None]:
    """The architecture and the file of its weights."""
    if config.name == SMALL:
        return {"clip": _small(size), "image_norm": "group", "text": None, "pad_id": 0}, None
    found = published(config)
    tower = text_tower_config(found)
    foreign = tower is None and found.model["text_cfg"].get("hf_tokenizer_name")
    pad_id = tokenizer_of(found).pad_id if foreign else 0
    text = {field: value for field, value in found.model["text_cfg"].items() if field not in _PLACES}
    described = {"clip": found.model | {"text_cfg": text}, "image_norm": "batch", "text": tower, "pad_id": pad_id}
    return described, weights_file(found)


def _small(size: int | None) -> dict[str, Any]:
    """A compact pair that learns from a few hundred images: a ResNet of ten layers, a causal transformer of two."""
    if size is None:
        raise UserError("preprocess.size must be stated for model.name small")
    image = {"image_size": size, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"}
    text = {"context_length": 77, "vocab_size": _SMALL_VOCABULARY, "width": 128, "heads": 4, "layers": 2}
    return {"embed_dim": 128, "vision_cfg": image, "text_cfg": text}


def _open_residual_branches(visual: nn.Module) -> None:
    """timm starts each branch at zero, by its last norm, for the sake of deep networks. One of ten layers learns more
    slowly from there: on captioned phantoms, after 300 steps of InfoNCE, a mean recall of 0.64, 0.71 and 0.62 over
    three seeds, and 0.75, 0.76 and 0.74 with open branches."""
    for module in visual.modules():
        if isinstance(module, GroupNorm2d):
            nn.init.ones_(module.weight)


def _towers(architecture: dict[str, Any], size: int | None) -> Any:
    """open_clip's model, with random weights. Towers of timm are built for the size of their name."""
    from open_clip import CustomTextCLIP

    model = deepcopy(architecture["clip"])
    if size is not None:
        model["vision_cfg"]["image_size"] = size
    if architecture["text"] is None:
        return CustomTextCLIP(**model)
    with _as_folder(architecture["text"]) as folder:
        model["text_cfg"]["hf_model_name"] = folder
        return CustomTextCLIP(**model)


@contextmanager
def _as_folder(text_tower: dict[str, Any]) -> Iterator[str]:
    """A folder with the text tower's config.json, which is where open_clip has transformers read it from."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(text_tower))
        yield folder


def _load(towers: nn.Module, path: Path, name: str) -> None:
    """Load published weights, in open_clip's form or one that it converts."""
    from open_clip import load_checkpoint

    try:
        found: Any = load_checkpoint(towers, str(path), strict=False)  # type: ignore[arg-type]
    except Exception as error:  # shapes that differ, and what unpickling and safetensors raise for damaged files
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        shown = "; ".join(line[:200] for line in lines[:3])
        raise UserError(f"{path.name} does not fit model.name {name}, or is damaged: {shown}") from error
    missing, unexpected = found or ([], [])
    unexpected = [key for key in unexpected if not key.startswith("text_decoder.")]  # a captioning model's
    if missing or unexpected:
        raise UserError(
            f"{path.name} is a checkpoint of another architecture than model.name {name}: "
            f"{len(missing)} weights are missing ({_some(missing)}), {len(unexpected)} not known ({_some(unexpected)})"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_size(visual: Any, size: int | None, name: str) -> None:
    embedding = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    patch = getattr(visual, "patch_size", None) or getattr(embedding, "patch_size", None)
    if size is not None and isinstance(patch, tuple) and any(size % side for side in patch):
        raise UserError(f"preprocess.size must be a multiple of {patch[0]}, the patch of {name}, got {size}")


def _prepare(clip: Clip, config: ClipConfig) -> None:
    """Freeze what is not trained, and put LoRA on."""
    towers = (
        ("visual", config.lock_image, config.image_unlocked_groups, "image_unlocked_groups"),
        ("text", config.lock_text, config.text_unlocked_layers, "text_unlocked_layers"),
    )
    for name, locked, unlocked, field in towers:
        tower = clip.get_submodule(name)
        if locked:
            lock(tower, unlocked, field)
            clip.at_rest += () if unlocked else (name,)
        elif config.lora_rank:
            add_lora(tower, config.lora_rank, config.lora_alpha)


def _reads_only_backwards(text: Any) -> bool:
    """Whether what follows a text, its padding, cannot reach its features: causal attention, read at a place that does
    not depend on the length of the batch."""
    return text.attn_mask is not None and text.cls_emb is None and text.pool_type in ("first", "argmax", "eos")


def _cut_mask(transformer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """open_clip hands on the causal mask of the whole context, whatever the length of the batch."""
    length, mask = args[0].shape[1], kwargs.get("attn_mask")
    return args, kwargs if mask is None else kwargs | {"attn_mask": mask[..., :length, :length]}
