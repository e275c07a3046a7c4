"""Whether the finalists of a sweep beat the default configuration by more than seeds and patients scatter.

Finalists and default are trained on the same fresh seeds (and so on the same encoders) and compared seed by seed over
the same rows. As readers and cases are in a multi-reader multi-case study of diagnostic images, seeds and patients are
both samples, and the procedure is the one of such studies (Obuchowski and Rockette, Commun Stat Simul 24, 1995, with
the degrees of freedom of Hillis, Stat Med 26, 2007). With d_s the difference of a metric under seed s of S,

    V = var_s(d_s) / S + max(C, 0),     C = mean over s != s' of cov(d_s, d_s')
    t = mean_s(d_s) / sqrt(V),          (S - 1) (V / (var_s(d_s) / S))^2 degrees of freedom, p two-sided

where var_s is seen over the seeds, and the covariance, what the seeds have in common because they share patients, over
resamples of patients, so that any metric will do. t allows for how little five seeds say of their own variance, which
a percentile interval does not (of seeds alone, it misses the truth three times as often as it says), and C for there
being only these patients, which a t-test over seeds does not. Every finalist keeps its own variance, since one
configuration may scatter more than another. Holm's correction (Scand J Stat 6, 1979) holds the chance of any false
"above" below 1 - level, for all finalists together.

The interval is that of the two-level bootstrap (`raymed.metrics.bootstrap`), stretched about the mean to the width that
t gives: it keeps the skew of the bootstrap, covers as often as it says with five seeds, and holds 0 where p before
correction is above 1 - level (but for one case in a hundred, where it is skewed).

None of this knows how the finalists were chosen. Validation patients who took part in the choice flatter what was
chosen; the test split decides.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from raymed.config import UserError, check_choice
from raymed.metrics.bootstrap import (
    CHUNK,
    Figure,
    Prediction,
    draw_counts,
    evaluate_counts,
    figure_of,
    groups_of,
    statistics_of,
)

MIN_SEEDS = 5
LABELS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy_at_0.5": "accuracy at 0.5",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
}
LOWER_IS_BETTER = frozenset({"brier", "ece"})

Conclusion = Literal["above seed noise", "not above seed noise", "cannot tell"]


class Verdict(TypedDict):
    """What is concluded of one finalist."""

    difference: Figure  # metric of the finalist minus that of the default, whichever is better
    p: float  # two-sided, of no difference; nan for one seed
    p_holm: float  # corrected for the number of finalists
    verdict: Conclusion
    sentence: str  # all of this in words


def judge(
    finalists: Mapping[str, Sequence[Prediction]],
    default: Sequence[Prediction],
    metric: str,
    *,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Verdict]:
    """Judge every finalist on one split.

    A finalist is "above seed noise" if it is better than the default (higher; of brier and ece lower) and p_holm is at
    most 1 - level, else "not above seed noise"; with fewer than MIN_SEEDS seeds it is "cannot tell", whatever p.

    Args:
        finalists, default: a prediction a seed, the same seeds in the same order, over the same rows.
        metric: one of LABELS.
        n_boot, seed: resamples, and what draws them.
        level: coverage of the interval (before Holm's correction).

    Raises UserError for another metric, for finalists without the default's seeds or rows, and where the metric is
    undefined (no positive, say) in a seed, or in all resamples of the patients.
    """
    check_choice("metric", metric, LABELS)
    groups, unit = groups_of(default)
    num_units = len(np.unique(np.concatenate(groups)))
    num_patients = num_units if unit == "patient" else None
    baseline = _resample("the default", default, groups, metric, n_boot, seed)
    figures, p = {}, {}
    for name, predictions in finalists.items():
        _check_pairs(name, predictions, default)
        resampled = _resample(name, predictions, groups, metric, n_boot, seed)
        figures[name], p[name] = _compare(resampled - baseline, seed, level, num_patients=num_patients, unit=unit)
    verdicts = {}
    for name, p_holm in zip(finalists, holm(list(p.values())), strict=True):
        verdict = _conclude(metric, figures[name], p_holm, level)
        tested = _tested(figures[name], f"{num_units} {unit}s", p_holm, len(finalists), verdict, level)
        sentence = f"{name} has {_relation(metric, figures[name]['mean'])} ({tested}): {verdict}."
        verdicts[name] = Verdict(difference=figures[name], p=p[name], p_holm=p_holm, verdict=verdict, sentence=sentence)
    return verdicts


def overall(
    validation: Mapping[str, Verdict],
    test: Mapping[str, Verdict],
    chosen: str,
    *,
    num_configurations: int,
    num_openings: int,
) -> str:
    """What a sweep found, in a few plain sentences: the chosen finalist on validation and on test, and the counts.

    Args:
        validation, test: what `judge` says of each split; chosen: the finalist that was best on validation.
        num_configurations: tried in the search.
        num_openings: how often figures of this test split have been looked at, this time included.
    """
    tried = "1 configuration was" if num_configurations == 1 else f"{num_configurations} configurations were"
    opened = "once" if num_openings == 1 else f"{num_openings} times"
    return (
        f"On test, {test[chosen]['sentence']} On validation, {validation[chosen]['sentence']} Validation took part in "
        f"choosing {chosen} and flatters it: the test split decides. {tried} tried; this test split has been opened "
        f"{opened}."
    )


def best_finalist(verdicts: Mapping[str, Verdict], metric: str) -> str:
    """The finalist with the best mean of the metric; the earliest of equals."""
    return max(verdicts, key=lambda name: _gain(metric, verdicts[name]["difference"]["mean"]))


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's step-down method, in the order given; nan if any is."""
    ordered = np.argsort(p)
    corrected = np.empty(len(p))
    corrected[ordered] = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected.tolist()


def _resample(
    name: str, predictions: Sequence[Prediction], groups: list[np.ndarray], metric: str, n_boot: int, seed: int
) -> np.ndarray:
    """(1 + n_boot, S): the metric under each seed, of the patients as they are in row 0, resampled in the others.

    Who is drawn depends on the groups and the seed alone: configurations resampled alike are paired.
    """
    statistics = statistics_of(predictions)
    patients, patient_of_row = np.unique(np.concatenate(groups), return_inverse=True)
    rows = np.split(patient_of_row, np.cumsum([len(group) for group in groups])[:-1])
    observed = evaluate_counts(statistics, rows, np.ones((1, len(patients))))[metric]
    for number in np.flatnonzero(np.isnan(observed[0])):
        raise UserError(
            f"{LABELS[metric]} of {name} is undefined under seed {number + 1} of {len(rows)}: its "
            f"{len(rows[number])} rows must hold positives and negatives"
        )
    random = np.random.default_rng(seed)
    chunk = max(1, CHUNK // max(len(patients), *map(len, rows)))
    sizes = [min(chunk, n_boot - start) for start in range(0, n_boot, chunk)]
    resampled = [evaluate_counts(statistics, rows, draw_counts(random, size, len(patients)))[metric] for size in sizes]
    return np.concatenate([observed, *resampled])


def _compare(differences: np.ndarray, seed: int, level: float, **of_rows: Any) -> tuple[Figure, float]:
    """Figure, completed by of_rows, and p-value of differences (1 + n_boot, S) as `_resample` has them."""
    observed, resampled = differences[0], differences[1:]
    drawn_seeds = np.random.default_rng((seed, 1)).integers(len(observed), size=resampled.shape)
    both_levels = np.take_along_axis(resampled, drawn_seeds, axis=1).mean(axis=1)
    defined = ~np.isnan(resampled).any(axis=1)
    if defined.sum() < 2:
        raise UserError("the metric is undefined in all resamples of the patients: there are too few of them")
    p, reach = _test(observed, resampled[defined], level)
    return Figure(**_stretched(figure_of(observed, both_levels, level), 2 * reach), **of_rows), p


def _test(observed: np.ndarray, resampled: np.ndarray, level: float) -> tuple[float, float]:
    """(p, how far the interval reaches to either side) of differences (S,) and (R, S); see the top of the file."""
    from scipy import stats

    num_seeds, mean = len(observed), observed.mean()
    if num_seeds == 1:
        return math.nan, math.nan
    covariance = np.cov(resampled, rowvar=False)
    by_seeds = observed.var(ddof=1) / num_seeds
    by_patients = (covariance.sum() - np.trace(covariance)) / (num_seeds * (num_seeds - 1))
    variance = by_seeds + max(by_patients, 0.0)
    if variance == 0:
        return float(mean == 0), 0.0
    freedom = (num_seeds - 1) * (variance / by_seeds) ** 2 if by_seeds else math.inf
    error = math.sqrt(variance)
    p = 2 * stats.t.sf(abs(mean) / error, freedom)
    return float(p), float(stats.t.ppf((1 + level) / 2, freedom) * error)


def _stretched(figure: dict[str, Any], width: float) -> dict[str, Any]:
    """The figure with an interval of that width, as skewed about the mean as before; nan or 0 leave it as it is."""
    mean, low, high = figure["mean"], figure["ci_low"], figure["ci_high"]
    if not (width > 0 and high > low):
        return figure
    factor = width / (high - low)
    return figure | {"ci_low": mean - factor * (mean - low), "ci_high": mean + factor * (high - mean)}


def _gain(metric: str, difference: float) -> float:
    """The difference, positive where it is for the better."""
    return -difference if metric in LOWER_IS_BETTER else difference


def _conclude(metric: str, figure: Figure, p_holm: float, level: float) -> Conclusion:
    if figure["n"] < MIN_SEEDS:
        return "cannot tell"
    above = _gain(metric, figure["mean"]) > 0 and p_holm <= 1 - level
    return "above seed noise" if above else "not above seed noise"


def _relation(metric: str, difference: float) -> str:
    if difference == 0:
        return f"the same {LABELS[metric]} as the default"
    better = " (lower is better)" if metric in LOWER_IS_BETTER else ""
    return (
        f"a {abs(difference):.4f} {'higher' if difference > 0 else 'lower'} {LABELS[metric]} than the default{better}"
    )


def _tested(figure: Figure, units: str, p_holm: float, num_finalists: int, verdict: Conclusion, level: float) -> str:
    """Interval, what it is over, and how sure that is."""
    seeds = "1 seed" if figure["n"] == 1 else f"{figure['n']} seeds"
    text = f"{level * 100:g} % interval {figure['ci_low']:+.4f} to {figure['ci_high']:+.4f}, {seeds}, {units}, "
    if verdict == "cannot tell":
        return text + f"at least {MIN_SEEDS} seeds are needed"
    corrected = f" after correction for {num_finalists} finalists" if num_finalists > 1 else ""
    return text + (f"p = {p_holm:.3f}" if p_holm >= 0.001 else "p < 0.001") + corrected


def _check_pairs(name: str, predictions: Sequence[Prediction], default: Sequence[Prediction]) -> None:
    if len(predictions) != len(default):
        raise UserError(
            f"{name} was trained on {len(predictions)} seeds and the default on {len(default)}: they are compared seed "
            "by seed, train both on the same seeds"
        )
    for number, (ours, theirs) in enumerate(zip(predictions, default, strict=True), start=1):
        if not np.array_equal(ours[1], theirs[1]):
            raise UserError(f"{name} and the default were not scored on the same rows under seed {number}")
