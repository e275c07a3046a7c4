"""InfoNCE over pairs of an image and a text: the loss of CLIP.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from raymed.losses._pairs import PairLoss, Pairs, Rows
from raymed.space import Float, Space


@dataclass(frozen=True)
class InfoNCELoss(PairLoss):
    """Each image names its text among all, and each text its image; with s_ij = cos(image_i, text_j) / T,

        l_i = -s_ii + log sum_{j = i or j negative} exp(s_ij)

    meaned over the pairs and both directions. Called as `PairLoss` says.
    """

    name: ClassVar[str] = "info_nce"
    space: ClassVar[Space] = {"temperature": Float(0.01, 0.6, log=True)}

    def values(self, pairs: Pairs, scale: Tensor | float, bias: Tensor | None) -> Tensor:
        """The mean of both directions of each of this rank's pairs, (b,)."""
        return pairs.values(_softmax, scale).mean(0)


def _softmax(rows: Rows) -> Tensor:
    return -rows.kept(rows.similarity).log_softmax(2).diagonal(rows.own, 1, 2)
