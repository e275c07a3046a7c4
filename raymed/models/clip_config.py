"""What a CLIP starts as, and which of its weights move."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from raymed.config import UserError, check_range
from raymed.storage import is_remote

SMALL = "small"
HUB, FOLDER = "hf-hub:", "local-dir:"
_FILES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class ClipConfig:
    """The two encoders of a CLIP: which ones, from which weights, and what of them is trained."""

    name: str = SMALL
    """small (built in, trains in minutes), hf-hub:ORG/NAME (such as
    hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224), local-dir:PATH (the same files in a folder), or an
    architecture of open_clip, such as ViT-B-16."""
    pretrained: str | None = None
    """For an architecture: one of open_clip's tags, such as openai, or the PATH of a checkpoint; None: random ones."""
    lock_image: bool = False
    """Keep the image tower as it is (locked-image tuning)."""
    image_unlocked_groups: int = 0
    """Of a locked image tower, train the last ones: 1 = its projection, 2 = its last block too, 3 = the last two ..."""
    lock_text: bool = False
    """Keep the text tower as it is."""
    text_unlocked_layers: int = 0
    """Of a locked text tower, train the last ones, counted as for the image tower."""
    layer_decay: float | None = None
    """Learning rate of every block relative to the one above it; None = the same for all."""
    lora_rank: int = 0
    """Train low-rank parts of the attention of every tower that is not locked, in place of its weights; 0 = off."""
    lora_alpha: int = 16
    """The low-rank parts are scaled by alpha / rank."""

    def __post_init__(self) -> None:
        _check_name(self.name, self.pretrained)
        for tower, groups in (("image", "image_unlocked_groups"), ("text", "text_unlocked_layers")):
            unlocked = getattr(self, groups)
            check_range(f"model.{groups}", unlocked, 0)
            if unlocked and not getattr(self, f"lock_{tower}"):
                raise UserError(f"model.{groups} is {unlocked}, but only a locked tower has some: set lock_{tower}")
        if self.layer_decay is not None:
            check_range("model.layer_decay", self.layer_decay, 0, 1, low_open=True)
        check_range("model.lora_rank", self.lora_rank, 0)
        check_range("model.lora_alpha", self.lora_alpha, 1)
        if self.lora_rank and self.lock_image and self.lock_text:
            raise UserError(f"model.lora_rank is {self.lora_rank}, but both towers are locked: unlock one, or set 0")


def _check_name(name: str, pretrained: str | None) -> None:
    if name.startswith(HUB) and not re.fullmatch(r"[\w.-]+/[\w.-]+", name.removeprefix(HUB)):
        raise UserError(f"model.name must be {HUB}ORG/NAME, got {name!r}")
    if name.startswith(FOLDER) and not name.removeprefix(FOLDER):
        raise UserError(f"model.name must be {FOLDER}PATH, got {name!r}")
    if name == SMALL or name.startswith((HUB, FOLDER)):
        if pretrained is not None:
            raise UserError(f"model.pretrained must be None for {name}, got {pretrained!r}: it is for architectures")
        return
    import open_clip

    models = open_clip.list_models()
    if name not in models:
        near = difflib.get_close_matches(name, [SMALL, *models], n=3)
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise UserError(
            f"model.name must be {SMALL}, {HUB}ORG/NAME, {FOLDER}PATH or an architecture of open_clip, "
            f"got {name!r}{hint}"
        )
    if pretrained is not None and not _is_file(pretrained) and not open_clip.is_pretrained_cfg(name, pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"model.pretrained must be a tag of {name} ({tags}) or the PATH of a checkpoint ({', '.join(_FILES)}), "
            f"got {pretrained!r}"
        )


def _is_file(place: str) -> bool:
    return is_remote(place) or Path(place).suffix in _FILES
