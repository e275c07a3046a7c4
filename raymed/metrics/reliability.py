"""Whether probabilities mean what they say, and two ways to make them.

Assessment, after Cox: with l = logit(score),

    logit P(y = 1) = a + b l        calibration slope b and intercept a; 1 and 0 are perfect, b < 1 is overconfident
    logit P(y = 1) = a + l          a is the calibration in the large: > 0 where risks are higher than predicted

and the calibration curve, the fraction of positives against the mean score in bins.

Mending: temperature scaling, one number that only softens or sharpens, and isotonic regression, which bends freely and
wants some hundreds of cases; Platt scaling between them is `raymed.metrics.calibration.Calibration`. Each is fitted on
scores outside the test set, and taken if it helps on patients it was not fitted on.

Sources: Cox, Biometrika 45, 1958; Van Calster et al., J Clin Epidemiol 74, 2016; Guo et al., ICML 2017 (temperature);
Zadrozny and Elkan, KDD 2002 (isotonic).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, TypedDict, cast, get_args

import numpy as np
from numpy.typing import ArrayLike

from raymed.config import UserError, check_choice, from_dict, to_dict
from raymed.metrics.bootstrap import bootstrap_ci
from raymed.metrics.calibration import Calibration, logit_of, patient_folds, probability_figures
from raymed.metrics.classification import Statistic, binary_metrics
from raymed.metrics.operating import wilson

Method = Literal["none", "platt", "temperature", "isotonic"]
_MAX_STEPS = 50
_MAX_HALVINGS = 60
"""Enough for the longest step: where all risks are near 0 or 1, the curvature is too."""


def recalibration_statistic(scores: ArrayLike, targets: ArrayLike) -> Statistic:
    """calibration_slope, calibration_intercept and calibration_in_the_large, by maximum likelihood, for `bootstrap_ci`.

    Scores of 0 and 1 count as in `logit_of`. Slope and intercept are nan where a threshold separates the classes (then
    no finite slope is most likely), all three where a class does not occur. Where many resamples are separated, the
    upper end of the slope's interval is too low, since their slopes are without bound.

    Args:
        scores: (N,) in [0, 1]. targets: (N,) of {0, 1}. Raises UserError as `binary_metrics`.
    """
    binary_metrics(scores, targets, 0.5)  # refuses what cannot be used
    logits, targets = logit_of(scores), np.asarray(targets, np.float64)
    ones, offset = np.ones_like(logits), np.zeros_like(logits)

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        line, shift = np.full((len(counts), 2), np.nan), np.full(len(counts), np.nan)
        low, high = _extremes(logits, counts, targets == 0)
        positive_low, positive_high = _extremes(logits, counts, targets == 1)
        overlap = (high > positive_low) & (positive_high > low)  # else a threshold separates the classes
        line[overlap] = _logistic(np.column_stack([ones, logits]), offset, targets, counts[overlap])
        both = np.isfinite(low) & np.isfinite(positive_low)
        shift[both] = _logistic(ones[:, None], logits, targets, counts[both])[:, 0]
        return {
            "calibration_slope": line[:, 1],
            "calibration_intercept": line[:, 0],
            "calibration_in_the_large": shift,
        }

    return statistic


class CurveBin(TypedDict):
    """One point of a calibration curve."""

    mean_score: float
    fraction: float  # of positives
    num: int
    num_positive: int
    ci_low: float  # of the fraction, by patient
    ci_high: float
    analytic_low: float  # Wilson's, of independent cases
    analytic_high: float


def calibration_curve(
    scores: ArrayLike,
    targets: ArrayLike,
    patients: np.ndarray,
    *,
    num_bins: int = 10,
    level: float = 0.95,
    **options: Any,
) -> list[CurveBin]:
    """The fraction of positives in up to num_bins bins of about as many cases each, by ascending score.

    The edges are quantiles of the scores, each of the bin below it; equal scores share a bin.

    Args:
        scores: (N,) in [0, 1]. targets: (N,) of {0, 1}. patients: (N,) whose each case is.
        level: coverage of the intervals. options: n_boot, seed, unit of `bootstrap_ci`.

    Raises UserError as `binary_metrics`, and without a case.
    """
    binary_metrics(scores, targets, 0.5)  # refuses what cannot be used
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets, np.float64)
    if not len(scores):
        raise UserError("a calibration curve needs at least one case, got none")
    edges = np.quantile(scores, np.linspace(0, 1, num_bins + 1)[1:-1])
    bins = np.unique(np.searchsorted(edges, scores), return_inverse=True)[1]
    member = (bins[:, None] == np.arange(bins.max() + 1)).astype(np.float64)

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        num = np.einsum("rn,nb->br", counts, member)
        positive = np.einsum("rn,nb->br", counts * targets, member)
        fraction = np.divide(positive, num, out=np.full_like(num, np.nan), where=num > 0)
        return {str(b): of_bin for b, of_bin in enumerate(fraction)}

    figures = bootstrap_ci([statistic], [patients], level=level, **options)
    curve = []
    for b, inside in enumerate(member.T == 1):
        num, positive = int(inside.sum()), int(targets[inside].sum())
        low, high = wilson(positive, num, level)
        curve.append(
            CurveBin(
                mean_score=float(scores[inside].mean()),
                fraction=positive / num,
                num=num,
                num_positive=positive,
                ci_low=figures[str(b)]["ci_low"],
                ci_high=figures[str(b)]["ci_high"],
                analytic_low=low,
                analytic_high=high,
            )
        )
    return curve


class Calibrator(Protocol):
    """From logits to probabilities, never decreasing: `Calibration` (Platt's), `Temperature` or `Isotonic`."""

    def __call__(self, logits: ArrayLike) -> np.ndarray:
        """(N,) logits -> (N,) float64 probabilities of the positive class."""
        ...


@dataclass(frozen=True)
class Temperature:
    """sigmoid(logit / temperature): the decision at 0.5 stays, confidence changes. The default changes nothing."""

    temperature: float = 1.0

    def __call__(self, logits: ArrayLike) -> np.ndarray:
        """(N,) logits -> (N,) float64 probabilities of the positive class."""
        return Calibration(self.temperature)(logits)

    @classmethod
    def fit(cls, logits: np.ndarray, targets: np.ndarray) -> "Temperature":
        """Maximum likelihood under Platt's smoothed targets, as `Calibration.fit`; within [0.01, 100]."""
        from scipy.optimize import brentq
        from scipy.special import expit

        smoothed = _smoothed(targets)

        def gradient(sharpness: float) -> float:
            return float(np.mean((expit(sharpness * logits) - smoothed) * logits))

        if gradient(0.01) >= 0:  # the loss is convex
            return cls(100.0)
        if gradient(100.0) <= 0:
            return cls(0.01)
        return cls(1 / cast(float, brentq(gradient, 0.01, 100.0, xtol=1e-12)))


@dataclass(frozen=True)
class Isotonic:
    """The non-decreasing step function nearest to the targets, linear between its K knots and constant beyond them.

    Cases with different logits may get one probability; their order is never turned round.
    """

    logits: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __call__(self, logits: ArrayLike) -> np.ndarray:
        """(N,) logits -> (N,) float64 probabilities of the positive class."""
        return np.interp(np.asarray(logits, np.float64), self.logits, self.probabilities)

    @classmethod
    def fit(cls, logits: np.ndarray, targets: np.ndarray) -> "Isotonic":
        """Least squares under Platt's smoothed targets, so that no probability is 0 or 1, which no number of cases
        would justify."""
        from sklearn.isotonic import IsotonicRegression

        found = IsotonicRegression(out_of_bounds="clip").fit(logits, _smoothed(targets))
        return cls(tuple(found.X_thresholds_.tolist()), tuple(found.y_thresholds_.tolist()))


KINDS: dict[str, Any] = {"platt": Calibration, "temperature": Temperature, "isotonic": Isotonic}
_NAMES = {
    "none": "none",
    "platt": "Platt scaling of the logit",
    "temperature": "temperature scaling of the logit",
    "isotonic": "isotonic regression on the logit",
}


def calibrator_to_dict(calibrator: Calibrator) -> dict[str, Any]:
    """{"kind": ..., and the calibrator's fields}: plain JSON."""
    (kind,) = (name for name, cls in KINDS.items() if type(calibrator) is cls)
    return {"kind": kind} | to_dict(calibrator)


def calibrator_from_dict(values: Mapping[str, Any]) -> Calibrator:
    """What `calibrator_to_dict` wrote, or the report of `fit_calibrator`; {} is the identity.

    Raises UserError for an unknown kind.
    """
    check_choice("kind of calibration", kind := values.get("kind", "platt"), KINDS)
    names = [field.name for field in fields(KINDS[kind])]
    return from_dict(KINDS[kind], {name: values[name] for name in names if name in values})


def fit_calibrator(
    method: Method, scores: np.ndarray, targets: np.ndarray, patients: np.ndarray
) -> tuple[Calibrator, dict[str, Any]]:
    """The calibration of scores outside the test set, if it helps on patients it was not fitted on, else the identity.

    Args:
        scores: (N,) probabilities of the positive class in [0, 1]. targets: (N,) of {0, 1}.
        patients: (N,) who each image is of: no patient is in two folds.

    Returns:
        The calibrator, fitted on all N, and a report: method, applied, reason, what `calibrator_to_dict` says (and
        `calibrator_from_dict` reads); before and after: {nll, brier, ece} of the scores as they are and of scores
        calibrated by cross-fitting, each by a fit on the other folds, so that "after" is no figure of the fit's own
        data; folds, images, patients. It is applied when the cross-fitted negative log-likelihood is lower than before.

    Raises:
        UserError: an unknown method; as `binary_metrics`.
    """
    check_choice("calibration", method, get_args(Method))
    logits, targets = logit_of(scores), np.asarray(targets, np.float64)
    before, after = probability_figures(scores, targets), np.full(len(logits), np.nan)
    folds = [] if method == "none" else list(patient_folds(targets, patients))
    for kept, held_out in folds:
        after[held_out] = KINDS[method].fit(logits[kept], targets[kept])(logits[held_out])
    report = {"method": _NAMES[method], "images": len(logits), "patients": len(np.unique(patients))}
    report |= {"folds": len(folds), "before": before} | (
        {"after": probability_figures(after, targets)} if folds else {}
    )
    applied = bool(folds) and report["after"]["nll"] < before["nll"]
    if applied:
        reason = "out of fold, calibration lowered the negative log-likelihood"
    elif folds:
        reason = "out of fold, calibration did not lower the negative log-likelihood"
    elif method == "none":
        reason = "no calibration was asked for"
    else:
        reason = "fewer than two patients of each class: nothing to check a calibration on"
    found = KINDS[method].fit(logits, targets) if applied else Calibration()
    return found, report | {"applied": applied, "reason": reason} | calibrator_to_dict(found)


def _smoothed(targets: np.ndarray) -> np.ndarray:
    """Platt's targets: (P + 1) / (P + 2) for each of the P positives, 1 / (N + 2) for each of the N negatives."""
    positive, negative = targets.sum(), (1 - targets).sum()
    return np.where(targets == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))


def _extremes(logits: np.ndarray, counts: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R,) lowest and (R,) highest logit among the cases `inside` (N,) that each resample holds; inf, -inf of none."""
    held = (counts > 0) & inside
    return np.where(held, logits, np.inf).min(axis=1), np.where(held, logits, -np.inf).max(axis=1)


def _logistic(columns: np.ndarray, offset: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R, K) coefficients of R logistic regressions on columns (N, K), the N cases weighed by counts (R, N).

    Newton's method; a step is halved until the likelihood does not fall. A finite solution must exist.
    """
    from scipy.special import expit

    num = columns.shape[1]
    products = (columns[:, :, None] * columns[:, None, :]).reshape(len(columns), -1)

    def predictor(beta: np.ndarray) -> np.ndarray:
        return np.einsum("rk,nk->rn", beta, columns) + offset

    def loss(beta: np.ndarray) -> np.ndarray:
        z = predictor(beta)
        return np.einsum("rn,rn->r", counts, np.logaddexp(0, z) - targets * z)

    beta = np.zeros((len(counts), num))
    for _ in range(_MAX_STEPS):
        value, p = loss(beta), expit(predictor(beta))
        gradient = np.einsum("rn,nk->rk", counts * (p - targets), columns)
        hessian = np.einsum("rn,nk->rk", counts * p * (1 - p), products).reshape(-1, num, num)
        step = np.linalg.solve(hessian + 1e-12 * np.eye(num), gradient[..., None])[..., 0]
        for _ in range(_MAX_HALVINGS):
            worse = loss(beta - step) > value + 1e-12 * np.abs(value)
            if not worse.any():
                break
            step[worse] /= 2
        beta -= step
        if np.abs(step).max(initial=0) < 1e-9:
            break
    return beta
