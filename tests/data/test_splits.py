"""Whole patients on one side, classes in proportion."""

import numpy as np
import pandas as pd
import pytest

from raymed.config import UserError
from raymed.data.splits import assign, check_enough, check_filled, crossing, duplicate_notes, linked

FRACTIONS = (0.65, 0.15, 0.2)


@pytest.fixture
def cohort():
    """800 images of 250 patients with 1 to 9 images each; 22 % positive, some patients with both classes."""
    rng = np.random.default_rng(0)
    sizes = rng.geometric(0.35, 250).clip(max=9)
    groups = np.repeat([f"p{i}" for i in range(250)], sizes)
    sick = np.repeat(rng.random(250) < 0.3, sizes) & (rng.random(len(groups)) < 0.8)
    return groups.tolist(), np.where(sick, "sick", np.where(rng.random(len(groups)) < 0.5, "well", "other")).tolist()


def test_patients_stay_whole_and_classes_in_proportion(cohort):
    groups, labels = cohort
    split = assign(groups, labels, "sick", FRACTIONS, seed=0)
    table = pd.DataFrame({"group": groups, "label": labels, "split": split})
    assert table.groupby("group")["split"].nunique().max() == 1
    shares = pd.crosstab(table["label"], table["split"], normalize="index")[["train", "val", "test"]]
    np.testing.assert_allclose(shares, np.tile(FRACTIONS, (3, 1)), atol=0.02)


def test_the_split_hangs_on_the_seed_and_not_on_the_order_of_rows(cohort):
    groups, labels = cohort
    split = np.array(assign(groups, labels, "sick", FRACTIONS, seed=0))
    order = np.random.default_rng(1).permutation(len(groups))
    shuffled = assign([groups[i] for i in order], [labels[i] for i in order], "sick", FRACTIONS, seed=0)
    np.testing.assert_array_equal(shuffled, split[order])
    assert (np.array(assign(groups, labels, "sick", FRACTIONS, seed=1)) != split).mean() > 0.2


def test_a_rare_class_is_in_every_split():
    labels = ["sick"] * 3 + ["well"] * 97
    split = assign([str(i) for i in range(100)], labels, "sick", FRACTIONS, seed=0)
    assert sorted(split[:3]) == ["test", "train", "val"]
    assert [split.count(name) for name in ("train", "val", "test")] == pytest.approx([65, 15, 20], abs=2)


def test_two_splits_where_one_is_given():
    split = assign([str(i) for i in range(100)], ["sick", "well"] * 50, "sick", (0.85, 0.15, 0), seed=0)
    assert set(split) == {"train", "val"} and split.count("val") == pytest.approx(15, abs=1)


def test_too_few_patients():
    groups, labels = ["p1", "p1", "p2", "p3", "p4", "p5"], ["sick", "sick", "sick", "well", "well", "well"]
    with pytest.raises(
        UserError, match="the positive class 'sick' has 2 patients, too few to divide into train, val, test"
    ):
        check_enough(groups, labels, "sick", ("train", "val", "test"), "patient")
    check_enough(groups, labels, "sick", ("train", "val"), "patient")
    with pytest.raises(UserError, match="the other classes have 1 image,"):
        check_enough(["a", "b", "c"], ["sick", "sick", "well"], "sick", ("train", "val"), "image")


def test_duplicates_join_what_they_connect():
    """p1 and p2 share a picture, and p2 shares another with the image whose patient is unknown."""
    patients, hashes = ["p1", "p1", "p2", "", "p3", "p2"], ["a", "b", "b", "c", "d", "c"]
    names = linked(patients, hashes)
    assert names[0] == names[1] == names[2] == names[3] == names[5] != names[4]
    assert linked(None, ["a", "b", "a"]) == ["a", "b", "a"]
    assert len(set(linked(["", "", "p"], ["x", "y", "z"]))) == 3


def test_the_training_side_loses():
    table = pd.DataFrame(
        {
            "row": [1, 2, 3, 4, 5, 6, 7],
            "split": ["train", "train", "val", "test", "val", "train", "test"],
            "patient": ["p", "q", "q", "r", "r", "", ""],
        },
        index=[10, 11, 12, 13, 14, 15, 16],
    )
    problems = crossing(table, "patient", "patient in a later split too")
    assert [(p.row, p.text) for p in problems] == [
        (2, "(train) the same patient as row 3 (val)"),
        (5, "(val) the same patient as row 4 (test)"),
    ]
    assert not any("q" in p.text.split("as row")[1] or "r (" in p.text for p in problems)


def test_every_split_needs_both_sides():
    table = pd.DataFrame({"split": ["train"] * 2 + ["val"] * 2 + ["test"] * 2, "label": ["sick", "well"] * 3})
    check_filled(table, "sick")
    with pytest.raises(UserError, match="the split val has no image of the positive class 'sick'"):
        check_filled(table.drop(index=2), "sick")
    with pytest.raises(UserError, match="the split test has no image but those of the positive class 'sick'"):
        check_filled(table.drop(index=5), "sick")
    with pytest.raises(UserError, match="the split test has no image "):
        check_filled(table.drop(index=[4, 5]), "sick")


def test_notes_on_duplicates_that_stay():
    table = pd.DataFrame(
        {
            "row": [1, 2, 3, 4],
            "split": ["train", "train", "train", "test"],
            "pixels": ["a", "a", "b", "c"],
            "label": ["sick", "well", "well", "well"],
        }
    )
    assert duplicate_notes(table) == [
        "exact duplicates within train, kept: 1 row (2)",
        "the same image under two labels, kept: 2 rows (1, 2)",
    ]
