"""Binary cross-entropy: the baseline of every other loss for a binary or multi-label head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from raymed.config import check_range
from raymed.losses._common import Reduction, check_reduction, expand_targets, full_precision, reduce
from raymed.space import Choice, Space


@dataclass(frozen=True)
class CrossEntropyLoss:
    """Binary cross-entropy on logits x with p = sigmoid(x) and targets y:

        L = -[w y log p + (1 - y) log(1 - p)]

    Called with logits (B,), (B, L) or with a trailing configuration axis (..., K), and targets in [0, 1] of the same
    shape (1 where they broadcast). Computes in float32 or better. Hyper-parameters may be tensors of shape (K,).

    Raises UserError when a hyper-parameter is out of range, ValueError when the shapes do not fit.
    """

    name: ClassVar[str] = "ce"
    space: ClassVar[Space] = {"pos_weight": Choice((None, 2.0, 3.0, 5.0))}

    pos_weight: float | None = None
    """Weight w > 0 of the positive class; None = 1. Balanced at (number of negatives) / (number of positives)."""
    reduction: Reduction = "mean"
    """mean or sum over all elements; none = one value an element, in the shape of the logits."""

    def __post_init__(self) -> None:
        if self.pos_weight is not None:
            check_range("pos_weight", self.pos_weight, 0, low_open=True)
        check_reduction(self.reduction)

    @full_precision
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = expand_targets(targets, logits)
        weight = None
        if self.pos_weight is not None:
            weight = torch.as_tensor(self.pos_weight, dtype=logits.dtype, device=logits.device)
        loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
        return reduce(loss, self.reduction)
