"""What losses over pairs of an image and a text share: the global batch, which pairs are negatives, and little memory.

Rank r has b_r pairs, all ranks together have B. Each rank takes its own images and texts as anchors against the texts
and images of all ranks, so that it compares 2 x b_r x B and never B x B. Of the values l_i of its pairs it returns

    L = 1 / B  sum over all ranks sum_{i of rank r} l_i

and sends back the gradient that, averaged over the ranks, is that of one process with all B pairs, for equal and
unequal b_r (`raymed.distributed.all_gather_with_grad`). Where there are many, anchors are taken some at a time and
computed again in the backward pass: memory grows with b_r + B, not with b_r x B.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from raymed.config import UserError, check_range
from raymed.distributed import all_gather_ragged, all_reduce_sum_with_grad, rank, row_counts
from raymed.losses._common import Reduction, check_reduction

_ENTRIES = 2**22
"""Similarities held until the backward pass: 16 MB in float32, of which a loss makes a few copies."""
_ROWS = 64
"""Anchors at a time where there are more similarities, which are then computed again in the backward pass."""


@dataclass(frozen=True)
class Rows:
    """Some anchors against all candidates, in d directions: [0] images against texts, [1] texts against images."""

    similarity: Tensor
    """(d, n, B) cosines times the scale."""
    own: int
    """Column of the first anchor's own pair; the next anchor's is one further."""
    same: Tensor | None
    """(n, B) bool, pairs of the anchor's case, its own included. None: only its own."""

    @property
    def positive(self) -> Tensor:
        """(d, n) similarity of each anchor's own pair."""
        return self.similarity.diagonal(self.own, 1, 2)

    @cached_property
    def num_negatives(self) -> Tensor:
        """(n,) of each anchor, in the dtype of the similarity."""
        _, n, num_pairs = self.similarity.shape
        if self.same is None:
            return self.similarity.new_full((n,), num_pairs - 1)
        return num_pairs - self.same.sum(1, dtype=self.similarity.dtype)

    def kept(self, logits: Tensor) -> Tensor:
        """Logits (d, n, B) of the own pair and the negatives; the lowest number elsewhere."""
        if self.same is None:
            return logits
        others = self.same.diagonal_scatter(self.same.new_zeros(len(self.same)), self.own)
        return logits.masked_fill(others, _lowest(logits))

    def negatives(self, logits: Tensor, otherwise: float | None = None) -> Tensor:
        """Logits (d, n, B) of the negatives; elsewhere the lowest number, or another."""
        fill = _lowest(logits) if otherwise is None else otherwise
        if self.same is None:
            return logits.diagonal_scatter(logits.new_full(logits.shape[:2], fill), self.own, 1, 2)
        return logits.masked_fill(self.same, fill)

    def zero_where_alone(self, values: Tensor) -> Tensor:
        """Values (d, n), 0 and without gradient for anchors without negatives."""
        return values.where(self.num_negatives > 0, 0)


def _lowest(logits: Tensor) -> float:
    # Not -inf: where a whole row is masked, a logarithm of a sum of exponentials stays finite, its gradient too.
    return torch.finfo(logits.dtype).min


RowLoss = Callable[[Rows], Tensor]
"""Values (d, n) of some anchors."""


@dataclass(frozen=True)
class Pairs:
    """The pairs of this rank and those of all ranks."""

    own: Tensor
    """(2, b, D) unit vectors of this rank's images and texts."""
    every: Tensor
    """(2, B, D) of all ranks; gradients return to where they belong."""
    first: int
    """Number of this rank's first pair among all."""
    cases: Tensor | None
    """(b, K) int64 of this rank."""
    all_cases: Tensor | None
    """(B, K) int64 of all ranks."""

    @classmethod
    def gathered(cls, image: Tensor, text: Tensor, cases: Tensor | None) -> "Pairs":
        """From this rank's features (b, D), of any length, and cases (b,) or (b, K). Collective.

        Raises UserError where shapes do not fit.
        """
        if image.shape != text.shape or image.ndim != 2 or (cases is not None and not _fit(cases, image)):
            raise UserError(
                f"image and text features must be (b, D) both and cases (b,) or (b, K), got {tuple(image.shape)}, "
                f"{tuple(text.shape)} and {None if cases is None else tuple(cases.shape)}"
            )
        own = F.normalize(torch.stack([image, text]), dim=2)
        counts = row_counts(image)
        every = all_gather_ragged(own.transpose(0, 1), counts).transpose(0, 1)
        cases = cases[:, None] if cases is not None and cases.ndim == 1 else cases
        all_cases = None if cases is None else all_gather_ragged(cases, counts)
        return cls(own, every, sum(counts[: rank()]), cases, all_cases)

    def __len__(self) -> int:
        return self.every.shape[1]

    def values(
        self, row_loss: RowLoss, scale: Tensor | float, shift: Tensor | None = None, directions: int = 2
    ) -> Tensor:
        """(d, b) values of this rank's pairs; d = 1: images against texts only.

        scale: factor of the cosines. shift: added to the similarities, (); None: 0.
        """

        def values(similarity: Tensor, start: int = 0) -> Tensor:
            return row_loss(Rows(similarity, self.first + start, self._same(start, similarity.shape[1])))

        if directions * self.own.shape[1] * len(self) <= _ENTRIES:
            similarity = self._similarity(scale, directions)
            return values(similarity if shift is None else similarity + shift)
        anchors, candidates = self.own[:directions] * scale, self.every.flip(0)[:directions]
        return cast(Tensor, _InBlocks.apply(anchors, candidates, shift, values))

    def _similarity(self, scale: Tensor | float, directions: int) -> Tensor:
        """(d, b, B) of all this rank's pairs."""
        (image, text), (images, texts) = self.own, self.every
        forth = image * scale @ texts.T
        if directions == 1:
            return forth[None]
        back = forth.T if len(image) == len(self) else text * scale @ images.T  # the same numbers, half the work
        return torch.stack([forth, back])

    def _same(self, start: int, num: int) -> Tensor | None:
        """(n, B) bool: which pairs share an id of their case."""
        if self.cases is None or self.all_cases is None:
            return None
        ids, others = self.cases[start : start + num].unbind(1), self.all_cases.unbind(1)
        same = ids[0][:, None] == others[0]
        for number in range(1, len(ids) * len(others)):
            same |= ids[number // len(others)][:, None] == others[number % len(others)]
        return same


class _InBlocks(torch.autograd.Function):
    """Values (d, b) of anchors (d, b, D) against candidates (d, B, D), some anchors at a time.

    The backward pass computes the similarities again, so that those of one block are all that is ever held. Not by
    `torch.utils.checkpoint`, which keeps something small of every block: between two blocks' large tensors that
    fragments the heap of a CPU until it is as large as if all were kept.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, candidates: Tensor, shift: Tensor | None, values: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(anchors, candidates, shift)
        ctx.values = values
        result = anchors.new_empty(anchors.shape[:2])
        for start, rows in _blocks(anchors):
            result[:, rows] = values(_block(anchors[:, rows], candidates, shift), start)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        anchors, candidates, shift = ctx.saved_tensors
        to_anchors, to_candidates = torch.empty_like(anchors), torch.zeros_like(candidates)
        to_shift = None if shift is None else torch.zeros_like(shift)
        with torch.autocast(grad.device.type, enabled=False):
            for start, rows in _blocks(anchors):
                similarity = _block(anchors[:, rows], candidates, shift).requires_grad_()
                with torch.enable_grad():
                    values = ctx.values(similarity, start)
                (slope,) = torch.autograd.grad(values, similarity, grad[:, rows])
                to_anchors[:, rows] = slope @ candidates
                to_candidates.baddbmm_(slope.mT, anchors[:, rows])
                if to_shift is not None:
                    to_shift += slope.sum()
        return to_anchors, to_candidates, to_shift, None


def _block(anchors: Tensor, candidates: Tensor, shift: Tensor | None) -> Tensor:
    similarity = anchors @ candidates.mT
    return similarity if shift is None else similarity + shift


def _blocks(anchors: Tensor) -> list[tuple[int, slice]]:
    return [(start, slice(start, start + _ROWS)) for start in range(0, anchors.shape[1], _ROWS)]


def _fit(cases: Tensor, features: Tensor) -> bool:
    return cases.ndim in (1, 2) and len(cases) == len(features) and cases.shape[1:] != (0,)


@dataclass(frozen=True)
class PairLoss:
    """A loss of B pairs of an image and a text, over the global batch.

    Called with image_features and text_features (b, D) of this rank's pairs, of any length; cases (b,) or (b, K) int64:
    pairs that share any id are no negatives of each other (one id repeated fills up where K varies); scale: 1 /
    temperature as a tensor, where it is learned; bias: as a tensor, where the loss has one and it is learned. Computes
    in float32 or better with autocast off. In a process group every rank returns the loss of the global batch, and
    parameter gradients averaged over the ranks are those of a single process. b may differ between ranks.

    Raises UserError for a hyper-parameter out of range, and for features of other shapes.
    """

    temperature: float = 0.07
    """T in [0.0001, 10000], where no scale is given."""
    reduction: Reduction = "mean"
    """mean or sum over the global batch; none = (b,) values of this rank's pairs."""

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 1e-4, 1e4)  # beyond, cosines are all or nothing
        check_reduction(self.reduction)

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        cases: Tensor | None = None,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        with torch.autocast(image_features.device.type, enabled=False):
            pairs = Pairs.gathered(image_features.to(dtype), text_features.to(dtype), cases)
            values = self.values(pairs, 1 / self.temperature if scale is None else scale.to(dtype), bias)
            if self.reduction == "none":
                return values
            total = all_reduce_sum_with_grad(values.sum())
            return total / len(pairs) if self.reduction == "mean" else total

    def values(self, pairs: Pairs, scale: Tensor | float, bias: Tensor | None) -> Tensor:
        """One value for each of this rank's pairs, (b,)."""
        raise NotImplementedError
