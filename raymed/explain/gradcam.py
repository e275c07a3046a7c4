"""Grad-CAM: which part of the last feature map raises the logit of the positive class.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017, eq. 1-2.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Encoder(Protocol):
    """What Grad-CAM needs of an encoder."""

    def maps(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> last feature maps (B, K, h, w)."""
        ...

    def pool(self, maps: Tensor) -> Tensor:
        """(B, K, h, w) -> features (B, D)."""
        ...


def grad_cam(encoder: Encoder, head: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Heat map of each image's own logit.

    With A_k the k-th of the K feature maps (h, w) and y the logit, alpha_k = mean over (h, w) of dy / dA_k and
    L = ReLU(sum_k alpha_k A_k), brought to (H, W) bilinearly and each image's range to [0, 1].

    The encoder may be frozen: gradients are taken with respect to the activations only. Both modules are used in eval
    mode (no image changes another's map) and left as they came; no parameter receives a gradient.

    Args:
        encoder: has `maps` and `pool`.
        head: features (B, D) -> logits (B,) or (B, 1).
        image: (B, C, H, W) float.

    Returns:
        (B, H, W) float32 in [0, 1]; all zeros where the map is constant (for instance where nothing raises the logit).
    """
    modules = [m for part in (encoder, head) if isinstance(part, nn.Module) for m in part.modules()]
    modes = [m.training for m in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            maps = encoder.maps(image)
        with torch.enable_grad():
            maps = maps.detach().requires_grad_()
            logits = head(encoder.pool(maps))
            (grad,) = torch.autograd.grad(logits.sum(), maps)
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
    with torch.no_grad():
        cam = (grad.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu().float()
        cam = F.interpolate(cam, size=image.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
        span = high - low
        return torch.where(span > 0, (cam - low) / span.clamp_min(torch.finfo(cam.dtype).tiny), 0)


def laterality_hit_rate(cam: Tensor, sides: Sequence[str]) -> dict:
    """x"""
    half = cam.shape[-1] // 2
    left, right = cam[..., :half].sum((1, 2)), cam[..., -half:].sum((1, 2))
    stated, other = [torch.where(torch.tensor([s == side for s in sides]), left, right) for side in ("left", "right")]
    hits = (stated > other).float() + 0.5 * (stated == other)
    return {"hit_rate": hits.mean().item(), "n": len(hits)}
