"""Intervals against naive resampling, their coverage in simulations, and who is resampled with whom."""

import math
import time

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from raymed.metrics import (
    binary_metrics,
    binary_statistic,
    bootstrap,
    bootstrap_ci,
    mean_statistic,
    paired_bootstrap_difference,
    summarise_difference,
    summarise_seeds,
)


def predictions(seed, num_patients=60, per_patient=2, sharpness=1.0):
    random = np.random.default_rng(seed)
    patients = np.repeat(np.arange(num_patients), per_patient)
    targets = (np.arange(num_patients) % 3 == 0).astype(int)[patients]
    noise = random.normal(size=num_patients)[patients] + random.normal(size=len(patients))
    logits = sharpness * (2 * targets - 1) + noise
    return 1 / (1 + np.exp(-logits)), targets, patients, 0.5


def width(figure):
    return figure["ci_high"] - figure["ci_low"]


def covers(figure, truth=0.0):
    return figure["ci_low"] <= truth <= figure["ci_high"]


def mean_figure(values, groups, **options):
    return bootstrap_ci([mean_statistic("mean", v) for v in values], groups, n_boot=400, **options)["mean"]


def test_equals_a_naive_loop_over_the_same_resamples():
    runs = [predictions(seed) for seed in range(3)]
    seen = []

    def recording(run):
        statistic = binary_statistic(*run[:2], run[3])
        return lambda counts: seen.append(counts) or statistic(counts)

    found = bootstrap_ci([recording(run) for run in runs], [run[2] for run in runs], n_boot=100, seed=7)
    counts = [of_seed for of_seed in seen if len(of_seed) == 100]
    drawn_seeds = np.random.default_rng(7).integers(3, size=(100, 3))
    for name, metric in {"auroc": roc_auc_score, "auprc": average_precision_score}.items():
        naive = np.empty((100, 3))
        for r, s in np.ndindex(100, 3):
            scores, targets, *_ = runs[s]
            naive[r, s] = metric(*(np.repeat(rows, counts[s][r].astype(int)) for rows in (targets, scores)))
        naive = np.take_along_axis(naive, drawn_seeds, axis=1).mean(axis=1)
        low, high = np.quantile(naive, [0.025, 0.975])
        assert found[name]["ci_low"] == pytest.approx(low, abs=1e-12)
        assert found[name]["ci_high"] == pytest.approx(high, abs=1e-12)


def test_draws_are_of_whole_patients_with_replacement():
    counts = []
    groups = [np.array(["a", "b", "b", "c", "c", "c"]), np.array(["c", "d"])]
    record = lambda rows: counts.append(rows) or {"x": rows.sum(axis=1)}  # noqa: E731
    bootstrap_ci([record, record], groups, n_boot=50)
    first, second = counts[:2]
    assert (first[:, 1] == first[:, 2]).all() and (first[:, 3:] == first[:, 3:4]).all()
    assert (first[:, 3] == second[:, 0]).all()  # the same patient under another seed
    assert (first[:, 0] + first[:, 1] + first[:, 3] + second[:, 1] == 4).all()
    assert first.max() > 1 and first.min() == 0


def test_coverage_of_a_mean_is_nominal_over_patients_and_not_over_images():
    random = np.random.default_rng(0)
    by_patient, by_image = [], []
    for trial in range(400):
        patients = np.repeat(np.arange(50), 3)
        values = random.normal(size=50)[patients] + 0.5 * random.normal(size=150)
        by_patient.append(covers(mean_figure([values], [patients], seed=trial)))
        by_image.append(covers(mean_figure([values], [np.arange(150)], seed=trial, unit="image")))
    assert 0.92 <= np.mean(by_patient) <= 0.975
    assert np.mean(by_image) < 0.8


def test_coverage_when_seeds_share_their_patients():
    """Six seeds on one test set: drawing its patients anew for each seed would hide much of the uncertainty."""
    random = np.random.default_rng(1)
    patients = np.arange(60)
    together, apart = [], []
    for trial in range(400):
        hardness = random.normal(size=60)
        values = [hardness + 0.3 * random.normal(size=60) + 0.02 * random.normal() for _ in range(6)]
        together.append(covers(mean_figure(values, [patients] * 6, seed=trial)))
        apart.append(covers(mean_figure(values, [patients + 100 * s for s in range(6)], seed=trial)))
    assert 0.92 <= np.mean(together) <= 0.975
    assert np.mean(apart) < 0.85


def test_coverage_when_seeds_differ():
    random = np.random.default_rng(2)
    covered = []
    for trial in range(300):
        values = [random.normal() + 0.1 * random.normal(size=20) for _ in range(15)]
        covered.append(covers(mean_figure(values, [np.arange(20)] * 15, seed=trial)))
    assert 0.88 <= np.mean(covered) <= 0.97  # the spread of 15 seeds, of which a bootstrap sees 14 / 15


def test_duplicated_images_tell_nothing_new():
    scores, targets, patients, threshold = predictions(0, per_patient=1)
    copies = [np.repeat(array, 4) for array in (scores, targets, patients)]
    once = summarise_seeds([(scores, targets, patients, threshold)])["auroc"]
    by_patient = summarise_seeds([(*copies, threshold)])["auroc"]
    by_image = summarise_seeds([(*copies[:2], None, threshold)])["auroc"]
    assert by_patient == pytest.approx(once, abs=1e-12, nan_ok=True)
    assert width(by_patient) / width(by_image) == pytest.approx(2, rel=0.15)  # the square root of 4
    assert (by_patient["unit"], by_patient["num_patients"]) == ("patient", 60)
    assert (by_image["unit"], by_image["num_patients"]) == ("image", None)


def test_figures_over_seeds():
    runs = [predictions(seed) for seed in range(3)]
    figures = summarise_seeds(runs, n_boot=200)
    alone = [binary_metrics(scores, targets, threshold) for scores, targets, _, threshold in runs]
    assert set(figures) == set(alone[0]) - {"threshold"}
    for name, figure in figures.items():
        values = [metrics[name] for metrics in alone]
        assert figure["mean"] == pytest.approx(np.mean(values), abs=1e-12)
        assert figure["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
        assert (figure["n"], figure["num_patients"], figure["num_undefined"]) == (3, 60, 0)
        assert figure["ci_low"] < figure["ci_high"]
    one = summarise_seeds(runs[:1], n_boot=200)["auroc"]
    assert math.isnan(one["std"]) and one["n"] == 1


def test_each_seed_is_decided_at_its_own_threshold():
    scores, targets, patients, _ = predictions(0)
    figures = summarise_seeds([(scores, targets, patients, 0.0), (scores, targets, patients, 1.0)], n_boot=100)
    assert figures["sensitivity"]["mean"] == 0.5 and figures["accuracy"]["mean"] == 0.5


def test_undefined_resamples_are_left_out_and_counted():
    scores, targets = np.linspace(0.1, 0.9, 10), np.eye(10, dtype=int)[8]
    figures = summarise_seeds([(scores, targets, None, 0.5)])
    assert figures["auroc"]["num_undefined"] == pytest.approx(2000 * 0.9**10, rel=0.1)  # the one positive not drawn
    assert figures["auroc"]["num_undefined"] == figures["recall"]["num_undefined"]
    assert 0.5 < figures["auroc"]["ci_low"] <= figures["auroc"]["mean"] <= figures["auroc"]["ci_high"] == 1
    assert figures["brier"]["num_undefined"] == 0


def test_a_metric_that_is_never_defined():
    figure = summarise_seeds([(np.full(5, 0.2), np.zeros(5), None, 0.5)], n_boot=50)["auroc"]
    assert all(math.isnan(figure[key]) for key in ("mean", "ci_low", "ci_high"))
    assert figure["num_undefined"] == 50


def test_reproducible_and_independent_of_chunks(monkeypatch):
    runs = [predictions(seed) for seed in range(2)]
    first = summarise_seeds(runs[:2], seed=3)
    assert summarise_seeds(runs, seed=3) == first
    assert summarise_seeds(runs, seed=4)["auroc"]["ci_low"] != first["auroc"]["ci_low"]
    monkeypatch.setattr(bootstrap, "CHUNK", 1000)
    assert summarise_seeds(runs, seed=3)["auroc"] == pytest.approx(first["auroc"], abs=1e-12)


def test_level():
    run = [predictions(0)]
    assert width(summarise_seeds(run, level=0.5)["auroc"]) < 0.5 * width(summarise_seeds(run, level=0.95)["auroc"])


def test_difference_cancels_what_is_common():
    blurred = [predictions(seed, sharpness=1.0) for seed in range(3)]
    sharper = [(scores**0.5, targets, patients, t) for scores, targets, patients, t in blurred]
    difference = summarise_difference(sharper, blurred)
    assert difference["auroc"]["mean"] == difference["auroc"]["ci_low"] == difference["auroc"]["ci_high"] == 0
    brier = [summarise_seeds(runs)["brier"] for runs in (sharper, blurred)]
    assert difference["brier"]["mean"] == pytest.approx(brier[0]["mean"] - brier[1]["mean"], abs=1e-12)
    assert width(difference["brier"]) < math.hypot(width(brier[0]), width(brier[1]))


def test_difference_of_means_is_the_mean_of_differences():
    random = np.random.default_rng(0)
    a, b, patients = random.normal(size=(3, 40)), random.normal(size=(3, 40)), np.arange(40) // 2
    paired = paired_bootstrap_difference(
        [mean_statistic("hits", row) for row in a], [mean_statistic("hits", row) for row in b], [patients] * 3, seed=5
    )
    direct = bootstrap_ci([mean_statistic("hits", row) for row in a - b], [patients] * 3, seed=5)
    assert paired["hits"] == pytest.approx(direct["hits"], abs=1e-12)


def test_fast_enough_for_a_comparison():
    runs = [[predictions(3 * method + seed, num_patients=312) for seed in range(3)] for method in range(6)]
    start = time.process_time()
    for of_method in runs:
        summarise_seeds(of_method, n_boot=1000)
    assert time.process_time() - start < 10
