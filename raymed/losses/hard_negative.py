"""Contrastive losses that weigh negatives by how hard they are: HN-NCE, and decoupled as well, DHN-NCE.

Sources: Radenovic et al., "Filtering, Distillation, and Hard Negatives for Vision-Language Pre-Training", CVPR 2023
(HN-NCE); Koleilat et al., "MedCLIP-SAMv2: Towards Universal Text-Driven Medical Image Segmentation", 2024 (DHN-NCE).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from raymed.config import check_range
from raymed.losses._pairs import PairLoss, Pairs, Rows
from raymed.space import Float, Space


@dataclass(frozen=True)
class _HardNegativeLoss(PairLoss):
    space: ClassVar[Space] = {
        "temperature": Float(0.01, 0.6, log=True),
        "beta1": Float(0.0, 1.0),
        "beta2": Float(0.0, 1.0),
    }

    temperature: float = 0.6
    """T > 0, where no scale is given."""
    beta1: float = 0.15
    """Hardness >= 0 of the texts that are not an image's own; 0: all count alike."""
    beta2: float = 0.15
    """Hardness >= 0 of the images that are not a text's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("beta1", self.beta1, 0)
        check_range("beta2", self.beta2, 0)

    def _beta(self, pairs: Pairs) -> Tensor:
        """(2, 1, 1), made without a copy from the host, which a GPU would wait for."""
        return torch.stack([pairs.own.new_full((1, 1), beta) for beta in (self.beta1, self.beta2)])


@dataclass(frozen=True)
class HNNCELoss(_HardNegativeLoss):
    """InfoNCE with weighted negatives; with s_ij = cos(image_i, text_j) / T and N_i the negatives of i,

        l_i = -s_ii + log(exp(s_ii) + sum_{j in N_i} w_ij exp(s_ij)),
        w_ij = |N_i| exp(beta s_ij) / sum_{k in N_i} exp(beta s_ik)

    with beta1 from images to texts and beta2 from texts to images, meaned over the pairs and both directions. beta = 0
    is `InfoNCELoss`. Called as `PairLoss` says.
    """

    name: ClassVar[str] = "hn_nce"

    def values(self, pairs: Pairs, scale: Tensor | float, bias: Tensor | None) -> Tensor:
        """The mean of both directions of each of this rank's pairs, (b,)."""
        return pairs.values(partial(_coupled, self._beta(pairs)), scale).mean(0)


@dataclass(frozen=True)
class DHNNCELoss(_HardNegativeLoss):
    """HN-NCE without the positive in the denominator; with s_ij = cos(image_i, text_j) / T and N_i the negatives of i,

        l_i = -s_ii + log sum_{j in N_i} w_ij exp(s_ij),
        w_ij = |N_i| exp(beta s_ij) / sum_{k in N_i} exp(beta s_ik)

    with beta1 from images to texts and beta2 from texts to images, meaned over the pairs; the two directions are added,
    as in the paper. beta = 0 is twice `DCLLoss`. A pair without negatives counts as 0. Called as `PairLoss` says.

    The released code computes something else, `official=True`: it averages -log of the elementwise ratio of positives
    and negatives over all B^2 entries where the paper takes the logarithm of a sum, counts exp(0) = 1 for each masked
    positive, and leaves beta out of the weights' normaliser. What remains of a direction is

        l_i = 1 / B [-s_ii + (1 + beta) sum_{j in N_i} s_ij] - log(1 + sum_{j in N_i} exp(s_ij)) + log |N_i|

    which ATTRACTS a negative as soon as its share exp(s_ij) / (1 + sum_k exp(s_ik)) exceeds (1 + beta) / B: hard
    negatives are pulled, not pushed. It is there for comparison with published figures, not for training. (The code
    also takes |N| from a configured batch size, which only shifts the value, and sees the pairs of its own rank only.)
    """

    name: ClassVar[str] = "dhn_nce"

    official: bool = False
    """The released code's value in place of the paper's."""

    def values(self, pairs: Pairs, scale: Tensor | float, bias: Tensor | None) -> Tensor:
        """The sum of both directions of each of this rank's pairs, (b,)."""
        row_loss = _official if self.official else _decoupled
        return pairs.values(partial(row_loss, self._beta(pairs)), scale).sum(0)


def _weighted(beta: Tensor, rows: Rows) -> Tensor:
    """log sum_j w_ij exp(s_ij), (d, n), without a weight or an exponential of its own."""
    hard = rows.negatives((1 + beta) * rows.similarity).logsumexp(2)
    return hard - rows.negatives(beta * rows.similarity).logsumexp(2) + rows.num_negatives.clamp(min=1).log()


def _coupled(beta: Tensor, rows: Rows) -> Tensor:
    return -rows.zero_where_alone(F.logsigmoid(rows.positive - _weighted(beta, rows)))


def _decoupled(beta: Tensor, rows: Rows) -> Tensor:
    return rows.zero_where_alone(_weighted(beta, rows) - rows.positive)


def _official(beta: Tensor, rows: Rows) -> Tensor:
    linear = (1 + beta[..., 0]) * rows.negatives(rows.similarity, otherwise=0.0).sum(2) - rows.positive
    log_one_plus = -F.logsigmoid(-rows.negatives(rows.similarity).logsumexp(2))
    values = linear / rows.similarity.shape[2] - log_one_plus + rows.num_negatives.clamp(min=1).log()
    return rows.zero_where_alone(values)
