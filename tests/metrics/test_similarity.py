"""Pairs that do not belong together are drawn from other cases; calibration mends what a sharp scale distorts."""

import numpy as np
import pytest

from raymed.config import UserError
from raymed.metrics.similarity import calibrate_similarity, pair_scores


def embeddings(n, seed, noise=1.0):
    random = np.random.default_rng(seed)
    image = random.normal(size=(n, 16))
    return image, image + noise * random.normal(size=image.shape)


def test_random_pairs_share_no_group():
    image, text = embeddings(60, 0)
    text[:] = np.eye(16)[np.arange(60) // 6]  # the text says which of 10 cases it is of
    image = text.copy()
    scores = pair_scores(image, text, np.stack([np.arange(60), 100 + np.arange(60) // 6], axis=1))
    assert scores.targets.tolist() == [1] * 60 + [0] * 60 and scores.rows.tolist() == [*range(60)] * 2
    np.testing.assert_allclose(scores.cosines, scores.targets, atol=1e-7)
    again = pair_scores(*embeddings(60, 0), np.arange(60), seed=3)
    assert again.cosines.tolist() == pair_scores(*embeddings(60, 0), np.arange(60), seed=3).cosines.tolist()


def test_rows_without_another_case():
    image, text = embeddings(5, 0)
    scores = pair_scores(image, text, np.array([[0, 1], [0, 2], [1, 2], [1, 0], [7, 0]]))
    assert scores.targets.tolist() == [1, 1, 1, 1, 1, 0, 0]  # rows 2 and 4 alone have nothing in common
    assert scores.rows.tolist()[5:] == [2, 4]
    with pytest.raises(UserError, match="all pairs share a case"):
        pair_scores(image, text, np.zeros(5))


@pytest.mark.parametrize(("scale", "bias"), [(100.0, 0.0), (14.3, 0.0), (10.0, -10.0)])
def test_calibration_mends_the_networks_own_logit(scale, bias):
    val, test = (pair_scores(*embeddings(800, seed), np.arange(800)) for seed in (1, 2))
    calibration, report = calibrate_similarity(val, test, scale, bias)
    assert report["after"]["ece"] < 0.05 < report["before"]["ece"]
    assert report["after"]["nll"] < report["before"]["nll"]
    assert report["pairs"] == {"val": 1600, "test": 1600}
    cosines = np.linspace(-1, 1, 9)
    found = calibration(cosines)
    assert (np.diff(found) > 0).all() and found[0] < 0.05 and found[-1] > 0.95


def test_what_has_no_matter_says_one_half():
    random = np.random.default_rng(4)
    val, test = (pair_scores(*random.normal(size=(2, 500, 16)), np.arange(500), seed) for seed in (1, 2))
    calibration, report = calibrate_similarity(val, test, 50.0)
    assert np.abs(calibration(test.cosines) - 0.5).max() < 0.15
    assert report["before"]["ece"] > 0.3 and report["after"]["ece"] < 0.06
