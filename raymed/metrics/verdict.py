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
from dataclasses import dataclass
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
from raymed.metrics.classification import Statistic

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
    """Judge every finalist among binary classifiers on one split: `judge_statistics` of `binary_metrics`.

    Args:
        finalists, default: a prediction a seed, the same seeds in the same order, over the same rows.
        metric: one of LABELS.
        n_boot, seed, level: as `judge_statistics`.

    Raises UserError for another metric, for finalists without the default's seeds or rows, and where the metric is
    undefined (no positive, say) in a seed, or in all resamples of the patients.
    """
    check_choice("metric", metric, LABELS)
    for name, predictions in finalists.items():
        _check_pairs(name, predictions, default)
    groups, unit = groups_of(default)
    return judge_statistics(
        {name: statistics_of(predictions) for name, predictions in finalists.items()},
        statistics_of(default),
        groups,
        metric,
        unit=unit,
        lower_is_better=metric in LOWER_IS_BETTER,
        n_boot=n_boot,
        seed=seed,
        level=level,
    )


def judge_statistics(
    finalists: Mapping[str, Sequence[Statistic]],
    default: Sequence[Statistic],
    groups: Sequence[np.ndarray],
    metric: str,
    *,
    unit: Literal["patient", "image"],
    label: str | None = None,
    lower_is_better: bool = False,
    baseline: str = "the default",
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Verdict]:
    """Judge every finalist on one split, by whatever statistic.

    A finalist is "above seed noise" if it is better than the default and p_holm is at most 1 - level, else "not above
    seed noise"; with fewer than MIN_SEEDS seeds it is "cannot tell", whatever p.

    Args:
        finalists, default: a statistic a seed, the same seeds in the same order, over the same rows.
        groups: one (N_s,) array a seed, as `bootstrap_ci` wants it: the patient (or image, see unit) of each row.
        metric: one that the statistics return; label: as a sentence names it, LABELS' unless given.
        lower_is_better: of the metric.
        baseline: what a sentence calls the default.
        n_boot, seed: resamples, and what draws them.
        level: coverage of the interval (before Holm's correction).

    Raises UserError for finalists without the default's seeds, and where the metric is undefined in a seed, or in all
    resamples of the patients.
    """
    label = label or LABELS.get(metric, metric.replace("_", " "))
    say = _Words(label, baseline, lower_is_better, level)
    num_units = len(np.unique(np.concatenate(groups)))
    num_patients = num_units if unit == "patient" else None
    theirs = _resample(baseline, default, groups, metric, label, n_boot, seed)
    figures, p = {}, {}
    for name, statistics in finalists.items():
        _check_seeds(name, len(statistics), baseline, len(default))
        ours = _resample(name, statistics, groups, metric, label, n_boot, seed)
        figures[name], p[name] = _compare(ours - theirs, seed, level, num_patients=num_patients, unit=unit)
    verdicts = {}
    for name, p_holm in zip(finalists, holm(list(p.values())), strict=True):
        verdict = _conclude(figures[name], p_holm, lower_is_better, level)
        sentence = say.sentence(name, figures[name], f"{num_units} {unit}s", p_holm, len(finalists), verdict)
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
    return max(verdicts, key=lambda name: _gain(verdicts[name]["difference"]["mean"], metric in LOWER_IS_BETTER))


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's step-down method, in the order given; nan if any is."""
    ordered = np.argsort(p)
    corrected = np.empty(len(p))
    corrected[ordered] = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)).clip(max=1)
    return corrected.tolist()


def _resample(
    name: str,
    statistics: Sequence[Statistic],
    groups: Sequence[np.ndarray],
    metric: str,
    label: str,
    n_boot: int,
    seed: int,
) -> np.ndarray:
    """(1 + n_boot, S): the metric under each seed, of the patients as they are in row 0, resampled in the others.

    Who is drawn depends on the groups and the seed alone: configurations resampled alike are paired.
    """
    patients, patient_of_row = np.unique(np.concatenate(groups), return_inverse=True)
    rows = np.split(patient_of_row, np.cumsum([len(group) for group in groups])[:-1])
    observed = evaluate_counts(statistics, rows, np.ones((1, len(patients))))[metric]
    for number in np.flatnonzero(np.isnan(observed[0])):
        raise UserError(
            f"{label} of {name} is undefined under seed {number + 1} of {len(rows)}: its {len(rows[number])} rows "
            "must hold what it is computed from, such as positives and negatives"
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


def _gain(difference: float, lower_is_better: bool) -> float:
    """The difference, positive where it is for the better."""
    return -difference if lower_is_better else difference


def _conclude(figure: Figure, p_holm: float, lower_is_better: bool, level: float) -> Conclusion:
    if figure["n"] < MIN_SEEDS:
        return "cannot tell"
    above = _gain(figure["mean"], lower_is_better) > 0 and p_holm <= 1 - level
    return "above seed noise" if above else "not above seed noise"


@dataclass(frozen=True)
class _Words:
    """How verdicts on one metric are said."""

    label: str
    baseline: str
    lower_is_better: bool
    level: float

    def sentence(
        self, name: str, figure: Figure, units: str, p_holm: float, num_finalists: int, verdict: Conclusion
    ) -> str:
        tested = self._tested(figure, units, p_holm, num_finalists, verdict)
        return f"{name} has {self._relation(figure['mean'])} ({tested}): {verdict}."

    def _relation(self, difference: float) -> str:
        if difference == 0:
            return f"the same {self.label} as {self.baseline}"
        better = " (lower is better)" if self.lower_is_better else ""
        how = "higher" if difference > 0 else "lower"
        return f"a {abs(difference):.4f} {how} {self.label} than {self.baseline}{better}"

    def _tested(self, figure: Figure, units: str, p_holm: float, num_finalists: int, verdict: Conclusion) -> str:
        """Interval, what it is over, and how sure that is."""
        seeds = "1 seed" if figure["n"] == 1 else f"{figure['n']} seeds"
        interval = f"{figure['ci_low']:+.4f} to {figure['ci_high']:+.4f}"
        text = f"{self.level * 100:g} % interval {interval}, {seeds}, {units}, "
        if verdict == "cannot tell":
            return text + f"at least {MIN_SEEDS} seeds are needed"
        corrected = f" after correction for {num_finalists} finalists" if num_finalists > 1 else ""
        return text + (f"p = {p_holm:.3f}" if p_holm >= 0.001 else "p < 0.001") + corrected


def _check_seeds(name: str, ours: int, baseline: str, theirs: int) -> None:
    if ours != theirs:
        raise UserError(
            f"{name} was trained on {ours} seeds and {baseline} on {theirs}: they are compared seed by seed, train "
            "both on the same seeds"
        )


def _check_pairs(name: str, predictions: Sequence[Prediction], default: Sequence[Prediction]) -> None:
    _check_seeds(name, len(predictions), "the default", len(default))
    for number, (ours, theirs) in enumerate(zip(predictions, default, strict=True), start=1):
        if not np.array_equal(ours[1], theirs[1]):
            raise UserError(f"{name} and the default were not scored on the same rows under seed {number}")
