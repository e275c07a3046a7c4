"""Prompt ensembles, AUROC by finding against scikit-learn, controls at chance, accuracy of classes and of foils."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from raymed.config import UserError
from raymed.metrics import bootstrap_ci
from raymed.metrics.zero_shot import (
    class_embeddings,
    class_probabilities,
    finding_metric,
    finding_scores,
    foil_statistic,
    multiclass_statistic,
    shuffled_control,
    told_findings,
    zero_shot_statistic,
)

NAMES = ["Effusion", "Pleural Thickening", "Hernia"]


def findings(n=400, seed=0):
    """Scores (N, 3) that know of the first two findings; the third is rare."""
    random = np.random.default_rng(seed)
    present = random.random((n, 3)) < [0.3, 0.2, 0.01]
    return np.round(random.normal(size=(n, 3)) + [1, 2, 0] * present, 1), present


def observed(statistic, n):
    return {name: float(value[0]) for name, value in statistic(np.ones((1, n))).items()}


def test_a_class_is_the_mean_of_its_unit_prompts():
    prompts = [np.array([[2.0, 0], [0, 5]]), np.array([[0.0, -3]])]
    np.testing.assert_allclose(class_embeddings(prompts), [[0.5**0.5, 0.5**0.5], [0, -1]], rtol=1e-6)
    with pytest.raises(UserError, match="class 1 has no prompt"):
        class_embeddings([prompts[0], prompts[1][:0]])


def test_probabilities_are_a_softmax_of_cosines():
    image, classes = np.array([[3.0, 0], [1, 1]]), np.eye(2)
    found = class_probabilities(image, classes, 0.5)
    np.testing.assert_allclose(found[0], np.exp([2, 0]) / np.exp([2, 0]).sum())
    np.testing.assert_allclose(found[1], 0.5)
    with pytest.raises(UserError, match="temperature must be > 0"):
        class_probabilities(image, classes, 0.0)


def test_a_finding_is_scored_by_positive_against_negative_prompts():
    image, positive, negative = np.array([[1.0, 0], [1, 1]]), np.array([[2.0, 0]]), np.array([[0, 1.0]])
    np.testing.assert_allclose(finding_scores(image, positive, negative), [[1], [0]], atol=1e-7)


def test_auroc_is_that_of_scikit_learn():
    scores, present = findings()
    found = observed(zero_shot_statistic(scores, present, NAMES), 400)
    metrics = ["auroc/Effusion", "auroc/Pleural_Thickening", "auroc/Hernia"]
    assert list(found) == [*metrics, "macro_auroc"]
    for f, metric in enumerate(metrics):
        assert found[metric] == pytest.approx(roc_auc_score(present[:, f], scores[:, f]))
    assert present[:, 2].sum() < 10 and told_findings(scores, present) == [0, 1]
    assert found["macro_auroc"] == pytest.approx(np.mean([found[m] for m in metrics[:2]]))


def test_counts_are_repeated_rows():
    scores, present = findings(60)
    counts = np.random.default_rng(1).integers(0, 4, (20, 60)).astype(float)
    found = zero_shot_statistic(scores, present, NAMES, min_positive=1)(counts)
    for r, of_rows in enumerate(counts.astype(int)):
        rows = np.repeat(np.arange(60), of_rows)
        assert found["auroc/Effusion"][r] == pytest.approx(roc_auc_score(present[rows, 0], scores[rows, 0]))


def test_what_is_undefined_is_nan():
    scores, present = findings(100)
    scores[:, 1], present[:, 2] = np.nan, False
    found = observed(zero_shot_statistic(scores, present, NAMES), 100)
    assert np.isnan(found["auroc/Pleural_Thickening"]) and np.isnan(found["auroc/Hernia"])
    assert found["macro_auroc"] == found["auroc/Effusion"]
    assert np.isnan(observed(zero_shot_statistic(scores, present, NAMES, min_positive=90), 100)["macro_auroc"])
    with pytest.raises(UserError, match=r"both be \(N, 2\), got \(100, 3\)"):
        zero_shot_statistic(scores, present, NAMES[:2])


def test_the_shuffled_control_sits_at_chance():
    scores, present = findings()
    inside = 0
    for seed in range(20):
        shuffled = shuffled_control(present, seed)
        assert shuffled.sum(axis=0).tolist() == present.sum(axis=0).tolist()
        statistic = zero_shot_statistic(scores, shuffled, NAMES)
        figure = bootstrap_ci([statistic], [np.arange(400)], n_boot=200, unit="image")["macro_auroc"]
        inside += figure["ci_low"] <= 0.5 <= figure["ci_high"]
    assert inside >= 17
    true = bootstrap_ci([zero_shot_statistic(scores, present, NAMES)], [np.arange(400)], n_boot=200)["macro_auroc"]
    assert true["ci_low"] > 0.75


def test_names_of_metrics():
    assert finding_metric("Pleural Thickening (left)") == "auroc/Pleural_Thickening_left_"
    assert finding_metric("Consolidation") == "auroc/Consolidation"


def test_accuracy_of_classes():
    random = np.random.default_rng(0)
    targets = random.choice([0, 1, 3], 90, p=[0.7, 0.2, 0.1])  # class 2 does not occur
    scores = random.random((90, 4)) + 0.4 * np.eye(4)[targets]
    scores[:, 2] = 0
    found = observed(multiclass_statistic(scores, targets), 90)
    assert found["accuracy"] == pytest.approx(np.mean(scores.argmax(1) == targets))
    expected = np.mean([np.mean(scores.argmax(1)[targets == k] == k) for k in (0, 1, 3)])
    assert found["balanced_accuracy"] == pytest.approx(expected) != pytest.approx(found["accuracy"])
    assert balanced_accuracy_score(targets, scores.argmax(1)) == pytest.approx(expected)
    assert observed(multiclass_statistic(np.ones((90, 4)), targets), 90) == {"accuracy": 0, "balanced_accuracy": 0}
    nobody = (targets != 3).astype(float)[None]
    assert np.isnan(multiclass_statistic(scores, targets)(nobody)["balanced_accuracy"]).all()


def test_foils():
    image = np.array([[1.0, 0], [1, 0], [1, 0], [1, 0]])
    true = np.array([[2.0, 0], [1, 1], [0, 1], [1, 1]])
    foil = np.array([[0.0, 1], [3, 0], [1, 1], [5, 5]])  # right, wrong, wrong, a tie
    assert observed(foil_statistic("foil/side", image, true, foil), 4) == {"foil/side": 0.25}
