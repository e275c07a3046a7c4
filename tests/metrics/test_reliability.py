"""Slope and intercept against scikit-learn and planted distortions; calibrators against references."""

import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.calibration import calibration_curve as sklearn_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from raymed.config import UserError, to_json
from raymed.metrics import binary_metrics, bootstrap_ci
from raymed.metrics.calibration import Calibration, logit_of
from raymed.metrics.operating import wilson
from raymed.metrics.reliability import (
    Isotonic,
    Temperature,
    calibration_curve,
    calibrator_from_dict,
    calibrator_to_dict,
    fit_calibrator,
    recalibration_statistic,
)


def outcomes(num: int, seed: int = 0):
    """Logits of which the sigmoid is the true probability, targets drawn from it, and two cases a patient."""
    random = np.random.default_rng(seed)
    logits = random.normal(-1, 2, num)
    return logits, (random.random(num) < expit(logits)).astype(int), np.arange(num) // 2


def by_scikit_learn(scores, targets):
    fit = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(logit_of(scores)[:, None], targets)
    return fit.coef_[0, 0], fit.intercept_[0]


def alone(scores, targets):
    values = recalibration_statistic(scores, targets)(np.ones((1, len(scores))))
    return tuple(float(values[f"calibration_{name}"][0]) for name in ("slope", "intercept", "in_the_large"))


def test_planted_distortions():
    true, targets, _ = outcomes(40_000)
    assert alone(expit(true), targets) == pytest.approx((1, 0, 0), abs=0.04)
    assert alone(expit(2 * true + 1), targets)[:2] == pytest.approx((0.5, -0.5), abs=0.04)
    assert alone(expit(true - 0.7), targets) == pytest.approx((1, 0.7, 0.7), abs=0.04)


def test_slope_and_intercept_equal_scikit_learn_in_every_resample():
    true, targets, _ = outcomes(150)
    scores = expit(1.7 * true - 0.4)
    counts = np.random.default_rng(1).multinomial(150, np.full(150, 1 / 150), size=25)
    found = recalibration_statistic(scores, targets)(counts.astype(float))
    for r, count in enumerate(counts):
        slope, intercept = by_scikit_learn(np.repeat(scores, count), np.repeat(targets, count))
        assert found["calibration_slope"][r] == pytest.approx(slope, rel=1e-5)
        assert found["calibration_intercept"][r] == pytest.approx(intercept, abs=1e-5)
        # In the large: the mean of the shifted risks is the fraction of positives.
        shifted = expit(logit_of(scores) + found["calibration_in_the_large"][r])
        assert np.average(shifted, weights=count) == pytest.approx(np.average(targets, weights=count), abs=1e-10)


def test_hard_fits_converge():
    """Classes that barely overlap, and scores of 0 and 1."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        logits = np.sort(random.normal(0, 8, 30))
        targets = (logits > 0).astype(int)
        targets[[0, 16]] = 1, 0
        scores = np.where(np.abs(logits) > 12, logits > 0, expit(logits))
        slope, intercept, _ = alone(scores, targets)
        gradient = expit(slope * logit_of(scores) + intercept) - targets
        assert [gradient.sum(), gradient @ logit_of(scores)] == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_positive", [1, 3])
@pytest.mark.parametrize("scores", [np.linspace(1 - 1e-5, 1 - 1e-7, 16), np.repeat([0.0, 0.3, 1.0], [6, 4, 6])])
def test_in_the_large_of_risks_that_are_far_off(scores, num_positive):
    targets = (np.arange(16) < num_positive).astype(int)
    shifted = expit(logit_of(scores) + alone(scores, targets)[2])
    assert shifted.sum() == pytest.approx(num_positive, abs=1e-8)


@pytest.mark.filterwarnings("error")
def test_separated_classes_have_no_slope():
    def defined(scores, targets):
        return [math.isfinite(value) for value in alone(scores, targets)]

    assert defined([0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1]) == [False, False, True]
    assert defined([0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1]) == [False, False, True]  # they meet in one score
    assert defined([0.1, 0.2, 0.7, 0.9], [1, 1, 0, 0]) == [False, False, True]
    assert defined([0.5, 0.5, 0.5, 0.5], [0, 1, 1, 1]) == [False, False, True]
    assert defined([0.1, 0.7, 0.2, 0.9], [0, 0, 1, 1]) == [True, True, True]
    assert defined([0.1, 0.7], [1, 1]) == [False, False, False]
    figures = bootstrap_ci([recalibration_statistic([0.1, 0.7, 0.2, 0.9], [0, 0, 1, 1])], [np.arange(4)], n_boot=50)
    assert 0 < figures["calibration_in_the_large"]["num_undefined"] < figures["calibration_slope"]["num_undefined"] < 50


def test_interval_of_the_slope_covers():
    covered = []
    for seed in range(40):
        true, targets, patients = outcomes(200, seed)
        figures = bootstrap_ci([recalibration_statistic(expit(1.5 * true), targets)], [patients], n_boot=200)
        slope = figures["calibration_slope"]
        covered.append(slope["ci_low"] <= 1 / 1.5 <= slope["ci_high"])
    assert 0.85 <= np.mean(covered) <= 1


def test_curve_equals_scikit_learn():
    true, targets, patients = outcomes(403)
    scores = expit(true)
    curve = calibration_curve(scores, targets, patients, num_bins=8, n_boot=100)
    fraction, mean = sklearn_curve(targets, scores, n_bins=8, strategy="quantile")
    assert [b["fraction"] for b in curve] == pytest.approx(fraction.tolist(), abs=1e-12)
    assert [b["mean_score"] for b in curve] == pytest.approx(mean.tolist(), abs=1e-12)
    assert sum(b["num"] for b in curve) == 403 and sum(b["num_positive"] for b in curve) == targets.sum()
    assert {b["num"] for b in curve} <= {50, 51}
    for b in curve:
        assert (b["analytic_low"], b["analytic_high"]) == wilson(b["num_positive"], b["num"])
        assert b["ci_low"] <= b["fraction"] <= b["ci_high"]


def test_curve_of_tied_scores():
    curve = calibration_curve([0.1] * 30 + [0.6] * 10, [0] * 27 + [1] * 3 + [1] * 6 + [0] * 4, np.arange(40), n_boot=50)
    assert [(b["mean_score"], b["num"], b["num_positive"]) for b in curve] == [
        (pytest.approx(0.1), 30, 3),
        (pytest.approx(0.6), 10, 6),
    ]
    with pytest.raises(UserError, match="at least one case"):
        calibration_curve([], [], np.arange(0))


def test_temperature_is_the_planted_one():
    true, targets, _ = outcomes(20_000)
    found = Temperature.fit(2.5 * true, targets)
    assert found.temperature == pytest.approx(2.5, rel=0.03)
    np.testing.assert_allclose(found(2.5 * true), expit(2.5 * true / found.temperature))
    assert found([0.0])[0] == 0.5


def test_temperature_is_the_maximum_of_the_likelihood():
    true, targets, _ = outcomes(80)
    smoothed = np.where(targets == 1, (targets.sum() + 1) / (targets.sum() + 2), 1 / (80 - targets.sum() + 2))

    def loss(log_temperature):
        z = true / np.exp(log_temperature)
        return np.sum(np.logaddexp(0, z) - smoothed * z)

    best = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-10})
    assert Temperature.fit(true, targets).temperature == pytest.approx(np.exp(best.x), rel=1e-5)


def test_temperature_stays_within_bounds():
    logits, targets = np.linspace(-1, 1, 40), np.repeat([0, 1], 20)
    assert Temperature.fit(-logits, targets).temperature == 100  # ranks the wrong way: no information, not reversed
    assert 0.01 <= Temperature.fit(1e-6 * logits, targets).temperature < 1


def test_isotonic_equals_scikit_learn():
    true, targets, _ = outcomes(200)
    found, positive = Isotonic.fit(true, targets), targets.sum()
    low, high = 1 / (200 - positive + 2), (positive + 1) / (positive + 2)
    reference = IsotonicRegression(out_of_bounds="clip").fit(true, targets)
    at = np.linspace(-12, 12, 500)
    np.testing.assert_allclose(found(at), low + (high - low) * reference.predict(at), atol=1e-12)
    assert (np.diff(found(at)) >= 0).all() and found(at).min() >= low and found(at).max() <= high


def test_calibrators_are_written_down():
    true, targets, _ = outcomes(100)
    for calibrator in (Calibration(2.0, -0.3), Temperature(1.7), Isotonic.fit(true, targets)):
        written = json.loads(json.dumps(calibrator_to_dict(calibrator)))
        assert calibrator_from_dict(written) == calibrator
        assert json.loads(to_json(written)) == written
    assert calibrator_from_dict({}) == Calibration()
    assert calibrator_from_dict(
        {"method": "Platt scaling of the logit", "temperature": 2.0, "bias": 1.0}
    ) == Calibration(2.0, 1.0)
    with pytest.raises(UserError, match="kind of calibration must be one of 'platt'"):
        calibrator_from_dict({"kind": "beta"})


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_a_distortion_is_undone_on_cases_not_fitted_on(method):
    true, targets, patients = outcomes(4000)
    found, report = fit_calibrator(method, expit(3 * true), targets, patients)
    assert report["applied"] and (report["folds"], report["patients"], report["images"]) == (5, 2000, 4000)
    assert report["before"]["ece"] > 0.08 > 0.03 > report["after"]["ece"]
    assert calibrator_from_dict(json.loads(to_json(report))) == found
    new, outcome, _ = outcomes(4000, seed=1)
    before, after = (binary_metrics(p, outcome, 0.5)["brier"] for p in (expit(3 * new), found(3 * new)))
    assert after < before - 0.01


def test_isotonic_is_not_taken_where_it_overfits():
    kept = []
    for seed in range(20):
        true, targets, patients = outcomes(80, seed)
        found, report = fit_calibrator("isotonic", expit(true), targets, patients)
        assert report["applied"] == (report["after"]["nll"] < report["before"]["nll"])
        kept.append(found == Calibration())
    assert np.mean(kept) > 0.7


def test_calibrations_that_are_not_made():
    true, targets, patients = outcomes(50)
    found, report = fit_calibrator("none", expit(true), targets, patients)
    assert found == Calibration() and not report["applied"] and "after" not in report
    assert report["reason"] == "no calibration was asked for"
    found, report = fit_calibrator("isotonic", expit(true), np.zeros(50), patients)
    assert found == Calibration() and "fewer than two patients" in report["reason"]
    with pytest.raises(UserError, match="did you mean 'isotonic'"):
        fit_calibrator("isotonc", expit(true), targets, patients)  # type: ignore[arg-type]
