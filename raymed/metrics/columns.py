"""Metrics of many binary classifiers on the same rows at once: one column of scores each.

What `raymed.metrics.classification.binary_metrics` says of every column, as array operations over all of them.
"""

import numpy as np
from numpy.typing import ArrayLike

from raymed.metrics.classification import NUM_BINS

COLUMN_METRICS = ("auroc", "auprc", "accuracy_at_0.5", "brier", "ece")


def column_metrics(scores: ArrayLike, targets: ArrayLike) -> dict[str, np.ndarray]:
    """Metrics of K classifiers on N rows, computed in float64.

    Args:
        scores: (N, K) probabilities of the positive class, in [0, 1].
        targets: (N,) of {0, 1}; 1 is the positive class.

    Returns:
        auroc, auprc, accuracy_at_0.5, brier and ece, each (K,), as `binary_metrics` defines them. All are nan for a
        column with a score that is not finite: a model that diverged says nothing of the others.
    """
    scores = np.ascontiguousarray(np.asarray(scores, np.float64).T)
    targets = np.asarray(targets, np.float64)
    finite = np.logical_and.reduce(np.isfinite(scores), axis=1)
    scores = np.where(finite[:, None], scores, 0.0)
    auroc, auprc = _areas(scores, targets)
    total = np.full(len(scores), len(targets))
    error = scores - targets
    values = {
        "auroc": auroc,
        "auprc": auprc,
        "accuracy_at_0.5": _ratio(np.equal(scores >= 0.5, targets).sum(axis=1), total),
        "brier": _ratio((error**2).sum(axis=1), total),
        "ece": _ratio(np.abs(_sums_by_bin(scores, error)).sum(axis=1), total),
    }
    return {name: np.where(finite, values[name], np.nan) for name in COLUMN_METRICS}


def _areas(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision (K,) of scores (K, N). Rows of equal score count together, at the last of them."""
    order = np.argsort(-scores, axis=1)
    sorted_scores, is_positive = np.take_along_axis(scores, order, axis=1), targets[order]
    last_of_tie = np.not_equal(np.diff(sorted_scores, axis=1, append=-1.0), 0)
    decided = np.arange(1, scores.shape[1] + 1)  # rows that are positive at a threshold of this row's score
    tp = np.cumsum(is_positive, axis=1)
    new_tp, new_fp = _since_last_tie(tp, last_of_tie), _since_last_tie(decided - tp, last_of_tie)
    positive, negative = new_tp.sum(axis=1), new_fp.sum(axis=1)
    ordered_pairs = (new_fp * (tp - new_tp / 2)).sum(axis=1)
    return _ratio(ordered_pairs, positive * negative), _ratio((new_tp * tp / decided).sum(axis=1), positive)


def _since_last_tie(counts: np.ndarray, last_of_tie: np.ndarray) -> np.ndarray:
    """Growth of the cumulative counts (K, N) from one distinct score to the next; 0 within a tie."""
    reached = np.where(last_of_tie, counts, 0)
    before = np.zeros_like(reached)
    np.maximum.accumulate(reached[:, :-1], axis=1, out=before[:, 1:])
    return np.where(last_of_tie, counts - before, 0)


def _sums_by_bin(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(K, NUM_BINS): values (K, N) summed over the rows whose score is in each bin; 1.0 is in the last."""
    num = len(scores)
    bins = np.minimum((scores * NUM_BINS).astype(int), NUM_BINS - 1) + NUM_BINS * np.arange(num)[:, None]
    return np.bincount(bins.ravel(), values.ravel(), minlength=NUM_BINS * num).reshape(num, NUM_BINS)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(denominator), np.nan), where=denominator > 0)
