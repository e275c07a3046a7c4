"""Focal losses: cross-entropy that fades for examples the model already gets right.

Sources: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 4 and 5 (`FocalLoss`); Cui et al.,
"Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, eq. 12 (`ClassBalancedFocalLoss`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from raymed.config import UserError, check_range
from raymed.losses._common import Reduction, check_reduction, expand_targets, full_precision, power, reduce
from raymed.space import Choice, Float, Space


@dataclass(frozen=True)
class FocalLoss:
    """Focal loss on logits x with p = sigmoid(x) and targets y:

        L = -[alpha y (1 - p)^gamma log p + (1 - alpha) (1 - y) p^gamma log(1 - p)]

    Called with logits (B,), (B, L) or with a trailing configuration axis (..., K), and targets in [0, 1] of the same
    shape (1 where they broadcast). Computes in float32 or better. Hyper-parameters may be tensors of shape (K,).

    Equals fvcore's and torchvision's `sigmoid_focal_loss` on targets of {0, 1}; their alpha = -1 is None here, and
    torchvision's default is 0.25. Mind that alpha = 0.25 weighs positives DOWN (it was tuned for RetinaNet's anchors):
    for a rare positive class take 0.5 to 0.75.

    Raises UserError when a hyper-parameter is out of range, ValueError when the shapes do not fit.
    """

    name: ClassVar[str] = "focal"
    space: ClassVar[Space] = {"alpha": Choice((None, 0.25, 0.5, 0.75)), "gamma": Float(0.5, 5.0)}

    alpha: float | None = None
    """Weight of the positive class in [0, 1], the negative class has 1 - alpha; None = both 1."""
    gamma: float = 2.0
    """Focusing exponent >= 0; 0 = cross-entropy."""
    reduction: Reduction = "mean"
    """mean or sum over all elements; none = one value an element, in the shape of the logits."""

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_range("alpha", self.alpha, 0, 1)
        check_range("gamma", self.gamma, 0)
        check_reduction(self.reduction)

    @full_precision
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = (1.0, 1.0) if self.alpha is None else (1 - self.alpha, self.alpha)
        return reduce(_focal(logits, targets, self.gamma, *weights), self.reduction)


@dataclass(frozen=True)
class ClassBalancedFocalLoss:
    """Focal loss with each class weighted by the inverse of its effective number of samples:

        L = -[w_1 y (1 - p)^gamma log p + w_0 (1 - y) p^gamma log(1 - p)]
        w_c proportional to (1 - beta) / (1 - beta^n_c), w_0 + w_1 = 2

    with p = sigmoid(x), targets y and n_c training samples of class c. beta = 0 weighs both classes alike, beta -> 1 by
    inverse frequency. gamma = 0 is the class-balanced cross-entropy.

    Called with logits (B,), (B, L) or with a trailing configuration axis (..., K), and targets in [0, 1] of the same
    shape (1 where they broadcast). Computes in float32 or better. beta and gamma may be tensors of shape (K,).

    The published code divides the focal sum by the number of positive labels; here "mean" is over all elements.

    Raises UserError when a hyper-parameter is out of range, ValueError when the shapes do not fit.
    """

    space: ClassVar[Space] = {"beta": Choice((0.9, 0.99, 0.999, 0.9999)), "gamma": Float(0.5, 5.0)}

    samples_per_class: tuple[int, int]
    """Training samples of the negative and of the positive class."""
    beta: float = 0.999
    """Overlap of the samples' information, in [0, 1)."""
    gamma: float = 2.0
    """Focusing exponent >= 0; 0 = class-balanced cross-entropy."""
    reduction: Reduction = "mean"
    """mean or sum over all elements; none = one value an element, in the shape of the logits."""

    def __post_init__(self) -> None:
        if len(self.samples_per_class) != 2:
            raise UserError(f"samples_per_class must be (negatives, positives), got {self.samples_per_class}")
        for count in self.samples_per_class:
            check_range("samples_per_class", count, 1)
        check_range("beta", self.beta, 0, 1, high_open=True)
        check_range("gamma", self.gamma, 0)
        check_reduction(self.reduction)

    @full_precision
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        # In float64: 1 - beta^n loses most of its digits in float32 when beta is near 1.
        beta = torch.as_tensor(self.beta, dtype=torch.float64)
        weights = torch.stack([(1 - beta) / (1 - beta**count) for count in self.samples_per_class])
        weight_neg, weight_pos = (2 * weights / weights.sum(0)).to(logits)
        return reduce(_focal(logits, targets, self.gamma, weight_neg, weight_pos), self.reduction)


def _focal(
    logits: Tensor, targets: Tensor, gamma: float | Tensor, weight_neg: float | Tensor, weight_pos: float | Tensor
) -> Tensor:
    """The weighted focal loss of every element."""
    targets = expand_targets(targets, logits)
    positive = weight_pos * power(torch.sigmoid(-logits), gamma) * F.logsigmoid(logits)
    negative = weight_neg * power(torch.sigmoid(logits), gamma) * F.logsigmoid(-logits)
    return -(targets * positive + (1 - targets) * negative)
