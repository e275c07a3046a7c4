"""Scores of cases by hand, whatever the order of images; what a case's images must have in common."""

import numpy as np
import pytest

from raymed.config import UserError
from raymed.metrics.levels import AGGREGATES, aggregate, level_table, unit_numbers

SCORES = np.array([0.2, 0.9, 0.5, 0.6, 0.1])
CASES = np.array([7, 3, 7, 7, 9])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [0.9, 1.3 / 3, 0.1]),
        ("max", [0.9, 0.6, 0.1]),
        ("noisy_or", [0.9, 1 - 0.8 * 0.5 * 0.4, 0.1]),
    ],
)
def test_by_hand(how, expected):
    scores, ids = aggregate(SCORES, CASES, how)
    assert ids.tolist() == [3, 7, 9]
    assert scores == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("how", AGGREGATES)
def test_the_order_of_rows_does_not_change_a_bit(how):
    random = np.random.default_rng(0)
    scores, units = random.random(500), random.integers(60, size=500)
    expected = aggregate(scores, units, how)
    for _ in range(5):
        order = random.permutation(500)
        found = aggregate(scores[order], units[order], how)
        assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


@pytest.mark.filterwarnings("error")
def test_noisy_or_at_its_ends():
    scores, _ = aggregate([1.0, 0.3, 0.0, 0.0, 1e-18, 2e-18], [0, 0, 1, 1, 2, 2], "noisy_or")
    assert scores[:2].tolist() == [1.0, 0.0]
    assert scores[2] == pytest.approx(3e-18, rel=1e-12, abs=0)  # 1 - prod(1 - p) would be 0


def test_noisy_or_is_the_chance_of_any():
    random = np.random.default_rng(1)
    p = np.array([0.1, 0.35, 0.2])
    found, _ = aggregate(p, [0, 0, 0], "noisy_or")
    assert (random.random((200_000, 3)) < p).any(axis=1).mean() == pytest.approx(found[0], abs=0.005)


def test_units_of_each_level():
    patients, cases = np.array([0, 0, 0, 0, 1]), np.array([5, 5, 5, 8, 9])
    sides = np.array(["left", "right", "left", "left", "left"])
    assert unit_numbers("image", patients).tolist() == [0, 1, 2, 3, 4]
    assert unit_numbers("case+side", patients, cases, sides).tolist() == [0, 1, 0, 2, 3]
    assert unit_numbers("case", patients, cases, sides).tolist() == [5, 5, 5, 8, 9]
    assert unit_numbers("patient", patients, cases, sides).tolist() == [0, 0, 0, 0, 1]


def test_units_that_cannot_be_told():
    codes, sides = np.arange(3), np.array(["left", "", ""])
    with pytest.raises(UserError, match="--data.case COLUMN"):
        unit_numbers("case", codes)
    with pytest.raises(UserError, match="--data.side COLUMN"):
        unit_numbers("case+side", codes, codes)
    with pytest.raises(UserError, match="no side is stated in rows 12, 13"):
        unit_numbers("case+side", codes, codes, sides, rows=np.array([11, 12, 13]))
    with pytest.raises(UserError, match="did you mean 'patient'"):
        unit_numbers("patients", codes)  # type: ignore[arg-type]


def test_table_of_cases():
    table = level_table(SCORES, [1, 0, 1, 1, 0], ["b", "a", "b", "b", "c"], CASES, "max")
    assert (table.level, len(table)) == ("case", 3)
    assert table.scores.tolist() == [0.9, 0.6, 0.1]
    assert table.targets.tolist() == [0, 1, 0]
    assert table.patients.tolist() == ["a", "b", "c"]
    assert table.units.tolist() == [3, 7, 9]
    assert table.num_images.tolist() == [1, 3, 1]
    assert table.targets.dtype == np.int64


def test_a_table_of_images_is_what_it_is_made_of():
    targets, patients = np.array([1, 0, 1, 1, 0]), np.array([4, 4, 2, 1, 0])
    table = level_table(SCORES, targets, patients, unit_numbers("image", patients), "mean", level="image")
    for found, given in ((table.scores, SCORES), (table.targets, targets), (table.patients, patients)):
        assert np.array_equal(found, given)


def test_labels_that_differ_within_a_case_are_named_by_row():
    with pytest.raises(UserError) as error:
        level_table(SCORES, [1, 0, 0, 1, 0], np.zeros(5), CASES, "mean", rows=[21, 22, 23, 24, 25])
    assert "labels of one case differ" in str(error.value)
    assert "rows 21, 23, 24 (labels 1, 0, 1)" in str(error.value)
    assert "22" not in str(error.value) and "25" not in str(error.value)


def test_a_case_of_two_patients_is_refused():
    with pytest.raises(UserError, match="several patients: give each case a name of its own\n  rows 1, 3, 4$"):
        level_table(SCORES, np.ones(5), ["x", "y", "x", "z", "y"], CASES, "mean")


def test_long_lists_are_cut():
    units = np.repeat(np.arange(40), 2)
    with pytest.raises(UserError, match="40 in all") as error:
        level_table(np.full(80, 0.5), np.tile([0, 1], 40), units, units, "mean")
    assert len(str(error.value).splitlines()) == 12


@pytest.mark.parametrize(
    ("scores", "targets", "patients", "how", "message"),
    [
        ([0.1, np.nan], [0, 1], [0, 1], "mean", "scores must be >= 0 and <= 1, got nan"),
        ([0.1, 1.1], [0, 1], [0, 1], "mean", "scores must be >= 0 and <= 1, got 1.1"),
        ([0.1], [0, 1], [0, 1], "mean", r"got \(1,\) and \(2,\)"),
        ([0.1, 0.2], [0], [0, 1], "mean", r"both be \(2,\)"),
        ([0.1, 0.2], [0, 2], [0, 1], "mean", "targets must be 0 or 1, got 2"),
        ([0.1, 0.2], [0, 1], [0, 1], "noisy-or", "did you mean 'noisy_or'"),
    ],
)
def test_bad_input(scores, targets, patients, how, message):
    with pytest.raises(UserError, match=message):
        level_table(scores, targets, patients, [0, 1], how)
