"""Attention pooling by hand, at its ends, and whatever the order of images."""

import numpy as np
import pytest
import torch
from scipy.special import expit

from raymed.config import UserError
from raymed.models.attention_pool import AttentionPool, case_logits, pooled

LOGITS = np.array([2.0, -1.0, 0.5, 3.0, -4.0])
ENERGIES = np.array([0.0, 5.0, np.log(2.0), np.log(3.0), -2.0])
CASES = np.array([7, 3, 7, 7, 9])


def test_energies_by_hand():
    random = np.random.default_rng(0)
    features, v, u = random.normal(size=(6, 4)), random.normal(size=(3, 4)), random.normal(size=(3, 4))
    w, centre, scale = random.normal(size=3), random.normal(size=4), random.random(4) + 0.5
    pool = AttentionPool(4, hidden=3)
    named = {"signal.weight": v, "gate.weight": u, "weight": w, "centre": centre, "scale": scale}
    pool.load_state_dict({name: torch.tensor(value) for name, value in named.items()})
    h = (features - centre) / scale
    expected = [w @ (np.tanh(v @ x) / (1 + np.exp(-(u @ x)))) for x in h]
    energies = pool(torch.tensor(features))
    assert energies.dtype == torch.float32
    assert energies.detach().numpy() == pytest.approx(expected, abs=1e-5)


def test_pooled_by_hand():
    scores, ids = pooled(LOGITS, ENERGIES, CASES)
    assert ids.tolist() == [3, 7, 9]
    assert scores == pytest.approx([expit(-1.0), expit((2.0 + 2 * 0.5 + 3 * 3.0) / 6), expit(-4.0)], abs=1e-15)


def test_a_new_pool_is_the_mean_of_logits():
    torch.manual_seed(0)
    energies = AttentionPool(8)(torch.randn(5, 8)).detach().numpy()
    scores, _ = pooled(LOGITS, energies, CASES)
    assert scores == pytest.approx(expit([-1.0, 5.5 / 3, -4.0]), abs=1e-15)


@pytest.mark.filterwarnings("error")
def test_high_energies_choose_one_image():
    scores, _ = pooled(LOGITS, 1e6 * ENERGIES, CASES)
    assert scores == pytest.approx(expit([-1.0, 3.0, -4.0]), abs=1e-15)


def test_only_differences_of_energies_within_a_case_count():
    shifted, _ = pooled(LOGITS, ENERGIES + 0.1 * CASES, CASES)
    assert shifted == pytest.approx(pooled(LOGITS, ENERGIES, CASES)[0], abs=1e-15)


def test_a_case_of_one_image_keeps_its_score():
    logits = np.linspace(-40, 40, 81)
    scores, _ = pooled(logits, np.linspace(-3, 3, 81), np.arange(81))
    assert np.array_equal(scores, expit(logits))


def test_the_order_of_images_does_not_change_a_bit():
    random = np.random.default_rng(0)
    logits, energies, cases = random.normal(size=500), random.normal(size=500), random.integers(60, size=500)
    logits[::7] = logits[0]  # ties are told apart by their energies
    expected, ids = pooled(logits, energies, cases)
    for _ in range(5):
        order = random.permutation(500)
        found, found_ids = pooled(logits[order], energies[order], cases[order])
        assert np.array_equal(found, expected) and np.array_equal(found_ids, ids)


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    member = torch.tensor([0, 1, 0, 0, 2])
    logits, energies = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda z, e: case_logits(z, e, member, 3), (logits, energies))


def test_no_images_are_no_cases():
    scores, ids = pooled([], [], [])
    assert len(scores) == len(ids) == 0


def test_what_cannot_be_pooled_is_said():
    with pytest.raises(UserError, match=r"must all be \(N,\), got \(5,\), \(4,\) and \(5,\)"):
        pooled(LOGITS, ENERGIES[:4], CASES)
    with pytest.raises(UserError, match="energies must be finite, got nan"):
        pooled(LOGITS, [0, 0, np.nan, 0, 0], CASES)
    with pytest.raises(UserError, match="logits must be finite, got inf"):
        pooled([0, 0, 0, 0, np.inf], ENERGIES, CASES)
