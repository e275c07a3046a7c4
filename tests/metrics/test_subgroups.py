"""Figures of a subgroup are those of its rows alone; small ones have none; a planted difference is seen."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from raymed.config import UserError
from raymed.metrics import binary_metrics
from raymed.metrics.operating import wilson
from raymed.metrics.subgroups import age_band, subgroup_figures


def cohort(num=400, seed=0):
    """The model sees nothing at site B; two units a patient."""
    random = np.random.default_rng(seed)
    patients = np.arange(num) // 2
    targets = (random.random(num) < 0.4).astype(int)
    sites = np.where(patients % 2 == 0, "A", "B")
    logits = np.where(sites == "A", 2 * (2 * targets - 1), 0) + random.normal(size=num)
    return 1 / (1 + np.exp(-logits)), targets, patients, sites


def test_figures_are_those_of_the_rows_alone():
    scores, targets, patients, sites = cohort()
    found = subgroup_figures(scores, targets, patients, 0.4, {"site": sites.tolist()}, n_boot=200)
    assert [(s.attribute, s.group, s.num, s.num_patients) for s in found] == [
        ("site", "A", 200, 100),
        ("site", "B", 200, 100),
    ]
    for subgroup in found:
        rows = sites == subgroup.group
        alone = binary_metrics(scores[rows], targets[rows], 0.4)
        assert subgroup.auroc is not None and subgroup.sensitivity is not None and subgroup.specificity is not None
        assert subgroup.auroc["mean"] == pytest.approx(roc_auc_score(targets[rows], scores[rows]), abs=1e-12)
        assert subgroup.sensitivity["mean"] == pytest.approx(alone["sensitivity"], abs=1e-12)
        assert subgroup.specificity["mean"] == pytest.approx(alone["specificity"], abs=1e-12)
        assert (subgroup.num_positive, subgroup.num_negative) == (targets[rows].sum(), (1 - targets[rows]).sum())
        positives = (int((scores[rows & (targets == 1)] >= 0.4).sum()), subgroup.num_positive)
        assert (subgroup.sensitivity["analytic_low"], subgroup.sensitivity["analytic_high"]) == wilson(*positives)
        assert subgroup.auroc["num_patients"] == 100
    good, blind = (subgroup.auroc for subgroup in found)
    assert good["ci_low"] > 0.9 and blind["ci_low"] < 0.5 < blind["ci_high"] < good["ci_low"]


def test_too_few_have_no_figure():
    targets = np.array([1] * 9 + [0] * 60 + [1] * 10 + [0] * 10 + [1] * 40 + [0] * 9)
    sites = ["few positives"] * 69 + ["just enough"] * 20 + ["few negatives"] * 49
    scores = np.linspace(0.01, 0.99, len(targets))
    found = {s.group: s for s in subgroup_figures(scores, targets, np.arange(138), 0.5, {"site": sites}, n_boot=50)}
    assert found["few positives"].too_few == "too few: 9 positive where 10 patients are needed"
    assert found["few negatives"].too_few == "too few: 9 negative where 10 patients are needed"
    for name in ("few positives", "few negatives"):
        subgroup = found[name]
        assert subgroup.auroc is subgroup.sensitivity is subgroup.specificity is None
    enough = found["just enough"]
    assert enough.too_few == "" and None not in (enough.auroc, enough.sensitivity, enough.specificity)
    assert (found["few positives"].num, found["few positives"].num_positive) == (69, 9)


def test_patients_are_counted_and_not_their_images():
    targets, patients = np.tile([1, 0], 30), np.arange(60) // 12
    (found,) = subgroup_figures(np.full(60, 0.5), targets, patients, 0.5, {"site": ["A"] * 60})
    assert (found.num_positive, found.num_patients) == (30, 5)
    assert found.too_few == "too few: 5 positive and 5 negative where 10 patients are needed"
    (found,) = subgroup_figures(np.full(60, 0.5), targets, patients, 0.5, {"site": ["A"] * 60}, min_patients=5)
    assert found.too_few == "" and found.auroc is not None and found.auroc["mean"] == 0.5


def test_every_attribute_and_order_of_groups():
    scores, targets, patients, _ = cohort(12)
    ages = age_band(["17", "9", "84", "", "30", "29", "31", "80", "65", "64", "5", "100"])
    sites = ["b", "a", "", "10", "9", "b", "a", " ", "a", "a", "9", "b"]
    found = subgroup_figures(scores, targets, patients, 0.5, {"age": ages, "site": sites})
    assert [s.group for s in found if s.attribute == "age"] == [
        "0-17",
        "18-29",
        "30-39",
        "50-64",
        "65-79",
        "80+",
        "not stated",
    ]
    assert [s.group for s in found if s.attribute == "site"] == ["9", "10", "a", "b", "not stated"]
    assert [s.num for s in found if s.attribute == "site"] == [2, 1, 4, 3, 2]


def test_age_bands():
    assert age_band(["0", "17", "18", "29", "80", "121", "", " 40 "]) == [
        "0-17", "0-17", "18-29", "18-29", "80+", "80+", "", "40-49",
    ]  # fmt: skip
    assert age_band(["34", "35"], edges=[35]) == ["0-34", "35+"]
    for wrong in ("034Y", "34.5", "-3", "about 40"):
        with pytest.raises(UserError, match="row 2: age must be in whole years"):
            age_band(["20", wrong])


def test_an_attribute_of_the_wrong_length():
    with pytest.raises(UserError, match="'site' must have 4 values, got 3"):
        subgroup_figures([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1], np.arange(4), 0.5, {"site": ["A"] * 3})
