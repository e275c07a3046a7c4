"""Kappa against published examples and scikit-learn; consensus and readers' points by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from raymed.config import UserError
from raymed.metrics import bootstrap_ci
from raymed.metrics.agreement import (
    UNREAD,
    agreement_figures,
    cohen_statistic,
    consensus,
    fleiss_statistic,
    reader_points,
    readings_of,
)

FOURTEEN_RATERS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip
"""How many of 14 raters put each of 10 subjects into 5 categories: the worked example of Fleiss' kappa, 0.210."""


def alone(statistic, num):
    return {name: float(value[0]) for name, value in statistic(np.ones((1, num))).items()}


def pairs(both, first, second, neither):
    """Readings of two readers from the four cells of their table."""
    return np.repeat([1, 1, 0, 0], [both, first, second, neither]), np.repeat(
        [1, 0, 1, 0], [both, first, second, neither]
    )


@pytest.mark.parametrize(
    ("cells", "kappa", "agreement"),
    [
        ((20, 5, 10, 15), 0.40, 0.70),
        ((45, 15, 25, 15), 0.1304, 0.60),
        ((25, 35, 5, 35), 0.2593, 0.60),
        ((40, 9, 6, 45), 0.70, 0.85),  # Feinstein and Cicchetti, 1990: as much agreement,
        ((80, 10, 5, 5), 0.32, 0.85),  # and a lower kappa where one class is rare
    ],
)
def test_cohen_as_published(cells, kappa, agreement):
    found = alone(cohen_statistic(*pairs(*cells)), sum(cells))
    assert found["kappa"] == pytest.approx(kappa, abs=0.005 if kappa in (0.70, 0.32) else 5e-5)
    assert found["agreement"] == pytest.approx(agreement)


def test_cohen_equals_scikit_learn_in_every_resample():
    random = np.random.default_rng(0)
    first = random.integers(3, size=80)
    second = np.where(random.random(80) < 0.6, first, random.integers(3, size=80))
    counts = random.multinomial(80, np.full(80, 1 / 80), size=20)
    found = cohen_statistic(first, second)(counts)
    for r, count in enumerate(counts):
        expected = cohen_kappa_score(np.repeat(first, count), np.repeat(second, count))
        assert found["kappa"][r] == pytest.approx(expected, abs=1e-12)


def test_fleiss_as_published():
    readings = np.array([np.repeat(np.arange(5), votes) for votes in FOURTEEN_RATERS])
    found = alone(fleiss_statistic(readings), 10)
    assert found["kappa"] == pytest.approx(0.210, abs=5e-4)
    assert found["agreement"] == pytest.approx(0.378, abs=5e-4)


def test_fleiss_by_hand_with_readings_missing():
    readings = np.array([[0, 0, 1], [1, 1, UNREAD], [1, 1, 1], [0, UNREAD, UNREAD], [0, 0, UNREAD]])
    # Agreeing pairs of rows with two or more readings: 1/3, 1, 1, 1; of their 10 readings 6 are 1.
    agreement, by_chance = (1 / 3 + 3) / 4, 0.6**2 + 0.4**2
    found = alone(fleiss_statistic(readings), 5)
    assert found["agreement"] == pytest.approx(agreement)
    assert found["kappa"] == pytest.approx((agreement - by_chance) / (1 - by_chance))
    shuffled = np.random.default_rng(0).permuted(readings, axis=1)  # who read does not matter
    assert alone(fleiss_statistic(shuffled), 5) == pytest.approx(found)


def test_fleiss_counts_equal_repeated_rows():
    random = np.random.default_rng(1)
    readings = random.integers(-1, 3, size=(40, 4))
    counts = random.multinomial(40, np.full(40, 1 / 40), size=10)
    found = fleiss_statistic(readings)(counts)
    for r, count in enumerate(counts):
        expected = alone(fleiss_statistic(np.repeat(readings, count, axis=0)), 40)
        assert {name: value[r] for name, value in found.items()} == pytest.approx(expected)


def test_readers_who_guess_agree_by_chance():
    random = np.random.default_rng(2)
    readings = (random.random((20_000, 3)) < 0.2).astype(int)
    assert alone(fleiss_statistic(readings), 20_000)["kappa"] == pytest.approx(0, abs=0.02)
    assert alone(cohen_statistic(readings[:, 0], readings[:, 1]), 20_000)["kappa"] == pytest.approx(0, abs=0.02)


@pytest.mark.filterwarnings("error")
def test_kappa_of_one_class_is_undefined():
    same = np.zeros(6, int)
    assert math.isnan(alone(cohen_statistic(same, same), 6)["kappa"])
    assert math.isnan(alone(fleiss_statistic(np.zeros((6, 3), int)), 6)["kappa"])
    assert alone(cohen_statistic(same, same), 6)["agreement"] == 1
    assert math.isnan(alone(cohen_statistic(same, np.full(6, UNREAD)), 6)["agreement"])


def test_rows_that_one_reader_lacks_do_not_count():
    first, second = np.array([0, 1, 1, 0, UNREAD, 1]), np.array([0, 1, 0, 0, 1, UNREAD])
    assert alone(cohen_statistic(first, second), 6) == pytest.approx(alone(cohen_statistic(first[:4], second[:4]), 4))


def test_agreement_of_all_and_of_every_two():
    random = np.random.default_rng(3)
    truth = random.integers(2, size=120)
    readings = np.column_stack([np.where(random.random(120) < right, truth, 1 - truth) for right in (0.95, 0.9, 0.6)])
    found = agreement_figures(readings, ["kim", "lee", "park"], np.arange(120) // 2, n_boot=200)
    assert list(found) == ["all readers", "kim, lee", "kim, park", "lee, park"]
    assert found["kim, lee"]["kappa"]["mean"] > found["kim, park"]["kappa"]["ci_high"]
    for figures in found.values():
        assert figures["kappa"]["ci_low"] < figures["kappa"]["mean"] < figures["kappa"]["ci_high"]
        assert figures["kappa"]["num_patients"] == 60
    direct = bootstrap_ci([fleiss_statistic(readings)], [np.arange(120) // 2], n_boot=200)
    assert found["all readers"]["kappa"] == pytest.approx(direct["kappa"], nan_ok=True)


READINGS = np.array(
    [[1, 1, 1], [1, 1, 0], [0, 1, UNREAD], [UNREAD, UNREAD, UNREAD], [0, UNREAD, UNREAD], [0, 1, 2], [2, 2, 0]]
)


def test_consensus_by_hand():
    found = consensus(READINGS)
    assert found.labels.tolist() == [1, 1, UNREAD, UNREAD, 0, UNREAD, 2]
    assert (found.unanimous, found.majority, found.tied, found.unread) == (2, 2, 2, 1)


def test_consensus_of_nobody():
    found = consensus(np.full((3, 2), UNREAD))
    assert found.labels.tolist() == [UNREAD] * 3 and found.unread == 3


def test_reader_points_by_hand():
    readings = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0], [UNREAD, 1, 1]])
    reference = np.array([1, 1, 0, 0, 0, 1])
    points = reader_points(readings, ["a", "b", "c"], np.arange(6), reference, n_boot=50)
    # a against where b and c agree (rows 1, 3, 4, 5): positives 1, 3; he says 1, 0; negatives 4, 5; he says 0, 1.
    others = points["a"]["others"]
    assert (others["sensitivity"]["count"], others["sensitivity"]["total"]) == (1, 2)
    assert (others["specificity"]["count"], others["specificity"]["total"]) == (1, 2)
    own = points["a"]["reference"]
    assert (own["sensitivity"]["count"], own["sensitivity"]["total"]) == (2, 2)
    assert (own["specificity"]["count"], own["specificity"]["total"]) == (2, 3)
    c = points["c"]["reference"]
    assert (c["sensitivity"]["count"], c["sensitivity"]["total"], c["specificity"]["count"]) == (2, 3, 2)
    assert "reference" not in reader_points(readings, ["a", "b", "c"], np.arange(6), n_boot=2)["b"]


def test_a_reader_does_not_make_the_standard_he_is_held_to():
    """One reader of three guesses: against a consensus that holds his own readings he looks better than he is."""
    random = np.random.default_rng(4)
    truth = random.integers(2, size=4000)
    noisy = np.where(random.random((2, 4000)) < 0.8, truth, 1 - truth)
    readings = np.column_stack([random.integers(2, size=4000), *noisy])
    points = reader_points(readings, ["guesses", "b", "c"], np.arange(4000), consensus(readings).labels, n_boot=2)
    assert points["guesses"]["others"]["sensitivity"]["mean"] == pytest.approx(0.5, abs=0.03)
    assert points["guesses"]["reference"]["sensitivity"]["mean"] > 0.6


def test_readings_from_texts():
    columns = {"reader1": ["patent", "occluded", ""], "reader2": ["occluded", "occluded", "patent"]}
    assert readings_of(columns, ["patent", "occluded"]).tolist() == [[0, 1], [1, 1], [UNREAD, 0]]
    with pytest.raises(UserError, match="reader2, row 2: .* 'patent', 'occluded' or empty, got 'ocluded'"):
        readings_of({"reader1": ["patent"] * 2, "reader2": ["patent", "ocluded"]}, ["patent", "occluded"])
    with pytest.raises(UserError, match="got 1 of reader1, 2 of reader2"):
        readings_of({"reader1": ["a"], "reader2": ["a", "a"]}, ["a"])


def test_readers_that_do_not_fit():
    with pytest.raises(UserError, match=r"R >= 2 readers, got \(4, 1\) of 1 readers"):
        agreement_figures(np.zeros((4, 1), int), ["a"], np.arange(4))
    found = reader_points(np.array([[1, 1], [0, 0]]), ["a", "b"], np.arange(2), np.full(2, UNREAD))
    assert all(set(points) == {"others"} for points in found.values())
