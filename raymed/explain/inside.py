"""Look inside: does a network find the finding where it is, and with how many of its units?

Losses for imbalanced data may differ in this at equal AUROC. Two numbers for images of which the region of interest is
known:

- box alignment: how much of the Grad-CAM lies in the region (energy-based pointing game, H. Wang et al., "Score-CAM",
  CVPR Workshops 2020), and whether its peak does (pointing game, J. Zhang et al., "Top-down Neural Attention by
  Excitation Backprop", ECCV 2016). A map that knows nothing scores the region's share of the image, the chance level;
- concept count: in how many places of the region one of the units responds strongly (A. Khakzar et al., "Analyzing the
  Effects of Handling Data Imbalance on Learned Features from Medical Images by Looking Into the Models", ICML workshop
  on interpretable machine learning in healthcare 2022; after D. Bau et al., "Network Dissection", CVPR 2017).

The concept count differs from its published code in three things. A unit's threshold is the quantile over all images
given; there it is over each batch, so that an image's count depends on its company. A unit responds above its
threshold; there also at it, so that a dead unit counts one place in every image. Holes in a place are not counted;
there they are.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raymed.config import UserError, check_range
from raymed.explain.gradcam import Encoder, grad_cam

_BATCH = 64
_TOUCHING = np.array([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])
"""Neighbours of a pixel of (N, H, W): the eight around it, none in another image."""


def look_inside(
    encoder: Encoder,
    head: Callable[[Tensor], Tensor],
    images: Tensor | Iterable[Tensor],
    regions: Sequence[np.ndarray],
    layer: str | None = None,
    quantile: float = 0.99,
) -> dict[str, np.ndarray]:
    """Box alignment and concept count of N images, each with a region.

    The encoder sees every batch once. Of its activations only the small maps are kept, N K h w numbers, beside the
    Grad-CAMs; they are enlarged to (H, W) one channel at a time.

    Args:
        encoder, head: as `grad_cam` takes them.
        images: (N, C, H, W), as the encoder takes them, or batches of them.
        regions: N of (H, W) bool, each with at least one pixel.
        layer: of the encoder, whose K activation maps (h, w) are counted, like "net.layer3.5"; None = those of
            `encoder.maps`.
        quantile: in [0, 1), of a unit's activations over all images, above which it responds.

    Returns:
        (N,) arrays: energy_inside (fraction of the Grad-CAM in the region) and hit (fraction of its highest pixels in
        the region, 0 or 1 unless several are equally high), float64 in [0, 1], of a Grad-CAM of zeros the chance level;
        area (fraction of the image in the region, the chance level of both); concepts (int64), see `concept_count`.

    Raises:
        UserError: the encoder has no feature maps, no such layer, or the layer's output is not (B, K, h, w).
        ValueError: regions and images do not fit.
    """
    check_range("quantile", quantile, 0, 1, high_open=True)
    batches = images.split(_BATCH) if isinstance(images, Tensor) else images
    watched = _Watched(encoder, layer)
    cams, maps = [], []
    with watched.hook:
        for batch in batches:
            cams.append(grad_cam(watched, head, batch).cpu().numpy())
            maps.append(watched.take())
    cam, inside = np.concatenate(cams), np.stack(regions).astype(bool)
    if cam.shape != inside.shape:
        raise ValueError(f"regions are {inside.shape}, images {cam.shape}")
    return box_alignment(cam, inside) | {"concepts": concept_count(torch.cat(maps), inside, quantile)}


def box_alignment(cam: np.ndarray, inside: np.ndarray) -> dict[str, np.ndarray]:
    """energy_inside, hit and area, see `look_inside`.

    Args:
        cam: (N, H, W) >= 0; one of zeros is taken for an even one.
        inside: (N, H, W) bool.
    """
    cam = cam.reshape(len(cam), -1).astype(np.float64)
    inside = inside.reshape(len(cam), -1)
    cam = np.where(cam.max(axis=1, keepdims=True) > 0, cam, 1)
    highest = cam == cam.max(axis=1, keepdims=True)
    return {
        "energy_inside": (cam * inside).sum(axis=1) / cam.sum(axis=1),
        "hit": (highest & inside).sum(axis=1) / highest.sum(axis=1),
        "area": inside.mean(axis=1),
    }


def concept_count(maps: Tensor, inside: np.ndarray, quantile: float = 0.99) -> np.ndarray:
    """In how many places of each image's region the units respond.

    Each unit's maps are brought to (H, W) bilinearly. Where they are above their quantile over all N images, the unit
    responds; within the region, what touches (corners included) is one place. Places are summed over the units.

    Args:
        maps: (N, K, h, w) float32 on the CPU.
        inside: (N, H, W) bool.

    Returns:
        (N,) int64. Does not depend on the order of the images.
    """
    from scipy.ndimage import find_objects, label

    counts = np.zeros(len(inside), np.int64)
    rank = int(quantile * (inside.size - 1))
    for unit in maps.split(1, dim=1):
        values = F.interpolate(unit, size=inside.shape[1:], mode="bilinear", align_corners=False)[:, 0].numpy()
        # Above this element is also what is above any interpolation between it and the next.
        threshold = np.partition(values, rank, axis=None)[rank]
        places, _ = label((values > threshold) & inside, _TOUCHING)  # type: ignore[misc]
        for image, *_ in find_objects(places):
            counts[image.start] += 1
    return counts


class _Watched(nn.Module):
    """An encoder that keeps what a layer, or `maps`, made of its last batch, while its `hook` is entered."""

    def __init__(self, encoder: Encoder, layer: str | None):
        super().__init__()
        self.encoder, self.layer = encoder, layer
        self.hook = nullcontext() if layer is None else _find(encoder, layer).register_forward_hook(self._keep)
        self.seen: Tensor | None = None

    def maps(self, x: Tensor) -> Tensor:
        """Those of the encoder."""
        maps = self.encoder.maps(x)
        if maps.ndim != 4:
            raise UserError(f"the encoder has no feature maps to look into: its last output is {tuple(maps.shape)}")
        if self.layer is None:
            self._keep(None, None, maps)
        return maps

    def pool(self, maps: Tensor) -> Tensor:
        """That of the encoder."""
        return self.encoder.pool(maps)

    def take(self) -> Tensor:
        """(B, K, h, w) float32 on the CPU."""
        if self.seen is None:
            raise UserError(f"layer {self.layer!r} is never called itself: name one inside it")
        return self.seen

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise UserError(f"layer {self.layer!r} has no activation maps (B, K, h, w) to count in")
        # A copy: the next layer may work in place.
        self.seen = output.detach().to("cpu", torch.float32, copy=True)


def _find(encoder: Encoder, layer: str) -> nn.Module:
    modules = dict(encoder.named_modules()) if isinstance(encoder, nn.Module) else {}
    if layer not in modules:
        near = difflib.get_close_matches(layer, modules, n=1)
        raise UserError(f"the encoder has no layer {layer!r}" + "".join(f"; did you mean {n!r}?" for n in near))
    return modules[layer]
