"""Asymmetric loss (ASL): focal loss with separate exponents for the two classes and a margin for easy negatives.

Source: Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021, eq. 2 to 7.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from raymed.config import check_range
from raymed.losses._common import Reduction, check_reduction, expand_targets, full_precision, power, reduce
from raymed.space import Choice, Float, Space


@dataclass(frozen=True)
class AsymmetricLoss:
    """Asymmetric loss on logits x with p = sigmoid(x), shifted probability p_m = max(p - clip, 0) and targets y:

        L = -[y L+ + (1 - y) L-],   L+ = (1 - p)^gamma_pos log p,   L- = p_m^gamma_neg log(1 - p_m)

    For binary and multi-label heads. A negative with p <= clip has loss and gradient 0.

    Called with logits (B,), (B, L) or with a trailing configuration axis (..., K), and targets in [0, 1] of the same
    shape (1 where they broadcast). Computes in float32 or better. Hyper-parameters may be tensors of shape (K,): each
    column of the logits then has its own.

    (gamma_neg, gamma_pos, clip) = (0, 0, 0) is binary cross-entropy, (g, g, 0) is focal loss. The defaults are the
    paper's, tuned for about 1 % positives; where a quarter is positive, start from gamma_neg 1 to 3.

    The published code differs from the paper: it sums over all elements (reduction="sum"), clamps probabilities inside
    the logarithm (clamp=1e-8), takes gamma_pos=1 by default, and its plain class, unlike its optimised one, treats the
    focal weights as constants (detach_weight=True).

    Raises UserError when a hyper-parameter is out of range, ValueError when the shapes do not fit.
    """

    name: ClassVar[str] = "asl"
    space: ClassVar[Space] = {
        "gamma_neg": Float(0.0, 5.0),
        "gamma_pos": Choice((0.0, 0.5, 1.0, 2.0)),
        "clip": Float(0.0, 0.2),
    }

    gamma_neg: float = 4.0
    """Focusing exponent >= 0 of the negatives."""
    gamma_pos: float = 0.0
    """Focusing exponent >= 0 of the positives."""
    clip: float = 0.05
    """Probability margin in [0, 1) below which a negative is ignored."""
    detach_weight: bool = False
    """Treat the focal weights as constants in the backward pass; True = the published code's plain class."""
    clamp: float | None = None
    """Smallest probability inside a logarithm, in (0, 1); None = unbounded, the published code has 1e-8."""
    reduction: Reduction = "mean"
    """mean or sum over all elements; none = one value an element, in the shape of the logits."""

    def __post_init__(self) -> None:
        check_range("gamma_neg", self.gamma_neg, 0)
        check_range("gamma_pos", self.gamma_pos, 0)
        check_range("clip", self.clip, 0, 1, high_open=True)
        if self.clamp is not None:
            check_range("clamp", self.clamp, 0, 1, low_open=True, high_open=True)
        check_reduction(self.reduction)

    @full_precision
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = expand_targets(targets, logits)
        clip = torch.as_tensor(self.clip, dtype=logits.dtype, device=logits.device)
        log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
        # log(1 - p_m) = min(log(1 - p + clip), 0), without the digits that 1 - p loses when p is near 1.
        log_not_pm = -F.relu(-torch.logaddexp(log_not_p, clip.log()))
        weight_pos = torch.exp(self.gamma_pos * log_not_p)
        if self.clamp is not None:
            lowest = torch.as_tensor(self.clamp, dtype=logits.dtype, device=logits.device).log()
            log_p, log_not_pm = (torch.maximum(log, lowest) for log in (log_p, log_not_pm))

        weight_neg = power(torch.sigmoid(logits) - clip, self.gamma_neg)
        if self.detach_weight:
            weight_pos, weight_neg = weight_pos.detach(), weight_neg.detach()
        return reduce(-(targets * weight_pos * log_p + (1 - targets) * weight_neg * log_not_pm), self.reduction)
