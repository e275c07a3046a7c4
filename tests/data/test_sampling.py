"""Samplers are pure functions of (seed, step) that visit everything."""

import numpy as np
import pytest

from raymed.config import UserError
from raymed.data.sampling import BalancedSampler, RandomSampler

ROWS = np.arange(100, 137)


def stream(sampler, num_steps, start=0):
    return np.concatenate([sampler.indices(step) for step in range(start, start + num_steps)])


def test_each_row_once_an_epoch():
    """5 epochs of 37 rows in 37 batches of 5: the borders of the epochs fall inside batches."""
    drawn = stream(RandomSampler(ROWS, batch_size=5, seed=0), 37).reshape(5, 37)
    for epoch in drawn:
        np.testing.assert_array_equal(np.sort(epoch), ROWS)
    assert all((a != b).any() for a, b in zip(drawn, drawn[1:], strict=False))


def test_batch_larger_than_the_data():
    batch = RandomSampler(ROWS, batch_size=100, seed=0).indices(0)
    assert len(batch) == 100
    counts = np.unique(batch, return_counts=True)[1]
    assert set(counts) == {2, 3} and counts.sum() == 100


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: RandomSampler(ROWS, 8, seed),
        lambda seed: BalancedSampler(ROWS, ROWS % 3 == 0, 8, seed),
    ],
)
def test_pure_and_resumable(make):
    whole = stream(make(7), 30)
    np.testing.assert_array_equal(stream(make(7), 10, start=20), whole[160:])
    sampler = make(7)
    sampler.indices(29), sampler.indices(3)
    np.testing.assert_array_equal(sampler.indices(0), whole[:8])
    assert (stream(make(8), 30) != whole).mean() > 0.8


def test_balance_is_exact_and_nothing_is_left_out():
    labels = (np.arange(37) < 5).astype(int)  # 5 of class 1, 32 of class 0
    sampler = BalancedSampler(ROWS, labels, batch_size=8, seed=0)
    batches = [sampler.indices(step) for step in range(40)]
    assert all(np.isin(batch, ROWS[:5]).sum() == 4 for batch in batches)
    drawn = np.concatenate(batches)
    rare, common = drawn[np.isin(drawn, ROWS[:5])], drawn[~np.isin(drawn, ROWS[:5])]
    assert (np.unique(rare, return_counts=True)[1] == 32).all()
    assert (np.unique(common, return_counts=True)[1] == 5).all()


def test_order_within_a_balanced_batch_is_shuffled():
    labels = np.arange(37) % 2
    sampler = BalancedSampler(ROWS, labels, batch_size=16, seed=0)
    first_half = [(sampler.indices(step)[:8] % 2).mean() for step in range(50)]
    assert 0.4 < np.mean(first_half) < 0.6 and np.std(first_half) > 0.05


def test_balanced_batch_larger_than_a_class():
    sampler = BalancedSampler(ROWS, np.arange(37) < 3, batch_size=20, seed=0)
    rare = [row for row in sampler.indices(0) if row in ROWS[:3]]
    assert len(rare) == 10 and set(np.unique(rare, return_counts=True)[1]) <= {3, 4}


def test_bad_sizes():
    with pytest.raises(UserError, match="multiple of the number of classes"):
        BalancedSampler(ROWS, ROWS % 2, batch_size=7, seed=0)
    with pytest.raises(UserError, match="batch_size must be >= 1"):
        RandomSampler(ROWS, batch_size=0, seed=0)
    with pytest.raises(UserError, match="images to draw from"):
        RandomSampler(ROWS[:0], batch_size=1, seed=0)
