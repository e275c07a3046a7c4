"""The probe finds a planted direction, chooses its strength on validation alone, and says where it cannot learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from raymed.metrics.probe import STRENGTHS, linear_probe, probe_findings


def split(n, seed, classes=2, noise=1.0, dim=12):
    """Embeddings (N, D) in which the first directions tell the class."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=n)
    features = noise * random.normal(size=(n, dim))
    features[:, :classes] += 2 * np.eye(classes)[labels]
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), labels


def test_it_finds_what_is_there():
    (train, labels), (val, val_labels), (test, test_labels) = split(300, 0), split(100, 1), split(200, 2)
    probe = linear_probe(train, labels, val, val_labels, test)
    assert roc_auc_score(test_labels, probe.probabilities[:, 1]) > 0.9
    assert probe.strength == min(probe.likelihood, key=probe.likelihood.__getitem__)
    assert sorted(probe.likelihood) == sorted(STRENGTHS)
    np.testing.assert_allclose(probe.probabilities.sum(axis=1), 1)


def test_noise_asks_for_a_strong_penalty_and_signal_for_a_weak_one():
    random = np.random.default_rng(3)
    noise = [random.normal(size=(60, 40)) for _ in range(3)]
    labels = [random.integers(2, size=60) for _ in range(2)]
    assert linear_probe(noise[0], labels[0], noise[1], labels[1], noise[2]).strength <= 0.01
    (train, train_labels), (val, val_labels) = split(300, 4, noise=0.3), split(300, 5, noise=0.3)
    assert linear_probe(train, train_labels, val, val_labels, val).strength >= 1


def test_several_classes_and_labels_that_training_never_saw():
    (train, labels), (val, val_labels), (test, test_labels) = (
        split(n, s, classes=4) for n, s in ((300, 0), (80, 1), (90, 2))
    )
    val_labels[0] = 9
    probe = linear_probe(train, labels, val, val_labels, test, strengths=[0.1, 1.0])
    assert probe.probabilities.shape == (90, 4) and probe.classes.tolist() == [0, 1, 2, 3]
    assert np.mean(probe.classes[probe.probabilities.argmax(1)] == test_labels) > 0.6
    assert all(np.isfinite(value) for value in probe.likelihood.values())


def test_findings_one_by_one():
    (train, labels), (val, val_labels), (test, test_labels) = split(200, 0), split(80, 1), split(80, 2)
    rare = np.arange(200) == 5
    scores, strengths = probe_findings(
        train,
        np.stack([labels, rare, 1 - labels], axis=1),
        val,
        np.stack([val_labels, np.zeros(80), 1 - val_labels], axis=1),
        test,
    )
    assert roc_auc_score(test_labels, scores[:, 0]) > 0.85
    np.testing.assert_allclose(scores[:, 2], 1 - scores[:, 0], atol=1e-3)
    assert np.isnan(scores[:, 1]).all() and np.isnan(strengths[1]) and strengths[0] == pytest.approx(strengths[2])
