"""Decision curve analysis: whether acting on a model's probabilities does more good than treating all or none.

Whoever acts at a probability of t or more says that a false positive is worth t / (1 - t) of a true positive. With the
proportions of true and false positives among all N cases,

    net benefit(t) = TP / N - FP / N * t / (1 - t)

in true positives a case. Treating all has p - (1 - p) t / (1 - t), with p the fraction of positives; treating none has
0. A model is of use at t where it has more than both. It acts on what the probabilities say, so they are to be
calibrated ones.

Source: Vickers and Elkin, Med Decis Making 26, 2006; Vickers et al., BMJ 352:i6, 2016.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raymed.config import UserError, check_range
from raymed.metrics.bootstrap import bootstrap_ci
from raymed.metrics.classification import Statistic, binary_metrics

THRESHOLDS = tuple(t / 100 for t in range(1, 100))


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit at T threshold probabilities, each (T,) float64, with intervals by patient.

    thresholds. model, treat_all: net benefits; that of treating none is 0. gain: of the model over the better of
    treating all and treating none. NAME_low, NAME_high: ends of the interval; of the gain, the interval of the paired
    difference.
    """

    thresholds: np.ndarray
    model: np.ndarray
    model_low: np.ndarray
    model_high: np.ndarray
    treat_all: np.ndarray
    treat_all_low: np.ndarray
    treat_all_high: np.ndarray
    gain: np.ndarray
    gain_low: np.ndarray
    gain_high: np.ndarray


def decision_curve(
    probabilities: ArrayLike,
    targets: ArrayLike,
    patients: np.ndarray,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    prevalence: float | None = None,
    **options: Any,
) -> DecisionCurve:
    """The decision curve of a model.

    Args:
        probabilities: (N,) calibrated, in [0, 1]; a case is acted on when probability >= threshold.
        targets: (N,) of {0, 1}. patients: (N,) whose each case is.
        thresholds: (T,) in (0, 1).
        prevalence: as `net_benefit_statistic`.
        options: n_boot, seed, level, unit of `bootstrap_ci`.

    Raises:
        UserError: as `binary_metrics`; a threshold or the prevalence outside (0, 1).
    """
    statistic = net_benefit_statistic(probabilities, targets, thresholds, prevalence=prevalence)
    figures = bootstrap_ci([statistic], [patients], **options)
    columns = {"thresholds": np.asarray(thresholds, np.float64)}
    for name in ("model", "treat_all", "gain"):
        of_name = [figures[f"{name}/{t:g}"] for t in thresholds]
        for key, suffix in (("mean", ""), ("ci_low", "_low"), ("ci_high", "_high")):
            columns[name + suffix] = np.array([figure[key] for figure in of_name])
    return DecisionCurve(**columns)


def net_benefit_statistic(
    probabilities: ArrayLike, targets: ArrayLike, thresholds: Sequence[float], *, prevalence: float | None = None
) -> Statistic:
    """model/T, treat_all/T and gain/T of every threshold T, for `bootstrap_ci`.

    Args:
        prevalence: of where the model is to be used, in (0, 1), if that is not the fraction of positives in the data
            (cases and controls chosen apart): net benefit is then sensitivity p - (1 - specificity) (1 - p) t / (1 -
            t), and nan where a class does not occur.

    Raises:
        UserError: as `decision_curve`.
    """
    binary_metrics(probabilities, targets, 0.5)  # refuses what cannot be used
    if not len(thresholds):
        raise UserError("a decision curve needs at least one threshold, got none")
    grid = np.asarray(thresholds, np.float64)
    check_range("threshold", grid, 0, 1, low_open=True, high_open=True)
    if prevalence is not None:
        check_range("prevalence", prevalence, 0, 1, low_open=True, high_open=True)
    positive = np.asarray(targets, np.float64)
    treated = (np.asarray(probabilities, np.float64)[:, None] >= grid).astype(np.float64)
    cost = (grid / (1 - grid))[:, None]

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        num_positive, num_negative = np.einsum("rn,n->r", counts, positive), np.einsum("rn,n->r", counts, 1 - positive)
        tp = np.einsum("rn,nt->tr", counts * positive, treated)
        fp = np.einsum("rn,nt->tr", counts * (1 - positive), treated)
        with np.errstate(invalid="ignore"):  # 0 / 0 is nan
            p = num_positive / (num_positive + num_negative)
            if prevalence is None:
                found = (tp - fp * cost) / (num_positive + num_negative)
            else:
                found = tp / num_positive * prevalence - fp / num_negative * (1 - prevalence) * cost
                p = np.full_like(p, prevalence)
        treat_all = p - (1 - p) * cost
        columns = {"model": found, "treat_all": treat_all, "gain": found - np.maximum(treat_all, 0)}
        return {f"{name}/{t:g}": row for name, rows in columns.items() for t, row in zip(thresholds, rows, strict=True)}

    return statistic
