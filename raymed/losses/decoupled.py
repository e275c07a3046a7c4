"""Decoupled contrastive loss (DCL): InfoNCE without the positive in its denominator.

Source: Yeh et al., "Decoupled Contrastive Learning", ECCV 2022, eq. 6, with images and texts in place of two views.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from raymed.losses._pairs import PairLoss, Pairs, Rows
from raymed.space import Float, Space


@dataclass(frozen=True)
class DCLLoss(PairLoss):
    """With s_ij = cos(image_i, text_j) / T and N_i the negatives of i,

        l_i = -s_ii + log sum_{j in N_i} exp(s_ij)

    meaned over the pairs and both directions. A pair without negatives counts as 0. Called as `PairLoss` says.

    The paper's own loss compares an image with the other images too; here images meet texts only, as in CLIP.
    """

    name: ClassVar[str] = "dcl"
    space: ClassVar[Space] = {"temperature": Float(0.01, 0.6, log=True)}

    def values(self, pairs: Pairs, scale: Tensor | float, bias: Tensor | None) -> Tensor:
        """The mean of both directions of each of this rank's pairs, (b,)."""
        return pairs.values(decoupled, scale).mean(0)


def decoupled(rows: Rows) -> Tensor:
    """l_i of some anchors, (d, n)."""
    return rows.zero_where_alone(rows.negatives(rows.similarity).logsumexp(2) - rows.positive)
