"""Which weights of a CLIP move, and how fast: locked towers, partial unfreezing, LoRA, layer-wise learning rates.

Parameters of a tower lie at depths: 0 the embeddings, 1 ... L its blocks, L + 1 the projection to the shared space (for
towers of timm as timm groups them; the last norm belongs to the last block). Sources: Zhai et al. 2022 (LiT: the image
tower locked), Clark et al. 2020, section 3.3, and Bao et al. 2022 (learning rates that decay layer by layer),
Hu et al. 2022 (LoRA).
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from raymed.config import UserError
from raymed.models.clip_config import ClipConfig

_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|layers?|block)\.?(\d+)\.")
_LAST_NORM = re.compile(r"^(?:ln_post|ln_final|transformer\.(?:pooler|final_layer_norm|layer_norm|norm))\b")
_PROJECTION = re.compile(r"^(?:proj|head|text_projection|attn_?pool\w*)\b")
_ATTENTION_INPUTS = {"qkv", "q", "k", "v", "kv", "query", "key", "value", "q_proj", "k_proj", "v_proj"}


def depths(tower: nn.Module) -> dict[str, int]:
    """Parameter name -> its depth in a tower of open_clip (its own, timm's or transformers')."""
    return _timm_depths(tower) if hasattr(tower, "trunk") else _named_depths(tower)


def _timm_depths(tower: Any) -> dict[str, int]:
    from timm.models import group_parameters

    within: Any = group_parameters(tower.trunk, tower.trunk.group_matcher(), reverse=True)
    head = max(within.values()) + 1
    return {f"trunk.{name}": depth for name, depth in within.items()} | {
        f"head.{name}": head for name, _ in tower.head.named_parameters()
    }


def _named_depths(tower: nn.Module) -> dict[str, int]:
    names = [name for name, _ in tower.named_parameters()]
    found = {name: int(match[1]) for name in names if (match := _BLOCK.search(name))}
    blocks = {number: depth for depth, number in enumerate(sorted(set(found.values())), start=1)}
    last = len(blocks)

    def depth(name: str) -> int:
        if name in found:
            return blocks[found[name]]
        return last if _LAST_NORM.match(name) else last + 1 if _PROJECTION.match(name) else 0

    return {name: depth(name) for name in names}


def lock(tower: nn.Module, unlocked: int, field: str) -> None:
    """Freeze a tower but for its last `unlocked` depths: 1 = the projection, 2 = the last block too, and so on.

    Raises UserError, with the name of the field, where the tower has fewer depths.
    """
    depth = depths(tower)
    top = max(depth.values())
    if unlocked > top + 1:
        blocks = f"its embeddings, its {top - 1} blocks and its projection"
        raise UserError(f"model.{field} must be <= {top + 1} for this tower ({blocks}), got {unlocked}")
    for name, parameter in tower.named_parameters():
        if depth[name] <= top - unlocked:
            parameter.requires_grad_(False)


def add_lora(tower: nn.Module, rank: int, alpha: int) -> None:
    """Freeze a tower; give the input projections of its attention a trained low-rank part, W + alpha/rank B A.

    Linear layers (timm's qkv, transformers' query, key, value) compute B (A x) beside W x; the `in_proj_weight` of
    nn.MultiheadAttention, which is no layer of its own, is summed up anew in each forward pass. (peft's wrapper of the
    whole nn.MultiheadAttention adds to the frozen weight and subtracts again, so that rounding moves it.)
    """
    from peft import LoraConfig, inject_adapter_in_model

    modules = dict(tower.named_modules())
    linear = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _ATTENTION_INPUTS
    ]
    fused = [f"{name}.in_proj_weight" for name, m in modules.items() if isinstance(m, nn.MultiheadAttention)]
    if not linear and not fused:
        raise UserError(f"model.lora_rank: found no attention in {type(tower).__name__} to put LoRA on; set it to 0")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear, target_parameters=fused or None)
    inject_adapter_in_model(config, tower)


def merged_state(clip: nn.Module) -> dict[str, Tensor]:
    """The state_dict with LoRA's parts added to the weights they belong to: names and shapes as without LoRA."""
    state = {
        name.replace(".base_layer", ""): value
        for name, value in clip.state_dict().items()
        if ".lora_A." not in name and ".lora_B." not in name
    }
    for name, layer in _lora_layers(clip):
        (adapter,) = layer.active_adapters
        weight = f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"
        state[weight] = state[weight] + layer.get_delta_weight(adapter).detach().to(state[weight].dtype)
    return state


def _lora_layers(clip: nn.Module) -> Iterator[tuple[str, Any]]:
    if not any(".lora_A." in name for name, _ in clip.named_parameters()):
        return
    from peft.tuners.lora import LoraLayer

    yield from ((name, module) for name, module in clip.named_modules() if isinstance(module, LoraLayer))


def lr_scales(clip: nn.Module, config: ClipConfig) -> dict[str, float]:
    """Parameter name -> factor of the learning rate: layer_decay^(distance from the top of its tower), so 1 for the
    projection; 1 for the temperature and the bias, and everywhere without `layer_decay`."""
    scales = {name: 1.0 for name, _ in clip.named_parameters()}
    if config.layer_decay is None:
        return scales
    for tower in ("visual", "text"):
        found = depths(clip.get_submodule(tower))
        top = max(found.values())
        scales |= {f"{tower}.{name}": config.layer_decay ** (top - depth) for name, depth in found.items()}
    return scales
