"""Metrics of a binary classifier: its ranking, its decisions at a threshold, and its calibration.

A score is the predicted probability of the positive class and a row is decided positive when score >= threshold.
Everything is computed from how often each row counts, so that one row of counts gives the metrics of a data set
(`binary_metrics`) and a matrix of counts those of all its bootstrap resamples at once (`binary_statistic`).
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from raymed.config import UserError, check_choice, check_range

NUM_BINS = 15

Statistic = Callable[[np.ndarray], dict[str, np.ndarray]]
"""counts (R, N), how often each of N rows is in each of R resamples -> {metric: (R,)}; nan where undefined."""


def binary_metrics(scores: ArrayLike, targets: ArrayLike, threshold: float) -> dict[str, float]:
    """Metrics of N scores, computed in float64.

    Args:
        scores: (N,) probabilities of the positive class, in [0, 1].
        targets: (N,) of {0, 1}; 1 is the positive class.
        threshold: rows with score >= threshold are decided positive.

    Returns:
        auroc: area under the ROC curve, ties counting one half; nan unless both classes occur.
        auprc: average precision, sum_k (R_k - R_{k-1}) P_k over the distinct scores (the step form; the trapezoid
            overestimates); nan without a positive.
        accuracy, sensitivity (= recall), specificity, precision, f1: at the threshold. sensitivity is nan without a
            positive, specificity without a negative, precision without a row decided positive, f1 = 2TP / (2TP + FP +
            FN) without either.
        accuracy_at_0.5: accuracy at the threshold 0.5.
        brier: mean squared difference of score and target.
        ece: expected calibration error of the positive class, sum_b n_b/N |mean score_b - fraction positive_b| over
            the 15 bins [0, 1/15), [1/15, 2/15), ..., [14/15, 1].
        threshold: as given.

    Raises:
        UserError: a score is NaN (the message says how many are) or outside [0, 1]; a target is neither 0 nor 1.
    """
    metrics = binary_statistic(scores, targets, threshold)(np.ones((1, len(np.asarray(scores)))))
    return {name: float(value[0]) for name, value in metrics.items()} | {"threshold": float(threshold)}


def binary_statistic(scores: ArrayLike, targets: ArrayLike, threshold: float) -> Statistic:
    """`binary_metrics` (less the threshold) as a function of row counts, for any number of resamples at once."""
    scores, targets = _checked(scores, targets)
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.flatnonzero(np.diff(scores[order], append=-1.0))
    decided = scores >= threshold
    bins = _bin_of(scores)[:, None] == np.arange(NUM_BINS)
    summed = np.column_stack(
        [targets, 1 - targets, decided * targets, decided * (1 - targets), (scores >= 0.5) == targets]
        + [(scores - targets) ** 2, bins * (scores - targets)[:, None]]
    )

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        # einsum, not @: a threaded matrix product may add in another order on a machine with other cores.
        sums = np.einsum("rn,nk->rk", counts, summed)
        positive, negative, tp, fp, right_at_half, squared_error = sums[:, :6].T
        total = positive + negative
        auroc, auprc = _areas(np.take(counts, order, axis=1), targets[order], last_of_tie)
        sensitivity = _ratio(tp, positive)
        return {
            "auroc": auroc,
            "auprc": auprc,
            "accuracy": _ratio(tp + negative - fp, total),
            "accuracy_at_0.5": _ratio(right_at_half, total),
            "sensitivity": sensitivity,
            "recall": sensitivity,
            "specificity": _ratio(negative - fp, negative),
            "precision": _ratio(tp, tp + fp),
            "f1": _ratio(2 * tp, tp + fp + positive),
            "brier": _ratio(squared_error, total),
            "ece": _ratio(np.abs(sums[:, 6:]).sum(axis=1), total),
        }

    return statistic


def tune_threshold(
    scores: ArrayLike, targets: ArrayLike, criterion: Literal["accuracy", "youden", "f1"] = "accuracy"
) -> float:
    """The threshold in [0, 1] that maximises accuracy, Youden's J (sensitivity + specificity - 1) or F1.

    Any criterion is constant between two neighbouring scores. Of the best such gaps (0 and 1 bound the outer two) the
    widest is taken, the lowest if several are as wide, and of it the midpoint: a threshold on an observed score would
    hang on the last bit of one image's score, which changes with batch size, precision and hardware, while the
    midpoint is as far as can be from every score it separates.

    Raises:
        UserError: as `binary_metrics`; one of the classes does not occur; an unknown criterion.
    """
    check_choice("criterion", criterion, ["accuracy", "youden", "f1"])
    scores, targets = _checked(scores, targets)
    num_positive, num_negative = targets.sum(), (1 - targets).sum()
    if not num_positive or not num_negative:
        raise UserError(
            f"a threshold needs both classes, got {num_positive:.0f} positive and {num_negative:.0f} negative rows"
        )
    distinct, tie = np.unique(scores, return_inverse=True)
    low, high = np.append(0.0, distinct), np.append(distinct, 1.0)
    tp = num_positive - np.append(0, np.cumsum(np.bincount(tie, targets)))
    fp = num_negative - np.append(0, np.cumsum(np.bincount(tie, 1 - targets)))
    # Whole numbers, or one division of two: equally good gaps compare equal.
    value = {
        "accuracy": tp - fp,
        "youden": tp * num_negative - fp * num_positive,
        "f1": 2 * tp / np.maximum(tp + fp + num_positive, 1),
    }[criterion]
    if distinct[-1] == 1.0:  # no threshold in [0, 1] decides a score of 1 negative
        low, high, value = low[:-1], high[:-1], value[:-1]
    width = np.where(value == value.max(), high - low, -1.0)
    best = int(width.argmax())
    midpoint = (low[best] + high[best]) / 2
    return float(midpoint if midpoint > low[best] else high[best])  # neighbouring floats have no number between


def _bin_of(scores: np.ndarray) -> np.ndarray:
    """(N,) scores in [0, 1] -> (N,) which of the NUM_BINS equal-width bins each is in; 1.0 is in the last."""
    return np.minimum((scores * NUM_BINS).astype(int), NUM_BINS - 1)


def _checked(scores: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores and targets as float64 arrays (N,), or UserError (see `binary_metrics`)."""
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets, np.float64)
    if scores.shape != targets.shape or scores.ndim != 1:
        raise UserError(f"scores and targets must both be (N,), got {scores.shape} and {targets.shape}")
    if num_nan := int(np.isnan(scores).sum()):
        raise UserError(f"{num_nan} of {len(scores)} scores are NaN: the model diverged or an input was not finite")
    if len(scores):
        check_range("scores", scores, 0, 1)
    if wrong := set(np.unique(targets).tolist()) - {0.0, 1.0}:
        raise UserError(f"targets must be 0 or 1, got {min(wrong):g}")
    return scores, targets


def _areas(counts: np.ndarray, targets: np.ndarray, last_of_tie: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision (R,) of counts (R, N) whose columns stand in descending order of score."""
    tp = np.take(np.cumsum(counts * targets, axis=1), last_of_tie, axis=1)
    fp = np.take(np.cumsum(counts * (1 - targets), axis=1), last_of_tie, axis=1)
    new_tp, new_fp = np.diff(tp, axis=1, prepend=0), np.diff(fp, axis=1, prepend=0)
    positive, negative = new_tp.sum(axis=1), new_fp.sum(axis=1)
    ordered_pairs = (new_fp * (tp - new_tp / 2)).sum(axis=1)
    precision = tp / np.maximum(tp + fp, 1)
    return _ratio(ordered_pairs, positive * negative), _ratio((new_tp * precision).sum(axis=1), positive)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)
