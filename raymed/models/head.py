"""What stands on an encoder: the projection of contrastive training, and the linear classifier."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Two-layer perceptron to the unit sphere (Khosla et al., "Supervised contrastive learning", 2020).

    Args:
        in_features: width of the encoder's features.
        hidden: width of the hidden layer; None = in_features.
        out: width of the projection.
    """

    def __init__(self, in_features: int, hidden: int | None = None, out: int = 128):
        super().__init__()
        hidden = hidden or in_features
        self.layers = nn.Sequential(nn.Linear(in_features, hidden), nn.SiLU(inplace=True), nn.Linear(hidden, out))

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_features) -> (B, out) of unit norm, at least float32."""
        projected = self.layers(features)
        wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return F.normalize(wide, dim=1, eps=1e-12)


class LinearHead(nn.Module):
    """Linear classifier on features.

    Args:
        in_features: width of the features.
        out: number of logits.
        prior: share of positives; the bias starts at its log-odds, so that training does not begin by learning it
            (Lin et al., "Focal loss", 2017, section 3.3). None: the bias starts at 0.
    """

    def __init__(self, in_features: int, out: int = 1, prior: float | None = None):
        super().__init__()
        self.linear = nn.Linear(in_features, out)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.constant_(self.linear.bias, 0.0 if prior is None else -math.log((1 - prior) / prior))

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_features) -> (B,) logits, or (B, out) where out > 1."""
        logits = self.linear(features)
        return logits.squeeze(1) if self.linear.out_features == 1 else logits
