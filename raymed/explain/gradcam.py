"""Grad-CAM: which part of the last feature maps raises the logit of the positive class, and on which side it lies.

R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raymed.config import check_choice

_Z95 = 1.959964  # normal quantile of a two-sided 95 % interval


class Encoder(Protocol):
    """What Grad-CAM needs of an encoder."""

    def maps(self, x: Tensor, /) -> Tensor:
        """Images (B, C, H, W) -> last feature maps (B, K, h, w)."""
        ...

    def pool(self, maps: Tensor, /) -> Tensor:
        """Feature maps (B, K, h, w) -> features (B, D)."""
        ...


def grad_cam(encoder: Encoder, head: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Heat map of each image's own logit y.

    L = ReLU(sum_k alpha_k A_k) with A_k the k-th feature map (h, w) and alpha_k the mean of dy / dA_k over (h, w)
    (equations 1 and 2); L is brought to (H, W) bilinearly, then each image's range to [0, 1].

    The encoder may be frozen: gradients are taken with respect to the feature maps alone and no parameter receives
    one. Modules run in eval mode, where an image's map does not depend on its batch, and are left as they came.

    Args:
        encoder: has `maps` and `pool`.
        head: features (B, D) -> logits (B,).
        image: (B, C, H, W), as the encoder takes it.

    Returns:
        (B, H, W) float32 in [0, 1]; all 0 for an image whose map is constant, as where nothing raises its logit.
    """
    modules = [module for part in (encoder, head) if isinstance(part, nn.Module) for module in part.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.inference_mode(False):
            maps, grad = _maps_and_gradient(encoder, head, image)
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
    weights = grad.mean((2, 3), keepdim=True)
    cam = (weights * maps).sum(1, keepdim=True).relu().float()
    return _to_unit_range(F.interpolate(cam, size=image.shape[-2:], mode="bilinear", align_corners=False)[:, 0])


def _maps_and_gradient(encoder: Encoder, head: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        maps = encoder.maps(image)
    with torch.enable_grad():
        maps = maps.detach().requires_grad_()
        (grad,) = torch.autograd.grad(head(encoder.pool(maps)).sum(), maps)
    return maps.detach(), grad


def _to_unit_range(cam: Tensor) -> Tensor:
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    return torch.where(high > low, (cam - low) / (high - low), 0.0)


def laterality_hit_rate(cam: Tensor, sides: Sequence[str]) -> dict[str, Any]:
    """How often a heat map lies more on the side where the finding is.

    A hit is a map with more mass in the stated half of the IMAGE than in the other (the middle column of an odd width
    belongs to neither); a tie, an empty map for one, counts half. Chance is 0.5, and a map that always points to one
    side is right as often as that side is. A high rate says that the evidence lies in the right half; it is no
    evidence that heat maps localise a finding within it.

    Args:
        cam: (N, H, W), >= 0.
        sides: N of "left", "right" or "none"; maps with "none" are left out.

    Returns:
        {"hit_rate": float, "n": number of maps judged, "ci": (low, high)}, the Wilson score interval at 95 %, which
        takes images as independent (several of one patient are not: it is too narrow then). nan where n is 0.

    Raises:
        UserError: a side is anything else.
    """
    for side in sides:
        check_choice("side", side, ("left", "right", "none"))
    half = cam.shape[-1] // 2
    left_minus_right = cam[..., :half].sum((1, 2)) - cam[..., -half:].sum((1, 2))
    towards = torch.tensor([{"left": 1, "right": -1, "none": 0}[side] for side in sides], device=cam.device)
    scores = (0.5 + 0.5 * torch.sign(left_minus_right * towards))[towards != 0]
    n, rate = len(scores), scores.mean().item()
    return {"hit_rate": rate, "n": n, "ci": _wilson(rate, n) if n else (rate, rate)}


def _wilson(rate: float, n: int) -> tuple[float, float]:
    """E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927."""
    z2 = _Z95**2
    center = (rate + z2 / (2 * n)) / (1 + z2 / n)
    margin = _Z95 * (rate * (1 - rate) / n + z2 / (4 * n**2)) ** 0.5 / (1 + z2 / n)
    return center - margin, center + margin
