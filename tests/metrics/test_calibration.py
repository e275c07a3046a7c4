"""Calibration finds the distortion that was planted; the band keeps its promise for patients nobody has seen."""

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from raymed.metrics.calibration import (
    Calibration,
    band_figures,
    logit_of,
    patient_folds,
    uncertain_band,
    upper_bound,
)
from raymed.metrics.reliability import fit_calibrator


def outcomes(num: int, seed: int = 0):
    """Logits of which the sigmoid is the true probability, targets drawn from it, and two images a patient."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 2, num)
    return logits, (rng.random(num) < expit(logits)).astype(int), np.arange(num) // 2


def test_the_planted_distortion_is_undone():
    """The network says 3 z + 1 where z is true: temperature 3, bias -1/3."""
    true, targets, patients = outcomes(20000)
    found, report = fit_calibrator("platt", expit(3 * true + 1), targets, patients)
    assert found.temperature == pytest.approx(3, rel=0.05) and found.bias == pytest.approx(-1 / 3, abs=0.06)
    np.testing.assert_allclose(found(3 * true + 1), expit(true), atol=0.02)
    assert report["applied"] and (report["temperature"], report["bias"]) == (found.temperature, found.bias)
    assert report["before"]["ece"] > 0.1 > 0.02 > report["after"]["ece"]
    ideal = -np.mean(np.where(targets == 1, np.log(expit(true)), np.log(expit(-true))))
    assert report["after"]["nll"] == pytest.approx(ideal, abs=2e-3) and report["before"]["nll"] > ideal + 0.1
    assert report["after"]["brier"] < report["before"]["brier"]


def test_the_fit_is_the_maximum_of_the_likelihood():
    """Soft targets are rows of both classes with weights: scikit-learn's optimum is the same."""
    true, targets, _ = outcomes(300)
    found = Calibration.fit(true, targets)
    p, n = targets.sum(), 300 - targets.sum()
    soft = np.where(targets == 1, (p + 1) / (p + 2), 1 / (n + 2))
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    reference.fit(np.tile(true, 2)[:, None], np.repeat([1, 0], 300), sample_weight=np.concatenate([soft, 1 - soft]))
    assert 1 / found.temperature == pytest.approx(reference.coef_[0, 0], rel=1e-4)
    assert found.bias == pytest.approx(reference.intercept_[0], rel=1e-4)


def test_a_calibrated_model_with_few_cases_is_left_alone():
    """Fits on so few patients are worse than nothing, and the cross-fitted figure shows it, while a figure on the
    fit's own data never could."""
    kept = []
    for seed in range(40):
        logits, targets, patients = outcomes(60, seed)
        found, report = fit_calibrator("platt", expit(logits), targets, patients)
        assert report["applied"] == (report["after"]["nll"] < report["before"]["nll"])
        if not report["applied"]:
            assert found == Calibration() and np.array_equal(found(logits), expit(logits))
            assert "did not lower" in report["reason"]
        kept.append(not report["applied"])
    assert np.mean(kept) > 0.6


@pytest.mark.parametrize("gap", [1.0, 20.0, 1000.0])
def test_separable_classes_have_a_finite_solution(gap):
    logits, targets = np.concatenate([np.full(10, -gap), np.full(30, gap)]), np.repeat([0, 1], [10, 30])
    found = Calibration.fit(logits, targets)
    np.testing.assert_allclose(found([-gap, gap]), [1 / 12, 31 / 32], atol=1e-4 if gap < 100 else 1 / 12)
    assert np.isfinite([found.temperature, found.bias]).all()


def test_scores_of_0_and_1_do_no_harm():
    scores, targets = np.array([0.0, 1.0, 0.0, 1.0] * 10), np.array([0, 1, 0, 0] * 10)
    assert logit_of([0.0, 1.0]) == pytest.approx([-36.8, 36.7], abs=0.2)
    found, report = fit_calibrator("platt", scores, targets, np.arange(40))
    assert report["applied"] and found(logit_of([0.0, 1.0])) == pytest.approx([0.03, 0.5], abs=0.03)


def test_the_order_of_scores_is_kept_even_if_they_rank_the_wrong_way():
    true, targets, _ = outcomes(500)
    grid = np.linspace(-5, 5, 50)
    assert (np.diff(Calibration.fit(-true, targets)(grid)) > 0).all()


def test_one_patient_of_a_class_is_too_few_to_check():
    targets = np.array([1, 1, 0, 0, 0, 0])
    found, report = fit_calibrator("platt", np.linspace(0.9, 0.1, 6), targets, np.array([0, 0, 1, 2, 3, 4]))
    assert found == Calibration() and not report["applied"] and "two patients of each class" in report["reason"]


def test_no_patient_is_in_two_folds():
    _, targets, patients = outcomes(200)
    held_out = []
    for kept, out in patient_folds(targets, patients):
        assert not set(patients[kept]) & set(patients[out])
        held_out.extend(out)
    assert sorted(held_out) == list(range(200))


def test_upper_bound_by_hand():
    """Four images, one a patient: the new one counts as the highest of five."""
    scores, patients = np.array([0.1, 0.4, 0.3, 0.2]), np.arange(4)
    assert [upper_bound(scores, patients, e) for e in (0.6, 0.4, 0.2, 0.19)] == [0.2, 0.3, 0.4, np.inf]
    # Patients 0 and 1 with three images and one: 1/3, and 1/9 for each image of patient 0.
    assert upper_bound(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0, 0, 0, 1]), 1 / 3 + 2 / 9) == 1.0


def cohort(rng: np.random.Generator, patients: int, centre: float):
    """Images of patients; who has many of them is easy: each patient's logit is one number and a little noise."""
    hard = rng.random(patients) < 0.3
    num = np.where(hard, 1, 12)
    level = np.where(hard, 0.0, centre) + rng.normal(0, 0.5, patients)
    return np.repeat(level, num) + rng.normal(0, 0.1, num.sum()), np.repeat(np.arange(patients), num)


def test_the_promise_holds_for_images_of_new_patients():
    """Over many validation splits of 25 patients, a new positive patient's random image lies below the band at most
    as often as promised. Edges that take images for independent, or an empirical quantile, fail at that."""
    rng = np.random.default_rng(0)
    new, patient = cohort(rng, 4000, 3.0)
    weight = 1 / np.bincount(patient)[patient] / 4000
    error, missed = 0.1, {"band": [], "images": [], "quantile": []}
    for _ in range(300):
        scores, patients = cohort(rng, 25, 3.0)
        edges = {
            "band": -upper_bound(-scores, patients, error),
            "images": -upper_bound(-scores, np.arange(len(scores)), error),
            "quantile": np.quantile([scores[patients == p].mean() for p in range(25)], error),
        }
        for name, edge in edges.items():
            missed[name].append(weight[new < edge].sum())
    rates = {name: np.mean(values) for name, values in missed.items()}
    noise = 3 * np.std(missed["band"]) / np.sqrt(300)
    assert error - 1 / 26 - noise < rates["band"] < error + noise
    assert rates["images"] > 1.5 * error and rates["quantile"] > error + noise


def test_the_band_of_a_planted_truth():
    """Negatives N(-1/2, 1), positives N(1/2, 1) on the logit: the edges are where 5 % of either lie beyond, and the
    normal distribution says how many lie inside and how many decisions are right."""
    rng = np.random.default_rng(0)
    targets = rng.permutation(np.repeat([0, 1], [4000, 1000]))
    logits = rng.normal(np.where(targets, 0.5, -0.5), 1)
    band = uncertain_band(expit(logits), targets, np.arange(5000), threshold=0.5)
    assert logit(band["low"]) == pytest.approx(0.5 - 1.645, abs=0.1)
    assert logit(band["high"]) == pytest.approx(-0.5 + 1.645, abs=0.1)
    val = band["val"]
    assert val["missed"] == pytest.approx(0.05, abs=2e-3) and val["false_alarms"] == pytest.approx(0.05, abs=1e-3)
    dismissed, sure_half = norm.cdf(0.5 - 1.645 + 0.5), norm.cdf(0.5)
    assert val["referred"] == pytest.approx(0.95 - dismissed, abs=0.02)
    assert val["accuracy_outside"] == pytest.approx(dismissed / (dismissed + 0.05), abs=0.02)
    assert val["accuracy_inside"] == pytest.approx((sure_half - dismissed) / (0.95 - dismissed), abs=0.02)


def test_the_band_does_not_depend_on_prevalence():
    rng = np.random.default_rng(0)
    scores = {1: expit(rng.normal(0.5, 1, 3000)), 0: expit(rng.normal(-0.5, 1, 3000))}

    def edges(num_positive: int):
        values, targets = np.concatenate([scores[0], scores[1][:num_positive]]), np.repeat([0, 1], [3000, num_positive])
        band = uncertain_band(values, targets, np.arange(len(values)), threshold=0.5)
        return band["low"], band["high"]

    assert edges(3000) == pytest.approx(edges(300), abs=0.04)


def test_classes_far_apart_leave_no_band_but_the_threshold():
    scores, targets = np.repeat([0.1, 0.9], 40), np.repeat([0, 1], 40)
    band = uncertain_band(scores, targets, np.arange(80), threshold=0.5)
    assert band["low"] == band["high"] == 0.5 and band["val"]["referred"] == 0
    assert np.isnan(band["val"]["accuracy_inside"]) and band["val"]["accuracy_outside"] == 1


def test_too_few_patients_open_their_side_of_the_band():
    """18 positive patients cannot promise 5 %, however many images they have; 19 can."""
    rng = np.random.default_rng(0)

    def band(num_positive: int):
        patients = np.concatenate([np.arange(100), np.repeat(100 + np.arange(num_positive), 5)])
        targets = (patients >= 100).astype(int)
        return uncertain_band(expit(rng.normal(3 * targets - 1.5, 1)), targets, patients, threshold=0.5)

    open_below = band(18)
    assert open_below["low"] == 0 and open_below["high"] < 1
    assert open_below["reason"] == "too few to promise anything: 18 positive patients where 19 are needed"
    assert band(19)["low"] > 0 and band(19)["patients"] == {"positive": 19, "negative": 100}


def test_band_figures_by_hand():
    scores, targets = np.array([0.1, 0.2, 0.4, 0.6, 0.7, 0.9]), np.array([0, 1, 1, 0, 1, 0])
    found = band_figures(scores, targets, threshold=0.5, low=0.4, high=0.6)
    rates = {"referred": 1 / 3, "missed": 1 / 3, "false_alarms": 1 / 3}
    assert found == pytest.approx(rates | {"accuracy_inside": 0, "accuracy_outside": 0.5})
