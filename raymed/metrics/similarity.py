"""From the cosine of an image and a text to the probability that they belong together.

Asked of a pair that is as likely matched as random: every row gives one pair that belongs together, its own, and one
with the text of another row that shares no group with it. The network's own logit, scale * cosine + bias, is trained
for ranking (InfoNCE has no bias, and its scale is sharp): as a probability it is far off. A line through it, fitted on
the validation split (Platt), is not.

Where a fraction p of all pairs is matched instead of one half, log(p / (1 - p)) is to be added to the logit.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from raymed.config import UserError
from raymed.metrics.calibration import Calibration, probability_figures
from raymed.metrics.retrieval import unit

_TRIES = 20  # to draw a text that shares no group


@dataclass(frozen=True)
class PairScores:
    """Matched and random pairs of a split."""

    cosines: np.ndarray
    """(M,) float64."""
    targets: np.ndarray
    """(M,) int64, 1 where the pair is matched."""
    rows: np.ndarray
    """(M,) row of the image, which says whose patient's the pair is."""


def pair_scores(image: np.ndarray, text: np.ndarray, groups: np.ndarray, seed: int = 0) -> PairScores:
    """Every row's own pair, and its image with the text of a random row that shares no group with it.

    Args:
        image, text: (N, D). groups: (N,) or (N, K) ids.

    A row without such another (after 20 draws) has its own pair only. Raises UserError if that is so of all.
    """
    image, text = unit(image), unit(text)
    groups = np.asarray(groups).reshape(len(image), -1)
    own = np.arange(len(image))
    other = _unrelated(groups, np.random.default_rng(seed))
    drawn = other >= 0
    if not drawn.any():
        raise UserError("all pairs share a case: no image can be paired with a text that is not its own")
    rows, texts = np.concatenate([own, own[drawn]]), np.concatenate([own, other[drawn]])
    cosines = np.einsum("nd,nd->n", image[rows].astype(np.float64), text[texts].astype(np.float64))
    return PairScores(cosines, (np.arange(len(rows)) < len(own)).astype(np.int64), rows)


@dataclass(frozen=True)
class SimilarityCalibration:
    """Probability that a pair belongs together: calibration(scale * cosine + bias)."""

    scale: float
    bias: float
    calibration: Calibration

    def __call__(self, cosines: np.ndarray) -> np.ndarray:
        """(N,) cosines -> (N,) float64 probabilities, strictly increasing, if pairs are matched half of the time."""
        return self.calibration(self.scale * np.asarray(cosines, np.float64) + self.bias)


def calibrate_similarity(
    val: PairScores, test: PairScores, scale: float, bias: float = 0.0
) -> tuple[SimilarityCalibration, dict[str, Any]]:
    """Fit on the validation pairs, judged on those of the test split.

    Args:
        scale, bias: of the network's own logit; scale is 1 / temperature.

    Returns:
        The calibration, and a report: method, scale, bias, temperature and shift of the line, pairs of both splits,
        and {nll, brier, ece} of the test pairs "before", as sigmoid(scale * cosine + bias), and "after".
    """
    before = SimilarityCalibration(scale, bias, Calibration())
    fitted = Calibration.fit(scale * val.cosines + bias, val.targets)
    after = SimilarityCalibration(scale, bias, fitted)
    return after, {
        "method": "Platt scaling of the logit of matched and random pairs",
        "scale": scale,
        "bias": bias,
        "temperature": fitted.temperature,
        "shift": fitted.bias,
        "pairs": {"val": len(val.cosines), "test": len(test.cosines)},
        "before": probability_figures(before(test.cosines), test.targets),
        "after": probability_figures(after(test.cosines), test.targets),
    }


def _unrelated(groups: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(N,) a random row that shares no group with each of N; -1 where none was drawn."""
    found, open_rows = np.full(len(groups), -1), np.arange(len(groups))
    for _ in range(_TRIES):
        drawn = random.integers(len(groups), size=len(open_rows))
        apart = ~_share(groups[open_rows], groups[drawn])
        found[open_rows[apart]] = drawn[apart]
        open_rows = open_rows[~apart]
    return found


def _share(groups: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,) whether row i of both (n, K) have an id in common."""
    return (groups[:, :, None] == others[:, None, :]).any(axis=(1, 2))
