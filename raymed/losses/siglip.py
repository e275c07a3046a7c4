"""Sigmoid loss over pairs of an image and a text (SigLIP): every image and text of the batch, a pair or not?

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, eq. 2.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from raymed.losses._pairs import PairLoss, Pairs, Rows
from raymed.space import Float, Space


@dataclass(frozen=True)
class SigLIPLoss(PairLoss):
    """With s_ij = cos(image_i, text_j) / T + b, and N_i the negatives of i,

        l_i = -log sigmoid(s_ii) - sum_{j in N_i} log sigmoid(-s_ij)

    meaned over the pairs. T and b are learned in the paper, from 0.1 and -10 on. Called as `PairLoss` says.
    """

    name: ClassVar[str] = "siglip"
    space: ClassVar[Space] = {"temperature": Float(0.01, 0.6, log=True)}

    temperature: float = 0.1
    """T > 0, where no scale is given."""
    bias: float = -10.0
    """b, where it is not learned."""

    def values(self, pairs: Pairs, scale: Tensor | float, bias: Tensor | None) -> Tensor:
        """Of each of this rank's images against all texts, (b,): the other direction would be the same numbers."""
        shift = pairs.own.new_full((), self.bias) if bias is None else bias.to(pairs.own.dtype)
        return pairs.values(_sigmoids, scale, shift, directions=1)[0]


def _sigmoids(rows: Rows) -> Tensor:
    return -F.logsigmoid(rows.positive) - F.logsigmoid(-rows.negatives(rows.similarity)).sum(2)
