"""The captions of a data set as tokens: which one of an image's captions a step takes, and how a batch of them is cut.

    table = TextTable.of(data, tokenizer)
    texts = table.sampled(batch.index, step, seed)    one caption an image, drawn for this step
    by_length = texts.by_length()                     texts of like length together, each part as long as its longest
    features = network(image, *by_length.parts)

Attention costs what padding costs: a batch whose longest caption has 250 tokens would take as long for its captions of
20. Cut into parts of like length it has the same texts, hence the same gradient, for less.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raymed.data.captions import CaptionSet
from raymed.distributed import world_size
from raymed.random import uniform

GROUPS = 4  # at most, of a batch
_FEWEST = 8  # texts in the mean, of a group among workers
_WORTH = 0.03  # of the tokens of one group, which a further one must save: it has costs of its own
_STEP = 8  # tokens: lengths are rounded up to a multiple, so that there are few shapes


@dataclass(frozen=True)
class Texts:
    """Some captions, one an image: tokens (B, L) int64, padded; lengths (B,) int64; said (B, 3) int64, see
    `said_alike`."""

    tokens: Tensor
    lengths: Tensor
    said: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def by_length(self, num: int | None = None) -> "ByLength":
        """The same in groups of like length: `num` of them, or where that is None as many as are worth it.

        Workers of a group must all have as many: at ZeRO 3 every call of a tower gathers its weights from all of them.
        """
        lengths = (-(-self.lengths // _STEP) * _STEP).clamp(max=self.tokens.shape[1])
        order = torch.argsort(lengths, stable=True)
        there, counts = lengths.unique(return_counts=True)
        sizes = fewest_tokens(there.numpy(), counts.numpy())
        groups = order.split(sizes if num is None else _exactly(num, sizes))
        parts = tuple(self.tokens[group, : int(lengths[group[-1]])] for group in groups)
        return ByLength(parts, torch.argsort(order))


@dataclass(frozen=True)
class ByLength:
    """Captions in groups of like length: parts, each (b, L) int64; back (B,): where each caption of the batch stands
    among all of the parts."""

    parts: tuple[Tensor, ...]
    back: Tensor

    def to(self, device: torch.device) -> "ByLength":
        """The same on a device."""
        return ByLength(tuple(part.to(device) for part in self.parts), self.back.to(device))


@dataclass(frozen=True, eq=False)
class TextTable:
    """All captions of a data set of N images, M captions in all, on the CPU.

    rows: (N,) int64 row numbers of the manifest, ascending. tokens: (M, L) int32, padded. lengths: (M,) int64, at most
    L. first, count: (N,) int64, where an image's captions begin and how many it has. caption: (M,) int64, the same
    number for equal texts. case, picture: (N,) int64 codes of `case_of` and of equal pixels. truncated: how many
    captions were longer than the model's context.
    """

    rows: np.ndarray
    tokens: Tensor
    lengths: Tensor
    first: Tensor
    count: Tensor
    caption: Tensor
    case: Tensor
    picture: Tensor
    truncated: int

    @classmethod
    def of(
        cls,
        data: CaptionSet,
        tokenizer: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        shuffled: int | None = None,
    ) -> "TextTable":
        """Tokenise every caption once. shuffled: a seed; every training image has the captions of another one, drawn at
        random, and its case: a control, from which nothing about the images can be learned."""
        texts = [text for of_image in data.captions for text in of_image]
        number: dict[str, int] = {}
        caption = [number.setdefault(text, len(number)) for text in texts]
        tokens, lengths = tokenizer(list(number))
        count = torch.tensor([len(of_image) for of_image in data.captions])
        longest = tokens.shape[1]
        chosen = torch.tensor(caption)
        given = torch.arange(len(data.captions))
        if shuffled is not None:
            train = data.splits["train"]
            given[train] = given[np.random.default_rng(shuffled).permutation(train)]
        return cls(
            rows=data.rows,
            tokens=tokens.to(torch.int32)[chosen],
            lengths=lengths.clamp(max=longest)[chosen],
            first=(count.cumsum(0) - count)[given],
            count=count[given],
            caption=chosen,
            case=torch.from_numpy(case_of(data))[given],
            picture=torch.from_numpy(picture_of(data)),
            truncated=int((lengths > longest)[chosen].sum()),
        )

    def first_of(self, index: Tensor) -> Texts:
        """The first caption of each image; index: (B,) row numbers of the manifest."""
        where = self._where(index)
        return self._texts(where, self.first[where])

    def sampled(self, index: Tensor, step: int, seed: int) -> Texts:
        """One caption of each image, drawn anew every step."""
        where = self._where(index)
        drawn = (uniform(seed, step, index.cpu(), "caption") * self.count[where]).long()
        return self._texts(where, self.first[where] + drawn)

    def _where(self, index: Tensor) -> Tensor:
        return torch.from_numpy(np.searchsorted(self.rows, index.cpu().numpy()))

    def _texts(self, where: Tensor, which: Tensor) -> Texts:
        said = said_alike(self.case[where].numpy(), self.picture[where].numpy(), self.caption[which].numpy())
        return Texts(self.tokens[which].long(), self.lengths[which], torch.from_numpy(said))


def case_of(data: CaptionSet) -> np.ndarray:
    """(N,) int64: the case of each image; without cases in the manifest, every image is one of its own."""
    return np.arange(len(data)) if data.cases is None else data.cases


def picture_of(data: CaptionSet) -> np.ndarray:
    """(N,) int64: the same number for images with equal pixels."""
    return np.unique(data.content, return_inverse=True)[1].astype(np.int64)


def said_alike(case: np.ndarray, picture: np.ndarray, caption: np.ndarray) -> np.ndarray:
    """(B, 3) int64 of the numbers (B,) of a pair's case, image and caption, no number standing for two kinds of things:
    pairs with one in common are of one case, show the same or read the same, and are no negatives of each other."""
    return np.stack([3 * case, 3 * picture + 1, 3 * caption + 2], axis=1).astype(np.int64)


def parts_in_a_group(num_texts: int) -> int | None:
    """`num` of `Texts.by_length` for a batch of as many texts on every worker; None in a single process."""
    return None if world_size() == 1 else max(1, min(GROUPS, num_texts // _FEWEST))


def _exactly(num: int, sizes: list[int]) -> list[int]:
    """Of at most as many groups: the largest are halved, or the smallest joined to the next."""
    while len(sizes) < num:
        k = int(np.argmax(sizes))
        sizes = [*sizes[:k], sizes[k] // 2, sizes[k] - sizes[k] // 2, *sizes[k + 1 :]]
    while len(sizes) > num:
        k = int(np.argmin(sizes[:-1]))
        sizes = [*sizes[:k], sizes[k] + sizes[k + 1], *sizes[k + 2 :]]
    return sizes


def fewest_tokens(lengths: np.ndarray, counts: np.ndarray) -> list[int]:
    """How many of the shortest texts, of the next, ... make up the at most `GROUPS` groups of the least padding.

    lengths: (K,) that there are, ascending; counts: (K,) texts of each. By dynamic programming over where groups end.
    """
    ends = np.concatenate([[0], counts.cumsum()])
    cost = lengths * (ends[1:] - ends[:-1, None]) + _WORTH * lengths[-1] * ends[-1]  # [i, j] lengths i to j together
    cost = np.where(np.tri(len(lengths), k=-1), np.inf, cost)
    totals, begins = [cost[0]], [np.zeros(len(lengths), int)]  # up to length j in g groups; where the last one begins
    for _ in range(GROUPS - 1):
        total = np.concatenate([[np.inf], totals[-1][:-1]])[:, None] + cost
        totals.append(total.min(0))
        begins.append(total.argmin(0))
    cuts = [len(lengths)]
    for of_group in reversed(begins[: 1 + int(np.argmin([total[-1] for total in totals]))]):
        cuts.append(int(of_group[cuts[-1] - 1]))
    return np.diff(ends[cuts[::-1]]).tolist()
