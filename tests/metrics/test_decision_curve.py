"""Net benefit by hand and by counting, its ends, and what a better model is worth."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import confusion_matrix

from raymed.config import UserError
from raymed.metrics.decision_curve import THRESHOLDS, decision_curve, net_benefit_statistic

SCORES = np.array([0.1, 0.2, 0.2, 0.3, 0.4, 0.6, 0.6, 0.7, 0.8, 0.9])
TARGETS = np.array([0, 0, 0, 1, 0, 0, 1, 1, 0, 1])


def cohort(num, seed=0):
    random = np.random.default_rng(seed)
    logits = random.normal(-1, 2, num)
    return expit(logits), (random.random(num) < expit(logits)).astype(int), np.arange(num)


def test_by_hand():
    curve = decision_curve(SCORES, TARGETS, np.arange(10), [0.25, 0.5, 0.8], n_boot=50)
    # At 0.25: 4 true and 3 false positives at odds of 1 / 3; at 0.5: 3 and 2 at 1; at 0.8: 1 and 1 at 4.
    assert curve.model == pytest.approx([0.4 - 0.3 / 3, 0.3 - 0.2, 0.1 - 0.1 * 4])
    assert curve.treat_all == pytest.approx([0.4 - 0.6 / 3, 0.4 - 0.6, 0.4 - 0.6 * 4])
    assert curve.gain == pytest.approx([0.1, 0.1, -0.3])  # over all, over none, over none
    assert curve.thresholds.tolist() == [0.25, 0.5, 0.8]


def test_odds_of_a_threshold():
    """At 10 % nine false positives are worth one true positive (Vickers and Elkin, 2006)."""
    decided, targets = np.repeat([0.9, 0.0], [10, 90]), np.repeat([1, 0], [1, 99])
    assert decision_curve(decided, targets, np.arange(100), [0.1], n_boot=2).model[0] == pytest.approx(0, abs=1e-15)


def test_statistic_equals_counting():
    scores, targets, _ = cohort(60)
    counts = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=15)
    found = net_benefit_statistic(scores, targets, [0.07, 0.3, 0.77])(counts)
    for r, count in enumerate(counts):
        for t in (0.07, 0.3, 0.77):
            positive, decided = np.repeat(targets, count), np.repeat(scores >= t, count)
            _, fp, _, tp = confusion_matrix(positive, decided, labels=[0, 1]).ravel()
            model, everybody = (tp - fp * t / (1 - t)) / 60, (positive.sum() - (60 - positive.sum()) * t / (1 - t)) / 60
            assert found[f"model/{t}"][r] == pytest.approx(model, abs=1e-12)
            assert found[f"treat_all/{t}"][r] == pytest.approx(everybody, abs=1e-12)
            assert found[f"gain/{t}"][r] == pytest.approx(model - max(everybody, 0), abs=1e-12)


def test_a_model_that_knows_nothing_is_one_of_the_two():
    _, targets, patients = cohort(200)
    share = targets.mean()
    curve = decision_curve(np.full(200, share), targets, patients, n_boot=20)
    below = curve.thresholds <= share
    assert curve.model[below] == pytest.approx(curve.treat_all[below], abs=1e-12)
    assert (curve.model[~below] == 0).all()
    assert len(curve.thresholds) == len(THRESHOLDS) == 99 and 5 < below.sum() < 90
    assert np.interp(share, curve.thresholds, curve.treat_all) == pytest.approx(0, abs=0.01)


def test_a_perfect_model_saves_every_positive():
    _, targets, patients = cohort(100)
    curve = decision_curve(targets.astype(float), targets, patients, n_boot=20)
    assert curve.model == pytest.approx(np.full(99, targets.mean()))


def test_calibrated_probabilities_do_more_good_than_distorted_ones():
    scores, targets, patients = cohort(5000)
    distorted = expit(2.5 * np.log(scores / (1 - scores)) + 2)  # ranks alike
    honest = decision_curve(scores, targets, patients, [0.05, 0.1, 0.2, 0.6], n_boot=100)
    other = decision_curve(distorted, targets, patients, [0.05, 0.1, 0.2, 0.6], n_boot=100)
    assert (honest.gain_low > 0).all()
    assert (honest.model > other.model).all()


def test_intervals_are_of_patients():
    scores, targets, patients = cohort(100)
    once = decision_curve(scores, targets, patients, [0.2], n_boot=200)
    copies = [np.repeat(values, 3) for values in (scores, targets, patients)]
    again = decision_curve(*copies, [0.2], n_boot=200)
    by_case = decision_curve(*copies[:2], np.arange(300), [0.2], n_boot=200, unit="image")
    for name in ("model", "treat_all", "gain"):
        low, high = getattr(once, f"{name}_low")[0], getattr(once, f"{name}_high")[0]
        assert low <= getattr(once, name)[0] <= high
        assert (getattr(again, f"{name}_low")[0], getattr(again, f"{name}_high")[0]) == pytest.approx((low, high))
        assert getattr(by_case, f"{name}_high")[0] - getattr(by_case, f"{name}_low")[0] < 0.75 * (high - low)


def test_prevalence_is_that_of_repeated_negatives():
    scores, targets, patients = cohort(300)
    share = targets.mean()
    same = decision_curve(scores, targets, patients, prevalence=share, n_boot=2)
    assert same.model == pytest.approx(decision_curve(scores, targets, patients, n_boot=2).model, abs=1e-12)
    times = np.where(targets == 1, 1, 4)
    rare = decision_curve(np.repeat(scores, times), np.repeat(targets, times), np.repeat(patients, times), n_boot=2)
    stated = decision_curve(scores, targets, patients, prevalence=share / (share + 4 * (1 - share)), n_boot=2)
    for name in ("model", "treat_all", "gain"):
        assert getattr(stated, name) == pytest.approx(getattr(rare, name), abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": [0.5, 1.0]}, "threshold must be > 0 and < 1, got 1"),
        ({"thresholds": []}, "at least one threshold"),
        ({"prevalence": 0.0}, "prevalence must be > 0 and < 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        decision_curve(SCORES, TARGETS, np.arange(10), **options)
