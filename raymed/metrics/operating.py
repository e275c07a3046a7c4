"""Where a classifier decides, and what its decisions are worth: the figures of a diagnostic accuracy study.

An operating point is a rule ("youden", or sensitivity of at least 0.95) that `choose` turns into a threshold, on scores
outside the test set. `decision_figures` says what decisions come to, whoever made them: a model at its threshold or a
reader. Two intervals stand beside each other. That of the bootstrap (`raymed.metrics.bootstrap`) draws patients, and so
knows that units of one patient are not independent; the analytic one takes every unit for independent, but holds for
few of them and at 0 % and 100 %, where no resample differs. With one unit a patient the analytic one is to be quoted,
with several the wider.

Sources: Wilson, J Am Stat Assoc 22, 1927 (proportions; recommended by Newcombe, Stat Med 17, 1998); Simel et al.,
J Clin Epidemiol 44, 1991 (log method for likelihood ratios); Deeks and Altman, BMJ 329, 2004 (from a likelihood ratio
to a probability).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, TypedDict, cast, get_args

import numpy as np
from numpy.typing import ArrayLike

from raymed.config import UserError, check_choice, check_range
from raymed.metrics.bootstrap import Figure, bootstrap_ci
from raymed.metrics.classification import Statistic, binary_metrics, tune_threshold

Criterion = Literal["youden", "f1", "accuracy", "sensitivity", "specificity"]


@dataclass(frozen=True)
class OperatingPoint:
    """The rule that a decision threshold follows.

    criterion: "youden", "f1" and "accuracy" are made as large as can be. "sensitivity" and "specificity" are made at
    least `at_least`, in (0, 1], and then the other one as large as can be.
    """

    criterion: Criterion = "youden"
    at_least: float | None = None

    def __post_init__(self) -> None:
        check_choice("operating_point", self.criterion, get_args(Criterion))
        fixed = self.criterion in ("sensitivity", "specificity")
        if fixed and self.at_least is None:
            raise UserError(f"operating_point {self.criterion} needs a value, as in {self.criterion}=0.95")
        if not fixed and self.at_least is not None:
            raise UserError(f"operating_point {self.criterion} is made as large as can be and takes no value")
        if self.at_least is not None:
            check_range(f"operating_point {self.criterion}", self.at_least, 0, 1, low_open=True)

    def __str__(self) -> str:
        """As `parse` reads it."""
        return self.criterion if self.at_least is None else f"{self.criterion}={self.at_least:g}"

    @classmethod
    def parse(cls, rule: "str | Mapping[str, float] | OperatingPoint") -> "OperatingPoint":
        """The rule of "youden", "sensitivity=0.95" or {"sensitivity": 0.95}. Raises UserError for anything else."""
        if isinstance(rule, OperatingPoint):
            return rule
        if isinstance(rule, str):
            criterion, _, value = rule.partition("=")
        elif len(rule) == 1:
            ((criterion, value),) = rule.items()
        else:
            raise UserError(f"operating_point must be one rule, such as {{'sensitivity': 0.95}}, got {dict(rule)}")
        try:
            return cls(criterion.strip(), None if value == "" else float(value))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"operating_point {criterion} must be a number between 0 and 1, got {value!r}") from error


class Chosen(TypedDict):
    """A threshold, and what it comes to on the scores it was chosen on."""

    threshold: float  # positive when score >= threshold
    criterion: str  # the rule, as `OperatingPoint.parse` reads it
    met: bool  # False: no threshold in [0, 1] gives the specificity that was asked for, since negatives score 1.0
    sensitivity: float
    specificity: float


def choose(scores: ArrayLike, targets: ArrayLike, rule: str | Mapping[str, float] | OperatingPoint) -> Chosen:
    """The threshold in [0, 1] that follows the rule.

    Sensitivity and specificity are constant between two neighbouring scores. Of the gaps that fulfil the rule one is
    best; the threshold is its midpoint, as far as can be from the scores it separates (see `tune_threshold`).

    Args:
        scores: (N,) probabilities of the positive class in [0, 1], of units outside the test set.
        targets: (N,) of {0, 1}; both must occur.

    Raises:
        UserError: as `tune_threshold`; a rule that is none.
    """
    rule = OperatingPoint.parse(rule)
    if rule.criterion in ("youden", "f1", "accuracy"):
        threshold = tune_threshold(scores, targets, rule.criterion)
    else:
        tune_threshold(scores, targets)  # refuses what cannot be used
        assert rule.at_least is not None
        threshold = _threshold_at(np.asarray(scores, np.float64), np.asarray(targets), rule.criterion, rule.at_least)
    reached = binary_metrics(scores, targets, threshold)
    return {
        "threshold": threshold,
        "criterion": str(rule),
        "met": rule.at_least is None or reached[rule.criterion] >= rule.at_least - 1e-9,
        "sensitivity": reached["sensitivity"],
        "specificity": reached["specificity"],
    }


def _threshold_at(scores: np.ndarray, targets: np.ndarray, criterion: str, at_least: float) -> float:
    """The midpoint of the gap where the criterion is at least so high and the other rate highest."""
    positive, negative = np.sort(scores[targets == 1]), np.sort(scores[targets == 0])
    distinct = np.unique(scores)
    low, high = np.append(0.0, distinct), np.append(distinct, 1.0)
    if distinct[-1] == 1.0:  # no threshold in [0, 1] decides a score of 1 negative
        low, high = low[:-1], high[:-1]
    sensitivity = 1 - np.searchsorted(positive, high, "left") / len(positive)
    specificity = np.searchsorted(negative, high, "left") / len(negative)
    asked, other = (sensitivity, specificity) if criterion == "sensitivity" else (specificity, sensitivity)
    # Of gaps with the same other rate the one with more of what was asked for.
    best = int(np.lexsort((asked, np.where(asked >= at_least - 1e-9, other, -1.0)))[-1])
    midpoint = (low[best] + high[best]) / 2
    return float(midpoint if midpoint > low[best] else high[best])


class DecisionFigure(Figure):
    """A figure of decisions: the observed value (`mean`) with the bootstrap's interval (ci_low, ci_high), and beside it
    the analytic one of independent units."""

    count: int | None  # e.g. positives decided positive; None of likelihood ratios and what follows from them
    total: int | None  # e.g. positives
    analytic_low: float
    analytic_high: float
    method: Literal["Wilson", "log"]
    independent: bool  # no patient has two rows: the analytic interval is the one to quote


def decision_figures(
    decided: ArrayLike,
    targets: ArrayLike,
    patients: np.ndarray,
    *,
    prevalences: Sequence[float] = (),
    level: float = 0.95,
    **options: Any,
) -> dict[str, DecisionFigure]:
    """What decisions come to against the reference standard. With TP, FN, FP, TN units,

        sensitivity = TP / (TP + FN)    ppv = TP / (TP + FP)    lr_positive = sensitivity / (1 - specificity)
        specificity = TN / (TN + FP)    npv = TN / (TN + FN)    lr_negative = (1 - sensitivity) / specificity
        accuracy = (TP + TN) / N

    and, where a prevalence p other than that of the data is stated, by Bayes

        ppv_at_p = sensitivity p / (sensitivity p + (1 - specificity) (1 - p))
        npv_at_p = specificity (1 - p) / (specificity (1 - p) + (1 - sensitivity) p)

    Args:
        decided: (N,) bool, decided positive: score >= threshold. targets: (N,) of {0, 1}.
        patients: (N,) whose each unit is.
        prevalences: in (0, 1); named as they print, "ppv_at_0.05".
        level: coverage of both intervals. options: n_boot, seed, unit of `bootstrap_ci`.

    Returns:
        A figure of each name. nan where undefined (no positive, say); lr_positive is infinite where there is no false
        positive, lr_negative where there is no true negative. Where a cell is 0 the finite ends of the log interval are
        those of the table with 0.5 added to every cell. Intervals of predictive values at a prevalence are those of the
        likelihood ratios, taken through Bayes.

    Raises:
        UserError: arrays of different lengths; a target neither 0 nor 1; a prevalence outside (0, 1).
    """
    decided, targets = _checked(decided, targets)
    figures = bootstrap_ci([decision_statistic(decided, targets, prevalences)], [patients], level=level, **options)
    figures |= _likelihood_ratios(decided, targets, patients, level, options)
    tp, fn, fp, tn = confusion(decided, targets).values()
    counts = {
        "sensitivity": (tp, tp + fn),
        "specificity": (tn, tn + fp),
        "ppv": (tp, tp + fp),
        "npv": (tn, tn + fn),
        "accuracy": (tp + tn, len(targets)),
    }
    ratios = {
        "lr_positive": ratio_interval(tp, tp + fn, fp, fp + tn, level),
        "lr_negative": ratio_interval(fn, tp + fn, tn, fp + tn, level),
    }
    for p in prevalences:
        (low, high), (negative_low, negative_high) = ratios["lr_positive"], ratios["lr_negative"]
        ratios[f"ppv_at_{p:g}"] = _posterior(p, low), _posterior(p, high)
        ratios[f"npv_at_{p:g}"] = 1 - _posterior(p, negative_high), 1 - _posterior(p, negative_low)
    found = {
        name: _with_interval(figures[name], *wilson(count, total, level), "Wilson", count, total)
        for name, (count, total) in counts.items()
    } | {name: _with_interval(figures[name], *interval, "log") for name, interval in ratios.items()}
    independent = len(np.unique(patients)) == len(patients)
    return {name: cast(DecisionFigure, {**figure, "independent": independent}) for name, figure in found.items()}


def decision_statistic(decided: ArrayLike, targets: ArrayLike, prevalences: Sequence[float] = ()) -> Statistic:
    """`decision_figures` as a function of row counts. An infinite likelihood ratio is nan here."""
    decided, targets = _checked(decided, targets)
    for prevalence in prevalences:
        check_range("prevalence", prevalence, 0, 1, low_open=True, high_open=True)
    cells = _cells(decided, targets)

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        tp, fn, fp, tn = np.einsum("rn,nk->kr", counts, cells)
        sensitivity, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
        values = {
            "sensitivity": sensitivity,
            "specificity": specificity,
            "ppv": _ratio(tp, tp + fp),
            "npv": _ratio(tn, tn + fn),
            "accuracy": _ratio(tp + tn, tp + fn + fp + tn),
            "lr_positive": _ratio(tp * (fp + tn), fp * (tp + fn)),
            "lr_negative": _ratio(fn * (fp + tn), tn * (tp + fn)),
        }
        for p in prevalences:
            values[f"ppv_at_{p:g}"], values[f"npv_at_{p:g}"] = at_prevalence(sensitivity, specificity, p)
        return values

    return statistic


def at_prevalence(
    sensitivity: ArrayLike, specificity: ArrayLike, prevalence: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """(PPV, NPV) by Bayes, of numbers or arrays that broadcast; nan where no decision of the kind is ever made."""
    sensitivity, specificity, prevalence = (np.asarray(x, np.float64) for x in (sensitivity, specificity, prevalence))
    tp, fn = sensitivity * prevalence, (1 - sensitivity) * prevalence
    tn, fp = specificity * (1 - prevalence), (1 - specificity) * (1 - prevalence)
    return _ratio(tp, tp + fp), _ratio(tn, tn + fn)


def fixed_rate_statistic(
    scores: ArrayLike,
    targets: ArrayLike,
    specificities: Sequence[float] = (0.9, 0.95),
    sensitivities: Sequence[float] = (0.9, 0.95),
) -> Statistic:
    """The highest sensitivity of a threshold whose specificity is at least so much, and the reverse.

    "sensitivity_at_specificity_0.9" and "specificity_at_sensitivity_0.9" are read off the steps of each resample's own
    ROC curve, without interpolation. They say how well the scores rank: their threshold is the best for these very
    cases, and one that is chosen before (`choose`) does worse.

    Args:
        scores: (N,) in [0, 1]. targets: (N,) of {0, 1}. Raises UserError as `binary_metrics`.
    """
    binary_metrics(scores, targets, 0.5)  # refuses what cannot be used
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets, np.float64)
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.flatnonzero(np.diff(scores[order], append=-1.0))

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        counts = np.take(counts, order, axis=1)
        # Before the first score nothing is decided positive.
        tp = np.pad(np.cumsum(counts * targets[order], axis=1)[:, last_of_tie], ((0, 0), (1, 0)))
        fp = np.pad(np.cumsum(counts * (1 - targets[order]), axis=1)[:, last_of_tie], ((0, 0), (1, 0)))
        positive, negative = tp[:, -1:], fp[:, -1:]
        values = {}
        for rate in specificities:
            best = np.where(fp <= (1 - rate) * negative + 1e-9, tp, 0).max(axis=1)
            values[f"sensitivity_at_specificity_{rate:g}"] = np.where(negative[:, 0], _ratio(best, tp[:, -1]), np.nan)
        for rate in sensitivities:
            best = negative[:, 0] - np.where(tp >= rate * positive - 1e-9, fp, negative).min(axis=1)
            values[f"specificity_at_sensitivity_{rate:g}"] = np.where(positive[:, 0], _ratio(best, fp[:, -1]), np.nan)
        return values

    return statistic


def confusion(decided: ArrayLike, targets: ArrayLike) -> dict[str, int]:
    """{"tp", "fn", "fp", "tn"} of (N,) decisions and targets."""
    decided, targets = _checked(decided, targets)
    return {name: int(num) for name, num in zip(("tp", "fn", "fp", "tn"), _cells(decided, targets).sum(0), strict=True)}


def wilson(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (nan, nan) of none."""
    if not total:
        return math.nan, math.nan
    z, p = _z(level), count / total
    centre, half = p + z**2 / (2 * total), z * math.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2)
    low, high = (centre - half) / (1 + z**2 / total), (centre + half) / (1 + z**2 / total)
    return (0.0 if count == 0 else low), (1.0 if count == total else high)


def ratio_interval(a: int, num_a: int, b: int, num_b: int, level: float = 0.95) -> tuple[float, float]:
    """The log method's interval of (a / num_a) / (b / num_b): exp(log ratio -+ z sqrt(1/a - 1/num_a + 1/b - 1/num_b)).

    Where a or b is 0, or there is no other row, 0.5 is added to each cell; the end that is 0 or infinite stays so.
    (nan, nan) where the ratio is undefined.
    """
    if not num_a or not num_b or not (a or b):
        return math.nan, math.nan
    add = 0.5 if not a or not b or (a == num_a and b == num_b) else 0.0
    x, num_x, y, num_y = a + add, num_a + 2 * add, b + add, num_b + 2 * add
    centre = math.log(x / num_x) - math.log(y / num_y)
    half = _z(level) * math.sqrt(1 / x - 1 / num_x + 1 / y - 1 / num_y)
    return (math.exp(centre - half) if a else 0.0), (math.exp(centre + half) if b else math.inf)


def _likelihood_ratios(
    decided: np.ndarray, targets: np.ndarray, patients: np.ndarray, level: float, options: Mapping[str, Any]
) -> dict[str, Figure]:
    """lr_positive and lr_negative by way of the share a / (a + b) of a ratio a / b, which is defined also in resamples
    where the ratio is infinite: left out, they would make an interval too narrow."""
    cells = _cells(decided, targets)

    def parts(counts: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        tp, fn, fp, tn = np.einsum("rn,nk->kr", counts, cells)
        return {
            "lr_positive": (tp * (fp + tn), fp * (tp + fn)),
            "lr_negative": (fn * (fp + tn), tn * (tp + fn)),
        }

    def shares(counts: np.ndarray) -> dict[str, np.ndarray]:
        return {name: _ratio(a, a + b) for name, (a, b) in parts(counts).items()}

    found = bootstrap_ci([shares], [patients], level=level, **options)
    for name, (a, b) in parts(np.ones((1, len(cells)))).items():
        figure = found[name]
        figure["mean"] = _divided(a.item(), b.item())
        for end in ("ci_low", "ci_high"):
            figure[end] = _divided(figure[end], 1 - figure[end])
    return found


def _with_interval(
    figure: Figure, low: float, high: float, method: str, count: int | None = None, total: int | None = None
) -> DecisionFigure:
    more = {"count": count, "total": total, "analytic_low": low, "analytic_high": high, "method": method}
    return cast(DecisionFigure, {**figure, **more})


def _posterior(prevalence: float, likelihood_ratio: float) -> float:
    """The probability after a test, from that before it: odds times likelihood ratio."""
    odds = prevalence / (1 - prevalence) * likelihood_ratio
    return 1.0 if odds == math.inf else odds / (1 + odds)


def _cells(decided: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(N, 4) float64: is a true positive, false negative, false positive, true negative."""
    positive = targets == 1
    return np.column_stack([decided & positive, ~decided & positive, decided & ~positive, ~decided & ~positive]).astype(
        np.float64
    )


def _checked(decided: ArrayLike, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bool and (N,) int64, or UserError."""
    decided, targets = np.asarray(decided), np.asarray(targets)
    if decided.shape != targets.shape or decided.ndim != 1:
        raise UserError(f"decisions and targets must both be (N,), got {decided.shape} and {targets.shape}")
    for name, values in (("decisions", decided), ("targets", targets)):
        if wrong := set(np.unique(values).tolist()) - {0, 1}:
            raise UserError(f"{name} must be 0 or 1, got {min(wrong):g}")
    return decided.astype(bool), targets.astype(np.int64)


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _divided(numerator: float, denominator: float) -> float:
    """numerator / denominator of two that are not negative: infinite over 0, nan where both are."""
    if denominator:
        return float(numerator / denominator)
    return math.inf if numerator else math.nan


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), np.nan), where=denominator > 0)
