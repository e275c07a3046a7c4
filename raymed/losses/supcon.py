"""Supervised contrastive loss (SupCon) over the global batch; without labels it is the loss of SimCLR.

Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, eq. 2 (L_out).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from raymed.config import check_choice, check_range
from raymed.distributed import all_gather, all_gather_with_grad
from raymed.losses._common import Reduction, check_reduction, full_precision, reduce
from raymed.space import Float, Space


@dataclass(frozen=True)
class SupConLoss:
    """Supervised contrastive loss of unit vectors z, for anchor i among all B V views:

        L_i = -(T / T_base) 1/|P(i)| sum_{p in P(i)} [z_i.z_p / T - log sum_{a != i} exp(z_i.z_a / T)]

    where P(i) are the other views with the label of i. An anchor without positives counts as 0, and the mean still
    divides by all anchors, as in the published code.

    Called with features (B, V, D): V views of B samples, of unit norm (the caller normalises), and labels (B,), or None
    when each sample is a class of its own. Computes in float32 or better. In a process group the features of all ranks
    are compared (B the same on every rank), every rank returns the loss of the global batch, and parameter gradients
    averaged over the ranks are those of a single process (`all_gather_with_grad`).

    The published code has base_temperature = 0.07 whatever the temperature, so that a sweep over the temperature sweeps
    the learning rate too; here the factor is 1 unless it is set.

    Raises UserError when a hyper-parameter is out of range.
    """

    space: ClassVar[Space] = {"temperature": Float(0.03, 0.5, log=True)}

    temperature: float = 0.07
    """T > 0."""
    base_temperature: float | None = None
    """T_base > 0; None = tied to the temperature, the published code has 0.07."""
    contrast: Literal["all", "one"] = "all"
    """Anchors: all views, or only the first of each sample."""
    reduction: Reduction = "mean"
    """mean or sum over the anchors; none = one value an anchor of the global batch, (B, V) or (B, 1)."""

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0, low_open=True)
        if self.base_temperature is not None:
            check_range("base_temperature", self.base_temperature, 0, low_open=True)
        check_choice("contrast", self.contrast, ("all", "one"))
        check_reduction(self.reduction)

    @full_precision
    def __call__(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        features = all_gather_with_grad(features)
        num_samples, num_views, _ = features.shape
        sample = torch.arange(num_samples, device=features.device)
        labels = sample if labels is None else all_gather(labels)
        num_anchors = num_views if self.contrast == "all" else 1

        anchors, views = features[:, :num_anchors].flatten(0, 1), features.flatten(0, 1)
        view = torch.arange(len(views), device=features.device).view(num_samples, num_views)
        itself = view[:, :num_anchors].reshape(-1, 1) == view.flatten()
        positive = labels.repeat_interleave(num_anchors)[:, None] == labels.repeat_interleave(num_views)
        positive = positive & ~itself

        similarity = anchors @ views.T / self.temperature
        log_p = similarity.masked_fill(itself, -torch.inf).log_softmax(dim=1)
        loss = -torch.where(positive, log_p, 0).sum(1) / positive.sum(1).clamp(min=1)
        if self.base_temperature is not None:
            loss = loss * (self.temperature / self.base_temperature)
        return reduce(loss.view(num_samples, num_anchors), self.reduction)
