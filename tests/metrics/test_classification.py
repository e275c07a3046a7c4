"""Binary metrics against scikit-learn and hand-computed values; the tuned threshold against exhaustive search."""

import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from raymed.config import UserError
from raymed.metrics import binary_metrics, binary_statistic, tune_threshold


def example(seed, n=200, decimals=2):
    """Scores with ties, somewhat related to the targets."""
    random = np.random.default_rng(seed)
    targets = (random.random(n) < 0.3).astype(int)
    scores = np.round(1 / (1 + np.exp(-random.normal(2 * targets - 1, 1.5))), decimals)
    return scores, targets


def by_scikit_learn(scores, targets, threshold):
    decided = scores >= threshold
    return {
        "auroc": sklearn_metrics.roc_auc_score(targets, scores),
        "auprc": sklearn_metrics.average_precision_score(targets, scores),
        "accuracy": sklearn_metrics.accuracy_score(targets, decided),
        "accuracy_at_0.5": sklearn_metrics.accuracy_score(targets, scores >= 0.5),
        "sensitivity": sklearn_metrics.recall_score(targets, decided),
        "recall": sklearn_metrics.recall_score(targets, decided),
        "specificity": sklearn_metrics.recall_score(1 - targets, ~decided),
        "precision": sklearn_metrics.precision_score(targets, decided),
        "f1": sklearn_metrics.f1_score(targets, decided),
        "brier": sklearn_metrics.brier_score_loss(targets, scores),
    }


def test_golden(golden):
    arrays = golden("cls_metrics_sklearn")
    computed = binary_metrics(arrays["score"], arrays["y"], threshold=0.5)
    names = {"auprc": "ap_step", "auroc": "auroc", "accuracy": "acc", "precision": "prec", "recall": "rec", "f1": "f1"}
    for name, golden_name in names.items():
        assert computed[name] == pytest.approx(float(arrays[golden_name]), abs=1e-12), name
    assert computed["auprc"] != pytest.approx(float(arrays["auprc_trapezoid"]), abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decimals", [1, 2, 16])
def test_equals_scikit_learn(seed, decimals):
    scores, targets = example(seed, decimals=decimals)
    threshold = 0.4
    computed = binary_metrics(scores, targets, threshold)
    for name, expected in by_scikit_learn(scores, targets, threshold).items():
        assert computed[name] == pytest.approx(expected, abs=1e-12), name
    assert computed["threshold"] == threshold
    assert all(isinstance(value, float) for value in computed.values())


def test_brier_and_ece_by_hand():
    # Bins of width 1/15: {0.02, 0.05}, {0.5}, {0.97, 1.0}; gaps 0.035 - 0.5, 0.5 - 1, 0.985 - 0.5.
    computed = binary_metrics([0.02, 0.05, 0.5, 0.97, 1.0], [0, 1, 1, 1, 0], threshold=0.5)
    assert computed["ece"] == pytest.approx(2 / 5 * 0.465 + 1 / 5 * 0.5 + 2 / 5 * 0.485, abs=1e-12)
    assert computed["brier"] == pytest.approx((0.02**2 + 0.95**2 + 0.5**2 + 0.03**2 + 1) / 5, abs=1e-12)


def test_ece_bins_contain_their_lower_edge():
    # 1/15 and 0.1 share a bin, so that their errors of opposite sign cancel; 0.06 is in the bin below.
    together = binary_metrics([1 / 15, 0.1], [0, 1], threshold=0.5)["ece"]
    apart = binary_metrics([0.06, 0.1], [0, 1], threshold=0.5)["ece"]
    assert together == pytest.approx((0.9 - 1 / 15) / 2, abs=1e-12)
    assert apart == pytest.approx((0.9 + 0.06) / 2, abs=1e-12)


def test_constant_score_ranks_at_chance():
    computed = binary_metrics([0.3] * 8, [1, 0, 0, 0, 1, 0, 0, 0], threshold=0.3)
    assert computed["auroc"] == 0.5
    assert computed["auprc"] == 0.25
    assert computed["sensitivity"] == 1 and computed["specificity"] == 0  # a score at the threshold is positive


@pytest.mark.filterwarnings("error")
def test_undefined_is_nan():
    no_positive = binary_metrics([0.1, 0.6], [0, 0], threshold=0.5)
    undefined = {name for name, value in no_positive.items() if math.isnan(value)}
    assert undefined == {"auroc", "auprc", "sensitivity", "recall"}
    assert no_positive["precision"] == no_positive["f1"] == 0

    no_negative = binary_metrics([0.1, 0.6], [1, 1], threshold=0.5)
    assert {name for name, value in no_negative.items() if math.isnan(value)} == {"auroc", "specificity"}

    none_decided = binary_metrics([0.1, 0.2], [0, 1], threshold=0.5)
    assert {name for name, value in none_decided.items() if math.isnan(value)} == {"precision"}
    assert none_decided["f1"] == 0

    assert math.isnan(binary_metrics([0.1, 0.2], [0, 0], threshold=0.5)["f1"])
    empty = binary_metrics([], [], threshold=0.5)
    assert all(math.isnan(value) for name, value in empty.items() if name != "threshold")


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        ([0.1, math.nan, math.nan], [0, 1, 0], "2 of 3 scores are NaN"),
        ([0.1, 1.2], [0, 1], "scores must be >= 0 and <= 1, got 1.2"),
        ([0.1, 0.2], [0, 2], "targets must be 0 or 1, got 2"),
        ([0.1, 0.2], [0], r"\(N,\), got \(2,\) and \(1,\)"),
        ([[0.1], [0.2]], [[0], [1]], r"\(N,\), got \(2, 1\)"),
    ],
)
def test_bad_predictions(scores, targets, message):
    with pytest.raises(UserError, match=message):
        binary_metrics(scores, targets, threshold=0.5)


def test_counts_equal_repeated_rows():
    scores, targets = example(0, n=60, decimals=1)
    counts = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=30)
    of_counts = binary_statistic(scores, targets, threshold=0.4)(counts)
    for r, count in enumerate(counts):
        repeated = np.repeat(scores, count), np.repeat(targets, count)
        for name, expected in by_scikit_learn(*repeated, 0.4).items():
            assert of_counts[name][r] == pytest.approx(expected, abs=1e-12), name
        assert of_counts["ece"][r] == pytest.approx(binary_metrics(*repeated, 0.4)["ece"], abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_counts_of_an_undefined_resample():
    of_counts = binary_statistic([0.2, 0.7, 0.9], [0, 1, 1], threshold=0.5)(np.array([[3, 0, 0], [1, 1, 1]]))
    assert np.isnan(of_counts["auroc"]).tolist() == [True, False]
    assert np.isnan(of_counts["precision"]).tolist() == [True, False]
    assert of_counts["accuracy"].tolist() == [1, 1]


def test_threshold_is_the_midpoint_of_the_widest_best_gap():
    # Both 0.15 (between 0.1 and 0.2) and 0.6 (between 0.4 and 0.8) make one error of five; the second gap is wider.
    assert tune_threshold([0.1, 0.2, 0.4, 0.8, 0.9], [0, 1, 0, 1, 1], "accuracy") == pytest.approx(0.6)
    assert tune_threshold([0.2, 0.6], [0, 1], "f1") == pytest.approx(0.4)


def test_threshold_by_criterion():
    # One positive at 0.3 among 8 negatives below 0.6, one at 0.7.
    scores, targets = [0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.25], [0, 0, 1, 0, 0, 0, 0, 0, 1, 0]
    assert tune_threshold(scores, targets, "accuracy") == pytest.approx(0.65)
    assert tune_threshold(scores, targets, "f1") == pytest.approx(0.65)  # 2 / 3 against 4 / 9
    assert tune_threshold(scores, targets, "youden") == pytest.approx(0.65)  # 1 / 2 against 3 / 8
    scores, targets = [0.1, 0.2, 0.3, 0.4, 0.5, 0.9], [0, 0, 0, 1, 0, 1]
    assert tune_threshold(scores, targets, "accuracy") == pytest.approx(0.7)
    assert tune_threshold(scores, targets, "f1") == pytest.approx(0.35)  # 4 / 5 against 2 / 3
    assert tune_threshold(scores, targets, "youden") == pytest.approx(0.35)  # 3 / 4 against 1 / 2


@pytest.mark.parametrize("criterion", ["accuracy", "youden", "f1"])
@pytest.mark.parametrize("decimals", [1, 2, 16])
def test_threshold_equals_exhaustive_search(criterion, decimals):
    for seed in range(5):
        scores, targets = example(seed, n=80, decimals=decimals)

        def value(threshold, scores=scores, targets=targets):
            found = binary_metrics(scores, targets, threshold)
            return found["sensitivity"] + found["specificity"] if criterion == "youden" else found[criterion]

        tuned = tune_threshold(scores, targets, criterion)
        assert value(tuned) == pytest.approx(max(map(value, [*scores, 1.0])), abs=1e-12)
        shuffled = np.random.default_rng(seed).permutation(80)
        assert tune_threshold(scores[shuffled], targets[shuffled], criterion) == tuned


def test_threshold_at_the_ends():
    assert tune_threshold([0.2, 0.2, 0.2], [0, 0, 1]) == pytest.approx(0.6)  # all negative
    assert tune_threshold([0.2, 0.2, 0.2], [1, 0, 1]) == pytest.approx(0.1)  # all positive
    assert tune_threshold([1.0, 1.0, 1.0], [0, 0, 1]) == pytest.approx(0.5)  # nothing decides 1.0 negative
    assert tune_threshold([0.0, 0.0, 0.0], [0, 1, 1]) == 0.0


def test_threshold_between_neighbouring_floats():
    low, high = 0.3, float(np.nextafter(0.3, 1))
    assert low < tune_threshold([low, high], [0, 1]) <= high


def test_threshold_that_cannot_be_tuned():
    with pytest.raises(UserError, match="both classes, got 0 positive and 2 negative rows"):
        tune_threshold([0.1, 0.2], [0, 0])
    with pytest.raises(UserError, match="did you mean 'youden'"):
        tune_threshold([0.1, 0.2], [0, 1], "yuoden")
