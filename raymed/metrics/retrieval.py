"""Retrieval: whether an image's text, and a text's image, are among the k nearest of a whole set.

Of N images and N texts, text i written for image i, the items nearest to a query are those of highest cosine. An item
is relevant if it shares a group with the query: the same case, or the same caption under another image, is no mistake.
A query is found at k if any relevant item is among the k nearest; R@k, called recall in this literature and a hit rate
elsewhere, is the fraction of queries that are found.

Ranks are exact and pessimistic: every irrelevant item that is as near as the nearest relevant one stands before it. A
network that has collapsed to one point finds nothing. Cosines less than TIE apart are as near: one caption has an
embedding that differs by as much with the texts that it shares a batch with.

The similarities are never held whole, but a few rows at a time.

Source: Karpathy and Fei-Fei, "Deep visual-semantic alignments for generating image descriptions", CVPR 2015.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from raymed.config import UserError
from raymed.metrics.classification import Statistic

if TYPE_CHECKING:
    from torch import Tensor

RECALLS = (1, 5, 10)
TOPS = (1, 2)
"""k of the protocol in small batches."""
TIE = 1e-6
_ENTRIES = 2**22
"""Of a block of similarities: 16 MB of float32."""

Ranks = dict[str, np.ndarray]
"""{"i2t": (N,) of the images as queries, "t2i": (N,) of the texts}: where the nearest relevant item stands, from 1."""


def retrieval_ranks(image: np.ndarray, text: np.ndarray, groups: np.ndarray) -> Ranks:
    """The rank of the nearest relevant item of every query, ties counted against it.

    Args:
        image, text: (N, D) of the pairs, of any length but zero.
        groups: (N,) or (N, K) ids; two pairs that share any of them are relevant to each other.

    Raises:
        UserError: shapes do not fit; features are not finite or zero.
    """
    image, text, groups = _checked(image, text, groups)
    return {"i2t": _ranks(image, text, groups), "t2i": _ranks(text, image, groups)}


def recall_statistic(ranks: Mapping[str, np.ndarray], at: Sequence[int] = RECALLS) -> Statistic:
    """i2t_recall_K and t2i_recall_K for every K of `at`, as a function of how often each query counts.

    Only queries are resampled: what they are looked up in stays the whole set, as a smaller one would be easier.
    """
    names = [f"{direction}_recall_{k}" for direction in ranks for k in at]
    found = np.column_stack([of_queries <= k for of_queries in ranks.values() for k in at]).astype(np.float64)

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):  # without a row: nan
            shares = np.einsum("rn,nk->kr", counts, found) / counts.sum(axis=1)
        return dict(zip(names, shares, strict=True))

    return statistic


def retrieval_statistic(image: np.ndarray, text: np.ndarray, groups: np.ndarray) -> Statistic:
    """i2t_recall_1, _5, _10, t2i_recall_1, _5, _10 and mean_recall, the mean of these six, as a function of how often
    each row counts (see `recall_statistic`). Arguments and errors as `retrieval_ranks`."""
    recalls = recall_statistic(retrieval_ranks(image, text, groups))

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        found = recalls(counts)
        return found | {"mean_recall": np.mean(list(found.values()), axis=0)}

    return statistic


def batch_protocol(
    image: np.ndarray, text: np.ndarray, groups: np.ndarray, *, batch: int = 50, repeats: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Retrieval within small batches, as BiomedCLIP's fine-tuning is compared in the literature.

    In each repeat the pairs are shuffled and cut into batches without a remainder; every query is looked up in its own
    batch alone, so that figures do not depend on N, and are much higher than those of the whole set. With fewer pairs
    than `batch` all of them are one.

    Returns:
        batch, batches, repeats: as drawn; i2t_top_1, i2t_top_2, t2i_top_1, t2i_top_2: {"mean", "std" (ddof=1)} over the
        repeats of the fraction of queries found.

    Source: Koleilat et al., "MedCLIP-SAMv2", Medical Image Analysis 2025, section 4 (batches of 50, 5 repeats).
    """
    image, text, groups = _checked(image, text, groups)
    random = np.random.default_rng(seed)
    batch = min(batch, len(image))
    batches = len(image) // batch if batch else 0
    if not batches:
        raise UserError("retrieval in batches needs at least one pair of an image and a text, got none")
    tops: dict[str, list[float]] = {f"{direction}_top_{k}": [] for direction in ("i2t", "t2i") for k in TOPS}
    for _ in range(repeats):
        drawn = random.permutation(len(image))[: batches * batch].reshape(batches, batch)
        ranks = [retrieval_ranks(image[rows], text[rows], groups[rows]) for rows in drawn]
        for name, values in tops.items():
            direction, k = name.split("_top_")
            values.append(float(np.mean([of_batch[direction] <= int(k) for of_batch in ranks])))
    figures = {
        name: {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if repeats > 1 else float("nan")}
        for name, values in tops.items()
    }
    return {"batch": batch, "batches": batches, "repeats": repeats} | figures


def nearest(queries: np.ndarray, items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The min(k, N) items of highest cosine to each query, nearest first.

    Args:
        queries: (Q, D); items: (N, D); of any length but zero.

    Returns:
        (Q, k) int64 rows of the items, of equal cosines the lowest first, and (Q, k) float32 cosines.
    """
    queries, items = unit(queries), unit(items)
    k = min(k, len(items))
    rows, cosines = [np.empty((0, k), np.int64)], [np.empty((0, k), np.float32)]
    for part in _parts(len(queries), len(items)):
        similarity = queries[part] @ items.T
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        rows.append(order)
        cosines.append(np.take_along_axis(similarity, order, axis=1))
    return np.concatenate(rows), np.concatenate(cosines)


def share_group(groups: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, N) bool of ids (n, K) and (N, K): whether two rows have an id in common."""
    shared = np.zeros((len(groups), len(others)), bool)
    for mine in groups.T:
        for theirs in others.T:
            shared |= mine[:, None] == theirs
    return shared


def unit(features: np.ndarray) -> np.ndarray:
    """(N, D) float32 of length 1. Raises UserError for features that are not finite, or zero."""
    features = np.asarray(features, np.float32)
    if bad := int((~np.isfinite(features).all(axis=-1)).sum()):
        raise UserError(f"{bad} of {len(features)} embeddings are not finite: the model diverged; lower its lr")
    length = np.linalg.norm(features, axis=-1, keepdims=True)
    if bad := int((length == 0).sum()):
        raise UserError(f"{bad} of {len(features)} embeddings are zero, and so have no direction")
    return features / length


class RetrievalMeter:
    """Collects the embeddings of images and of their texts.

    `image` and `text` (N, D) float32, `groups` (N, K) and `index` (N,) int64 stand in order of the row number, each row
    once.
    """

    def __init__(self) -> None:
        self._image: list[np.ndarray] = []
        self._text: list[np.ndarray] = []
        self._groups: list[np.ndarray] = []
        self._index: list[np.ndarray] = []

    def update(self, prediction: dict[str, Tensor], batch: Any, index: Tensor) -> None:
        """prediction: "image" and "text" (B, D), "groups" (B,) or (B, K); index: (B,) row numbers in the manifest."""
        self._image.append(prediction["image"].detach().float().cpu().numpy())
        self._text.append(prediction["text"].detach().float().cpu().numpy())
        self._groups.append(_two_axes(prediction["groups"].cpu().numpy()))
        self._index.append(index.cpu().numpy())

    def merge(self, other: Self) -> None:
        """Add what another worker's meter has seen."""
        self._image += other._image
        self._text += other._text
        self._groups += other._groups
        self._index += other._index

    @property
    def image(self) -> np.ndarray:
        return self._rows(self._image)

    @property
    def text(self) -> np.ndarray:
        return self._rows(self._text)

    @property
    def groups(self) -> np.ndarray:
        return self._rows(self._groups)

    @property
    def index(self) -> np.ndarray:
        return np.unique(np.concatenate([np.empty(0, np.int64), *self._index]))

    def compute(self) -> dict[str, float]:
        """What `retrieval_statistic` names, of the rows as they are; nan without a row."""
        statistic = retrieval_statistic(self.image, self.text, self.groups)
        return {name: float(value[0]) for name, value in statistic(np.ones((1, len(self.index)))).items()}

    def _rows(self, parts: list[np.ndarray]) -> np.ndarray:
        if not parts:
            return np.empty((0, 1))
        _, first = np.unique(np.concatenate(self._index), return_index=True)
        return np.concatenate(parts)[first]


def _ranks(queries: np.ndarray, items: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(N,) ranks of unit queries (N, D) among unit items (N, D), row i of both being of groups[i]."""
    ranks = [np.empty(0, np.int64)]
    for part in _parts(len(queries), len(items)):
        similarity = queries[part] @ items.T
        relevant = share_group(groups[part], groups)
        best = np.max(similarity, axis=1, where=relevant, initial=-np.inf)[:, None]
        ranks.append(1 + ((similarity >= best - TIE) & ~relevant).sum(axis=1))
    return np.concatenate(ranks)


def _parts(num_queries: int, num_items: int) -> Iterator[slice]:
    size = max(1, _ENTRIES // max(1, num_items))
    return (slice(start, start + size) for start in range(0, num_queries, size))


def _two_axes(groups: np.ndarray) -> np.ndarray:
    return groups[:, None] if groups.ndim == 1 else groups


def _checked(image: np.ndarray, text: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors and groups (N, K), or UserError."""
    image, text, groups = np.asarray(image), np.asarray(text), _two_axes(np.asarray(groups))
    if image.ndim != 2 or image.shape != text.shape or len(groups) != len(image):
        raise UserError(
            f"images and texts must both be (N, D) and groups (N,) or (N, K), got {image.shape}, {text.shape} and "
            f"{groups.shape}"
        )
    return unit(image), unit(text), groups
