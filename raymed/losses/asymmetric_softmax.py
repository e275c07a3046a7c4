"""Asymmetric loss for one label out of several classes (softmax).

Source: Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021, in the single-label form of the
published code; the paper itself has only the sigmoid form (`raymed.losses.asymmetric`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raymed.config import check_range
from raymed.losses._common import Reduction, check_reduction, full_precision, power, reduce
from raymed.space import Choice, Float, Space


@dataclass(frozen=True)
class AsymmetricSoftmaxLoss:
    """Single-label asymmetric loss with p = softmax(x) over C classes, true class t and smoothed targets q:

        L = -q_t (1 - p_t)^gamma_pos log p_t - sum_{c != t} q_c p_c^gamma_neg log p_c
        q_c = eps / C for c != t,   q_t = 1 - eps + eps / C

    Called with logits (B, C) or with a trailing configuration axis (B, C, K), and targets (B,) int64. Computes in
    float32 or better. Hyper-parameters may be tensors of shape (K,).

    gamma_neg acts on the smoothing mass alone: with eps = 0 it has no effect, and with gamma_pos = 0 and eps = 0 the
    loss IS cross-entropy. For an imbalanced binary problem take `AsymmetricLoss`, or gamma_pos > 0.

    Raises UserError when a hyper-parameter is out of range.
    """

    space: ClassVar[Space] = {
        "gamma_pos": Choice((0.0, 0.5, 1.0, 2.0)),
        "gamma_neg": Float(0.0, 5.0),
        "eps": Choice((0.0, 0.05, 0.1, 0.2)),
    }

    gamma_pos: float = 0.0
    """Focusing exponent >= 0 of the true class."""
    gamma_neg: float = 4.0
    """Focusing exponent >= 0 of the other classes."""
    eps: float = 0.1
    """Label smoothing in [0, 1]."""
    reduction: Reduction = "mean"
    """mean or sum over the samples; none = one value a sample, (B,) or (B, K)."""

    def __post_init__(self) -> None:
        check_range("gamma_pos", self.gamma_pos, 0)
        check_range("gamma_neg", self.gamma_neg, 0)
        check_range("eps", self.eps, 0, 1)
        check_reduction(self.reduction)

    @full_precision
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        num_classes = logits.shape[1]
        log_p = logits.log_softmax(dim=1)
        index = targets.view(-1, *[1] * (logits.ndim - 1)).expand_as(logits[:, :1])
        is_true = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, True)
        p = log_p.exp()
        weight = torch.where(is_true, power(1 - p, self.gamma_pos), power(p, self.gamma_neg))
        smoothed = is_true.to(logits.dtype) * (1 - self.eps) + self.eps / num_classes
        return reduce(-(smoothed * weight * log_p).sum(dim=1), self.reduction)
