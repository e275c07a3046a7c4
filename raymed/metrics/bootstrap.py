"""Confidence intervals by a two-level bootstrap: seeds, and patients within seeds.

A resample draws S of the S seeds and P of the P patients, both with replacement, and averages the metric over the drawn
seeds. All images of a patient are drawn together, since they are not independent. A patient who occurs under several
seeds, as all do when the seeds share a test set, is drawn as often under each: had every seed its own draw, averaging
over seeds would hide much of the uncertainty that comes from having only these patients. With few seeds (three, say)
the interval tells much of the patients and little of the seeds; the standard deviation over seeds stands beside it. ECE
is biased upwards, more so in resamples, so that the interval of a well calibrated model's ECE may lie above its value.

Resamples are counts of rows, so a metric is evaluated for all of them as matrices (`Statistic`).
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np

from raymed.metrics.classification import Statistic, binary_statistic

CHUNK = 2**21  # matrix elements at a time: 16 MB of float64

Prediction = tuple[np.ndarray, np.ndarray, np.ndarray | None, float]
"""One seed's (scores (N,), targets (N,), patients (N,) or None where the data name none, threshold)."""


class Figure(TypedDict):
    """A metric over seeds, as it stands in summary.json."""

    mean: float  # over the n seeds
    std: float  # over the n seeds, ddof=1; nan for one seed
    n: int
    ci_low: float
    ci_high: float
    num_patients: int | None  # distinct patients under all seeds; None where the data name none
    unit: str  # what was resampled: patient, case, image
    num_undefined: int  # resamples left out because the metric is undefined in them, e.g. no positive was drawn


def bootstrap_ci(
    statistics: Sequence[Statistic],
    groups: Sequence[np.ndarray],
    *,
    unit: str = "patient",
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Figure]:
    """Mean over seeds with a percentile interval, of every metric the statistics return.

    Args:
        statistics: one a seed, over that seed's N_s rows.
        groups: one (N_s,) array a seed: the patient of each row (any sortable type), or of each row what identifies its
            image, with unit="image". The same value under two seeds is the same patient.
        level: coverage of the interval.

    Resamples in which a metric is undefined (nan) are left out of its interval and counted.
    """
    sizes = [len(group) for group in groups]
    patients, patient_of_row = np.unique(np.concatenate(groups), return_inverse=True)
    rows = np.split(patient_of_row, np.cumsum(sizes)[:-1])
    random = np.random.default_rng(seed)
    drawn_seeds = random.integers(len(sizes), size=(n_boot, len(sizes)))
    chunk = max(1, CHUNK // max(len(patients), *sizes))
    resampled = [
        evaluate_counts(statistics, rows, draw_counts(random, min(chunk, n_boot - start), len(patients)))
        for start in range(0, n_boot, chunk)
    ]
    observed = evaluate_counts(statistics, rows, np.ones((1, len(patients))))
    num_patients = len(patients) if unit == "patient" else None
    figures = {}
    for name, (per_seed,) in observed.items():
        values = np.concatenate([part[name] for part in resampled])
        values = np.take_along_axis(values, drawn_seeds, axis=1).mean(axis=1)
        figures[name] = figure_of(per_seed, values, level) | {"num_patients": num_patients, "unit": unit}
    return figures


def paired_bootstrap_difference(
    statistics: Sequence[Statistic], baseline: Sequence[Statistic], groups: Sequence[np.ndarray], **options
) -> dict[str, Figure]:
    """`bootstrap_ci` of (metric - metric of the baseline), seed by seed over the same rows.

    Both see the same resamples, so what they have in common (hard patients, the seed's encoder) cancels: the interval
    is that of the difference, not of two separate means. Options as `bootstrap_ci`.
    """

    def difference(ours: Statistic, theirs: Statistic) -> Statistic:
        def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
            subtracted = theirs(counts)
            return {name: value - subtracted[name] for name, value in ours(counts).items()}

        return statistic

    return bootstrap_ci([difference(a, b) for a, b in zip(statistics, baseline, strict=True)], groups, **options)


def summarise_seeds(predictions: Sequence[Prediction], unit: str | None = None, **options) -> dict[str, Figure]:
    """Figures of `binary_metrics` (less the threshold) over seeds. unit: what patients are, where not that. Options:
    n_boot, seed, level of `bootstrap_ci`."""
    groups, known = groups_of(predictions)
    return bootstrap_ci(statistics_of(predictions), groups, unit=unit or known, **options)


def summarise_difference(
    predictions: Sequence[Prediction], baseline: Sequence[Prediction], unit: str | None = None, **options
) -> dict[str, Figure]:
    """Figures of how much higher each metric is than the baseline's; seed s of both over the same rows, in order.
    unit, options: as of `summarise_seeds`."""
    groups, known = groups_of(predictions)
    statistics = statistics_of(predictions), statistics_of(baseline)
    return paired_bootstrap_difference(*statistics, groups, unit=unit or known, **options)


def mean_statistic(name: str, values: np.ndarray) -> Statistic:
    """The mean of a number known of each row (N,), such as whether a saliency map hit."""
    values = np.asarray(values, np.float64)
    return lambda counts: {name: np.einsum("rn,n->r", counts, values) / counts.sum(axis=1)}


def statistics_of(predictions: Sequence[Prediction]) -> list[Statistic]:
    """The metrics of each seed as functions of how often its rows count."""
    return [binary_statistic(scores, targets, threshold) for scores, targets, _, threshold in predictions]


def groups_of(predictions: Sequence[Prediction]) -> tuple[list[np.ndarray], Literal["patient", "image"]]:
    """Patients of each seed's rows; without them, row i of every seed is taken for the same image."""
    patients = [patients for _, _, patients, _ in predictions if patients is not None]
    if len(patients) == len(predictions):
        return patients, "patient"
    return [np.arange(len(scores)) for scores, *_ in predictions], "image"


def draw_counts(random: np.random.Generator, num_resamples: int, num_patients: int) -> np.ndarray:
    """(R, P): how often each patient is among P draws with replacement."""
    drawn = random.integers(num_patients, size=(num_resamples, num_patients))
    drawn += num_patients * np.arange(num_resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=num_resamples * num_patients)
    return counts.reshape(num_resamples, num_patients).astype(np.float64)


def evaluate_counts(
    statistics: Sequence[Statistic], rows: list[np.ndarray], counts: np.ndarray
) -> dict[str, np.ndarray]:
    """{metric: (R, S)} of patient counts (R, P); rows[s] is the patient of each row of seed s."""
    per_seed = [
        statistic(np.take(counts, patient_of_row, axis=1))
        for statistic, patient_of_row in zip(statistics, rows, strict=True)
    ]
    return {name: np.stack([metrics[name] for metrics in per_seed], axis=1) for name in per_seed[0]}


def figure_of(per_seed: np.ndarray, resampled: np.ndarray, level: float) -> dict:
    """A `Figure` less its patients: mean and deviation of the seeds (S,), percentile interval of resamples (R,)."""
    defined = resampled[~np.isnan(resampled)]
    tails = [(1 - level) / 2, (1 + level) / 2]
    ci_low, ci_high = np.quantile(defined, tails) if len(defined) else (np.nan, np.nan)
    return {
        "mean": float(per_seed.mean()),
        "std": float(per_seed.std(ddof=1)) if len(per_seed) > 1 else float("nan"),
        "n": len(per_seed),
        "ci_low": float(ci_low),
        "ci_high": float(ci_high),
        "num_undefined": len(resampled) - len(defined),
    }
