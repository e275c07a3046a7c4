"""Linear probe: how much of what is asked for lies in frozen embeddings, as a logistic regression finds it.

Features are standardised by the training rows, and the strength of the L2 penalty is the one of STRENGTHS under which
the validation rows are likeliest. The test rows are only scored.

Source: Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021, section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 3))
"""Of C, the inverse of the penalty, weakest last."""
MIN_ROWS = 2
"""Training rows of each class, without which nothing is learned."""


@dataclass(frozen=True)
class Probe:
    """A fitted probe and what it says of the test rows."""

    probabilities: np.ndarray
    """(N, K) float64 of the test rows."""
    classes: np.ndarray
    """(K,) which label each column is of."""
    strength: float
    """C, as chosen."""
    likelihood: dict[float, float]
    """C -> mean negative log-likelihood of the validation rows."""


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    val: np.ndarray,
    val_labels: np.ndarray,
    test: np.ndarray,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    """Logistic regression on embeddings (N, D) with labels (N,) of at least two values; see the top of the file.

    Of equally likely strengths the smallest C, the strongest penalty, is taken.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    train, val, test = (np.asarray(scaler.transform(features)) for features in (train, val, test))
    fitted = {strength: _fit(train, train_labels, strength) for strength in sorted(strengths)}
    likelihood = {strength: _negative_log_likelihood(model, val, val_labels) for strength, model in fitted.items()}
    chosen = min(likelihood, key=lambda strength: likelihood[strength])
    model = fitted[chosen]
    return Probe(model.predict_proba(test), model.classes_, chosen, likelihood)


def probe_findings(
    train: np.ndarray, train_present: np.ndarray, val: np.ndarray, val_present: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, list[float]]:
    """A probe for each of F findings, of which an image may have several.

    Args:
        train, val, test: embeddings (N, D). train_present, val_present: (N, F) of {0, 1} or bool.

    Returns:
        (N, F) float64 probabilities of the test rows and the chosen C of each finding; nan where the training rows
        hold fewer than MIN_ROWS with the finding, or without it.
    """
    scores, strengths = np.full((len(test), train_present.shape[1]), np.nan), []
    for column in range(train_present.shape[1]):
        labels = np.asarray(train_present[:, column], int)
        if min(labels.sum(), len(labels) - labels.sum()) < MIN_ROWS:
            strengths.append(float("nan"))
            continue
        probe = linear_probe(train, labels, val, np.asarray(val_present[:, column], int), test)
        scores[:, column] = probe.probabilities[:, 1]
        strengths.append(probe.strength)
    return scores, strengths


def _fit(features: np.ndarray, labels: np.ndarray, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=2000).fit(features, labels)


def _negative_log_likelihood(model: Any, features: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the rows; a label that was not seen in training has the least probability a float can tell from 0."""
    probabilities = model.predict_proba(features)
    given = (probabilities * (np.asarray(labels)[:, None] == model.classes_)).sum(axis=1)
    return float(-np.log(given.clip(1e-16)).mean()) if len(given) else 0.0
