"""PolyLoss: focal loss with another weight on the first term of its polynomial expansion.

Source: Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions", ICLR 2022, the
Poly-1 form of focal loss.
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
class PolyLoss:
    """Poly-1 focal loss on logits x, with p_t = sigmoid(x) for a positive and 1 - sigmoid(x) for a negative:

        L = alpha_t [-(1 - p_t)^gamma log p_t + eps1 (1 - p_t)^(gamma + 1)]

    In powers of 1 - p_t, focal loss is (1 - p_t)^gamma sum_j (1 - p_t)^j / j; eps1 is added to the coefficient 1 of
    j = 1. Targets between 0 and 1 mix the losses of a positive and a negative.

    Called with logits (B,), (B, L) or with a trailing configuration axis (..., K), and targets in [0, 1] of the same
    shape (1 where they broadcast). Computes in float32 or better. Hyper-parameters may be tensors of shape (K,).

    eps1 = 0 is focal loss, gamma = 0 is Poly-1 cross-entropy -log p_t + eps1 (1 - p_t). The paper takes eps1 = 2 and
    more for ImageNet and -1, the first term away, for the imbalanced detection of objects: both signs are worth a try.
    The paper has no alpha; it is that of focal loss.

    Raises UserError when a hyper-parameter is out of range, ValueError when the shapes do not fit.
    """

    name: ClassVar[str] = "poly"
    space: ClassVar[Space] = {
        "eps1": Float(-1.0, 4.0),
        "alpha": Choice((None, 0.25, 0.5, 0.75)),
        "gamma": Float(0.0, 5.0),
    }

    eps1: float = 1.0
    """Added to the first coefficient; >= -1, so that no coefficient is negative."""
    alpha: float | None = None
    """Weight of the positive class in [0, 1], the negative class has 1 - alpha; None = both 1."""
    gamma: float = 2.0
    """Focusing exponent >= 0; 0 = Poly-1 cross-entropy."""
    reduction: Reduction = "mean"
    """mean or sum over all elements; none = one value an element, in the shape of the logits."""

    def __post_init__(self) -> None:
        check_range("eps1", self.eps1, -1)
        if self.alpha is not None:
            check_range("alpha", self.alpha, 0, 1)
        check_range("gamma", self.gamma, 0)
        check_reduction(self.reduction)

    @full_precision
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = expand_targets(targets, logits)
        weight_neg, weight_pos = (1.0, 1.0) if self.alpha is None else (1 - self.alpha, self.alpha)
        positive = weight_pos * self._of_true_class(logits)
        negative = weight_neg * self._of_true_class(-logits)
        return reduce(targets * positive + (1 - targets) * negative, self.reduction)

    def _of_true_class(self, logits: Tensor) -> Tensor:
        """The loss where p_t = sigmoid(logits)."""
        missed = torch.sigmoid(-logits)  # 1 - p_t, with all its digits where p_t is near 1
        return power(missed, self.gamma) * (self.eps1 * missed - F.logsigmoid(logits))
