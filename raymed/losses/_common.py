"""What every loss does the same way: precision, targets, powers of probabilities, reduction."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from raymed.config import check_choice

Reduction = Literal["mean", "sum", "none"]


def check_reduction(reduction: str) -> None:
    """Raise UserError unless reduction is mean, sum or none."""
    check_choice("reduction", reduction, get_args(Reduction))


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """mean: over all elements. sum: over all elements. none: the values as they are."""
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


def full_precision(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorates `__call__(self, inputs, targets)`: half inputs become float32, float64 stays; autocast is off."""

    @functools.wraps(call)
    def wrapped(self, inputs: Tensor, *targets: Tensor | None) -> Tensor:
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        with torch.autocast(inputs.device.type, enabled=False):
            return call(self, inputs, *targets)

    return wrapped


def expand_targets(targets: Tensor, logits: Tensor) -> Tensor:
    """Targets in the dtype and shape of the logits; only axes after the first may be broadcast, (B, 1) to (B, K).

    Raises ValueError for another number of axes or samples: (B,) against (B, 1) would silently become (B, B).
    """
    if targets.ndim != logits.ndim or len(targets) != len(logits):
        raise ValueError(f"targets must have the shape of the logits {tuple(logits.shape)}, got {tuple(targets.shape)}")
    return targets.to(logits.dtype).expand_as(logits)


def power(base: Tensor, gamma: float | Tensor) -> Tensor:
    """base ** gamma for base in [0, 1] (below 0 counts as 0) and gamma >= 0, with finite gradients.

    The slope of base ** gamma at 0 is infinite for gamma < 1, and infinity times the zero that follows is NaN; so the
    base stops at the smallest normal number of its dtype, and below that has no gradient.
    """
    tiny = torch.finfo(base.dtype).tiny
    return F.threshold(base, tiny, tiny) ** gamma
