"""How well an embedding separates two classes, without training anything on it."""

from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def centroid_auroc(embedding: np.ndarray, targets: np.ndarray) -> float:
    """AUROC of s_i = z_i . (c1 - c0), c0 and c1 the class means of the other samples (leave one out).

    embedding: (N, D), unit norm. targets: (N,) of {0, 1}. NaN when a class has fewer than two samples.
    """
    from sklearn.metrics import roc_auc_score

    embedding = embedding.astype(np.float64)
    positive = targets.astype(bool)
    if min(positive.sum(), (~positive).sum()) < 2:
        return float("nan")

    def closeness(members: np.ndarray) -> np.ndarray:
        own = members[:, None] * embedding  # a sample is not compared with itself
        centre = (embedding[members].sum(0) - own) / (members.sum() - members)[:, None]
        return (embedding * centre).sum(1)

    return float(roc_auc_score(positive, closeness(positive) - closeness(~positive)))


class EmbeddingMeter:
    """Collects embeddings; computes `centroid_auroc`. Rows stand in manifest order, each once."""

    def __init__(self) -> None:
        self._embedding: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._index: list[np.ndarray] = []

    def update(self, prediction: "dict[str, Tensor]", batch: Any, index: "Tensor") -> None:
        """prediction: "embedding" (B, D); batch.label: (B,) of {0, 1}; index: (B,) row numbers."""
        self._embedding.append(prediction["embedding"].detach().float().cpu().numpy())
        self._targets.append(batch.label.cpu().numpy())
        self._index.append(index.cpu().numpy())

    def merge(self, other: Self) -> None:
        """Add what another worker's meter has seen."""
        self._embedding += other._embedding
        self._targets += other._targets
        self._index += other._index

    def compute(self) -> dict[str, float]:
        """{"centroid_auroc": value}."""
        _, first = np.unique(np.concatenate(self._index), return_index=True)
        embedding, targets = np.concatenate(self._embedding)[first], np.concatenate(self._targets)[first]
        return {"centroid_auroc": centroid_auroc(embedding, targets)}
