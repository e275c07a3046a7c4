"""Probabilities that mean what they say, and the scores whose decision is not to be trusted.

Both are learned from the validation split, of which the network's weights have seen nothing; its best checkpoint, and
in a sweep its hyper-parameters, were chosen there, so figures may still be a little too good.

Calibration is Platt scaling of the logit. The uncertain band is a prediction set of conformal inference: its edges are
order statistics, corrected so that the promised error rates hold for new patients however few have been seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raymed.metrics.classification import binary_metrics

FOLDS = 5


@dataclass(frozen=True)
class Calibration:
    """sigmoid(logit / temperature + bias), strictly increasing in the logit. The default changes nothing.

    Source: Platt, "Probabilistic outputs for support vector machines", 1999.
    """

    temperature: float = 1.0
    bias: float = 0.0

    def __call__(self, logits: ArrayLike) -> np.ndarray:
        """(N,) logits -> (N,) float64 probabilities of the positive class."""
        from scipy.special import expit

        return expit(np.asarray(logits, np.float64) / self.temperature + self.bias)

    @classmethod
    def fit(cls, logits: np.ndarray, targets: np.ndarray) -> "Calibration":
        """Maximum likelihood under Platt's smoothed targets, (P + 1) / (P + 2) for each of the P positives and
        1 / (N + 2) for each of the N negatives: a prior under which separable classes have a finite solution.

        The temperature stays within [0.01, 100], so that the order of scores that rank the wrong way is kept too.
        """
        from scipy.optimize import minimize

        positive, negative = targets.sum(), (1 - targets).sum()
        smoothed = np.where(targets == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            z = parameters[0] * logits + parameters[1]
            residual = cls()(z) - smoothed
            gradient = np.array([np.mean(residual * logits), np.mean(residual)])
            return float(np.mean(np.logaddexp(0, z) - smoothed * z)), gradient

        bounds = [(0.01, 100), (None, None)]
        found = minimize(loss, np.array([1.0, 0.0]), jac=True, bounds=bounds, options={"ftol": 1e-14, "gtol": 1e-10})
        return cls(temperature=float(1 / found.x[0]), bias=float(found.x[1]))


def logit_of(scores: ArrayLike) -> np.ndarray:
    """(N,) probabilities -> (N,) float64 logits; 0 and 1 count as the nearest numbers that have one (-37 and 37)."""
    from scipy.special import logit

    return logit(np.clip(np.asarray(scores, np.float64), 1e-16, 1 - 1e-16))


def probability_figures(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """nll, the mean negative log-likelihood; brier and ece as in `binary_metrics`; of (N,) scores and targets."""
    figures = binary_metrics(probabilities, targets, 0.5)
    given = np.where(targets == 1, probabilities, 1 - probabilities)
    nll = float(-np.log(given.clip(1e-16)).mean())
    return {"nll": nll, "brier": figures["brier"], "ece": figures["ece"]}


def patient_folds(targets: np.ndarray, patients: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices to fit on, indices held out) of up to 5 folds, alike in their share of positives, no patient in two of
    them; none at all where a class has fewer than two patients."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(FOLDS, *(len(np.unique(patients[targets == k])) for k in (0, 1)))
    if folds >= 2:
        yield from StratifiedGroupKFold(folds, shuffle=True, random_state=0).split(targets, targets, patients)


def upper_bound(scores: np.ndarray, patients: np.ndarray, error: float) -> float:
    """The lowest u such that P(score > u) <= error for a random image of a new patient, whatever the distribution.

    With K patients seen, n_k images of patient k: the lowest score u with

        1 / (K + 1) + sum_k sum_i [score_ki > u] / ((K + 1) n_k) <= error,

    infinity where K < 1 / error - 1. Every patient weighs alike, and the new one is counted as the worst of all. It
    holds on average over the patients seen, who must be drawn as the new one is.
    Source: Lee, Barber, Willett, "Distribution-free inference with hierarchical data", 2023 (HCP); with one image a
    patient it is split conformal inference (Vovk et al., 2005).
    """
    _, patient, num_images = np.unique(patients, return_inverse=True, return_counts=True)
    total = len(num_images) + 1
    distinct, tie = np.unique(scores, return_inverse=True)
    mass = np.bincount(tie, 1 / (num_images[patient] * total), len(distinct))
    above = 1 / total + mass.sum() - np.cumsum(mass)
    allowed = distinct[above <= error + 1e-12]  # sums of fractions are a little off
    return float(allowed[0]) if len(allowed) else float("inf")


def uncertain_band(
    scores: np.ndarray, targets: np.ndarray, patients: np.ndarray, threshold: float, error: float = 0.05
) -> dict[str, Any]:
    """The interval of scores around the threshold in which a decision is not to be trusted.

    The smallest band [low, high] that holds the threshold and outside of which, on average for new patients,

        at most `error` of the images of positives lie below low   (and would be decided negative),
        at most `error` of the images of negatives lie above high  (and would be decided positive).

    Images inside are for a person to read. The two rates are of all images of a class, so they do not depend on how
    rare the positive class is; an accuracy would: with few positives it is high for whoever calls everyone healthy. How
    often the decisions that are made are right is reported beside it. Two cut-offs are those of two-graph ROC analysis
    (Greiner 1995); the edges are `upper_bound`s, which makes the band the scores whose class-conditional conformal
    prediction set holds both classes.

    Args:
        scores: (N,) probabilities in [0, 1]. targets: (N,) of {0, 1}. patients: (N,) who each image is of.
        threshold: of the decision: positive when score >= threshold.

    Returns:
        low, high, error; patients of each class; reason, where a side is open (0 or 1) because its class has fewer than
        1 / error - 1 patients; val: `band_figures` of these scores.
    """
    positive = targets == 1
    low = -upper_bound(-scores[positive], patients[positive], error)
    high = upper_bound(scores[~positive], patients[~positive], error)
    low, high = max(0.0, min(low, threshold)), min(1.0, max(high, threshold))
    counts = {name: len(np.unique(patients[targets == k])) for name, k in (("positive", 1), ("negative", 0))}
    needed = int(np.ceil(1 / error - 1 - 1e-9))
    few = [f"{num} {name} patients where {needed} are needed" for name, num in counts.items() if num < needed]
    reason = "too few to promise anything: " + ", ".join(few) if few else "enough patients of both classes"
    figures = band_figures(scores, targets, threshold, low, high)
    return {"low": low, "high": high, "error": error, "reason": reason, "patients": counts, "val": figures}


def band_figures(
    scores: np.ndarray, targets: np.ndarray, threshold: float, low: float, high: float
) -> dict[str, float]:
    """What a band does to a set of scores.

    Returns:
        referred: fraction of images inside [low, high]. missed: fraction of positives below low. false_alarms: fraction
        of negatives above high. accuracy_inside, accuracy_outside: of the decisions; nan where there are none.
    """
    inside, positive = (scores >= low) & (scores <= high), targets == 1
    right = (scores >= threshold) == positive

    def fraction(what: np.ndarray, of: np.ndarray) -> float:
        return float(what[of].mean()) if of.any() else float("nan")

    return {
        "referred": float(inside.mean()),
        "missed": fraction(scores < low, positive),
        "false_alarms": fraction(scores > high, ~positive),
        "accuracy_inside": fraction(right, inside),
        "accuracy_outside": fraction(right, ~inside),
    }
