"""Encoders: image -> feature maps -> one feature vector. Any timm network, or the built-in compact ResNet.

`maps` and `pool` are the two halves of `forward`, so that Grad-CAM needs no hooks.
"""

import difflib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from raymed.config import UserError, check_choice
from raymed.models.norm import use_global_batchnorm, use_groupnorm
from raymed.models.resnet import ResNetSmall
from raymed.storage import is_remote, local_copy

BUILT_IN = "resnet_small"
HUB_TIMEOUT = 5.0  # seconds
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderConfig:
    """The network that turns an image into features."""

    backbone: str = BUILT_IN
    """resnet_small (built in, for images of about 28 to 128 pixels a side) or any timm name, like efficientnet_b0."""
    weights: str = "none"
    """none, pretrained (timm's, from the Hugging Face hub), or the PATH of a .safetensors file."""
    norm: Literal["batch", "group"] = "batch"
    """batch: statistics of the global batch over all workers; group: of each image alone."""

    def __post_init__(self):
        check_choice("norm", self.norm, ("batch", "group"))
        if self.backbone != BUILT_IN:
            _check_timm_name(self.backbone)
        elif self.weights == "pretrained":
            raise UserError(f"weights: {BUILT_IN} has no pretrained weights; choose none or the PATH of a .safetensors")
        if self.weights not in ("none", "pretrained") and not self.weights.endswith(".safetensors"):
            raise UserError(
                f"weights must be none, pretrained or the PATH of a .safetensors file, got {self.weights!r}"
            )


class Encoder(nn.Module):
    """A network with its classifier removed.

    Attributes:
        net: has `forward_features`, `forward_head(maps, pre_logits=True)`, `head_hidden_size`, as timm's networks do.
        num_features: D, the width of a feature vector.
    """

    net: Any

    def __init__(self, net: Any):
        super().__init__()
        self.net = net
        self.num_features: int = net.head_hidden_size

    def maps(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> last feature maps (B, F, h, w). A transformer gives its tokens (B, N, F)."""
        return self.net.forward_features(x)

    def pool(self, maps: Tensor) -> Tensor:
        """What `maps` returned -> feature vectors (B, D)."""
        return self.net.forward_head(maps, pre_logits=True)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> feature vectors (B, D)."""
        return self.pool(self.maps(x))


def build_encoder(config: EncoderConfig, in_channels: int) -> Encoder:
    """A new encoder for images of `in_channels` channels. Draws its random weights from torch's global generator.

    Raises UserError where the weights cannot be had or do not fit. Missing and unexpected keys are logged as a warning.
    """
    encoder = Encoder(_network(config, in_channels))
    path = _weights_file(config)
    if path is not None:
        result = load_weights(encoder.net, path)
        for kind, keys in result._asdict().items():
            if keys:
                log.warning("%s: %d %s keys: %s", path, len(keys), kind, _some(keys))
    (use_groupnorm if config.norm == "group" else use_global_batchnorm)(encoder)
    return encoder


class LoadResult(NamedTuple):
    """Keys of a network that a weights file lacks, and keys of the file that the network lacks."""

    missing: list[str]
    unexpected: list[str]


def load_weights(net: nn.Module, path: str | Path) -> LoadResult:
    """Load a .safetensors file into a network, in place.

    A name in front of all keys (such as "encoder.net.") is removed, and a timm stem of 3 channels is adapted to the
    network's number of channels. Raises UserError where the file cannot be read, no key matches, or a shape differs.
    """
    wanted = net.state_dict()
    state = _without_prefix(_read(path), wanted)
    _adapt_stem(net, wanted, state)
    if not wanted.keys() & state.keys():
        raise UserError(f"weights: no key of {path} is one of the network's: has {_some(state)}; wants {_some(wanted)}")
    differ = [
        f"{key} is {tuple(state[key].shape)}, wanted {tuple(wanted[key].shape)}"
        for key in wanted.keys() & state.keys()
        if state[key].shape != wanted[key].shape
    ]
    if differ:
        raise UserError(f"weights: shapes in {path} differ from the network's: {_some(sorted(differ))}")
    return LoadResult(*map(sorted, net.load_state_dict(state, strict=False)))


def _network(config: EncoderConfig, in_channels: int) -> nn.Module:
    if config.backbone == BUILT_IN:
        return ResNetSmall(in_channels)
    import timm

    from_hub = config.weights == "pretrained" and not _placed_file(config.backbone).is_file()
    if from_hub:
        _check_hub(config.backbone)
    return timm.create_model(config.backbone, pretrained=from_hub, num_classes=0, in_chans=in_channels)


def _weights_file(config: EncoderConfig) -> Path | None:
    """The file to load: the one named, or the one placed by hand where the hub cannot be reached."""
    if config.weights == "none":
        return None
    if config.weights == "pretrained":
        return _placed_file(config.backbone) if _placed_file(config.backbone).is_file() else None
    return local_copy(config.weights if is_remote(config.weights) else Path(config.weights).expanduser())


def _placed_file(backbone: str) -> Path:
    """Where pretrained weights are looked for before the hub: torch's folder of checkpoints."""
    name = (_hub_repo(backbone) or backbone).split("/")[-1]
    return Path(torch.hub.get_dir(), "checkpoints", f"{name}.safetensors")


def _hub_repo(backbone: str) -> str | None:
    """The hub's name for the pretrained weights of a network, such as timm/resnet18.a1_in1k."""
    import timm

    return getattr(timm.get_pretrained_cfg(backbone), "hf_hub_id", None)


def _check_hub(backbone: str) -> None:
    """Raise UserError within HUB_TIMEOUT unless the weights are in the hub's cache or the hub answers."""
    import huggingface_hub as hub

    repo = _hub_repo(backbone)
    if repo is None:
        raise UserError(f"weights: timm has no pretrained weights of {backbone} on the hub; choose none or a PATH")
    cached = hub.try_to_load_from_cache(repo, "model.safetensors")
    if isinstance(cached, str) and os.path.isfile(cached):
        return
    url = hub.hf_hub_url(repo, "model.safetensors")
    try:
        hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT)
    except Exception as error:  # whatever the hub's client and its transport raise
        raise UserError(
            f"weights: cannot reach the hub for the pretrained weights of {backbone} ({type(error).__name__}). "
            f"On a machine that can, download {url}, and put it at {_placed_file(backbone)}; "
            "or keep the file anywhere and set --model.weights PATH.safetensors"
        ) from error


def _check_timm_name(backbone: str) -> None:
    import timm

    architecture, _, tag = backbone.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, [BUILT_IN, *timm.list_models()], n=3)
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise UserError(f"backbone must be {BUILT_IN} or a timm name, got {backbone!r}{hint}")
    names = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and backbone not in names:
        raise UserError(f"backbone {backbone!r}: timm knows no weights {tag!r}; it has {', '.join(names) or 'none'}")


def _read(path: str | Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"weights: cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"weights: {path} is not a safetensors file: {error}") from error


def _without_prefix(state: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Remove the leading names under which the checkpoint kept the network: those that make most keys match."""
    prefixes = sorted({""} | {".".join(key.split(".")[:depth]) + "." for key in state for depth in (1, 2)})
    best = max(prefixes, key=lambda prefix: sum(prefix + key in state for key in wanted))
    return {key.removeprefix(best): value for key, value in state.items()}


def _adapt_stem(net: nn.Module, wanted: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Fold or repeat the 3 input channels of timm's published stems."""
    from timm.models import adapt_input_conv

    key = f"{getattr(net, 'pretrained_cfg', {}).get('first_conv')}.weight"
    if key in wanted and key in state and state[key].shape[1] == 3 != wanted[key].shape[1]:
        state[key] = adapt_input_conv(wanted[key].shape[1], state[key])


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
