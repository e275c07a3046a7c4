"""Folds of a cross-validation: every patient is tested once, and by nothing that has seen them."""

import collections
import math
from collections.abc import Sequence

import numpy as np
import pytest

from raymed.config import UserError
from raymed.data.dataset import load
from raymed.data.folds import CrossValidation, RepeatedFold
from raymed.data.folds import folds as repeated_folds
from raymed.data.manifest import DataConfig


@pytest.fixture
def data(make_set, tmp_path):
    """Two images of each of 48 patients, every fourth of whom is ill."""
    patients = np.repeat(np.arange(48), 2)
    manifest = make_set(np.where(patients % 4 == 0, "ill", "well"), patient=patients)
    return load(DataConfig(manifest=str(manifest), positive="ill"), tmp_path / "cache")


def test_normalisation_is_measured_on_the_folds_own_training_images(data):
    fold, other = (RepeatedFold(CrossValidation(3), 0, k).apply(data) for k in (0, 1))
    image = data.batch(fold.splits["train"]).unit_image().double()
    assert fold.preprocess.mean == pytest.approx(image.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert fold.preprocess.mean != data.preprocess.mean
    assert len({fold.fingerprint, other.fingerprint, data.fingerprint}) == 3


@pytest.fixture(scope="module")
def cohort():
    """410 cases of 350 patients, two images each; 102 cases are occluded, some patients have both."""
    rng = np.random.default_rng(0)
    of_case = np.concatenate([np.arange(350), rng.choice(350, 60, replace=False)])
    ill = rng.permutation(410) < 102
    patients = np.repeat([f"p{i}" for i in of_case], 2).tolist()
    return np.repeat(np.where(ill, "occluded", "open"), 2).tolist(), patients, np.repeat(np.arange(410), 2)


def test_every_case_is_held_out_once_a_repeat(cohort):
    labels, patients, cases = cohort
    found = repeated_folds(labels, patients, "occluded", k=5, repeats=3)
    assert len(found) == 15
    for repeat in range(3):
        held_out = [test for _, _, test in found[5 * repeat : 5 * repeat + 5]]
        assert sorted(np.concatenate(held_out)) == list(range(820))
        counts = collections.Counter(case for test in held_out for case in set(cases[test]))
        assert len(counts) == 410 and set(counts.values()) == {1}
    owner = np.array(patients)
    for parts in found:
        assert sorted(np.concatenate(parts)) == list(range(820))
        assert all((np.diff(part) > 0).all() and part.dtype == np.int64 for part in parts)
        train, val, test = (set(owner[part]) for part in parts)
        assert not (train & val or train & test or val & test)


def test_class_shares_are_those_of_the_whole(cohort):
    """Positives 204 of 820; a patient has at most four images, so no fold is further off than that."""
    labels, patients, _ = cohort
    ill = np.array(labels) == "occluded"
    for train, val, test in repeated_folds(labels, patients, "occluded", k=5, repeats=3, val_fraction=0.15):
        assert ill[test].sum() == pytest.approx(204 / 5, abs=4)
        assert (~ill[test]).sum() == pytest.approx(616 / 5, abs=4)
        assert ill[val].sum() == pytest.approx(0.15 * (204 - ill[test].sum()), abs=4)
        assert (~ill[val]).sum() == pytest.approx(0.15 * (616 - (~ill[test]).sum()), abs=4)
        assert len(train) == 820 - len(val) - len(test)


def test_equal_groups_are_dealt_exactly():
    """13 positives and 27 others in 5 folds: 2 or 3, and 5 or 6."""
    labels = ["ill"] * 13 + ["well"] * 27
    found = repeated_folds(labels, [str(i) for i in range(40)], "ill", k=5, repeats=2, seed=7)
    for repeat in (found[:5], found[5:]):
        assert sorted((test < 13).sum() for _, _, test in repeat) == [2, 2, 3, 3, 3]
        assert sorted((test >= 13).sum() for _, _, test in repeat) == [5, 5, 5, 6, 6]


def test_repeats_and_seeds_differ_and_the_order_of_rows_does_not_matter(cohort):
    labels, patients, _ = cohort

    def sides(seed=0, order: Sequence[int] = range(820)):
        found = repeated_folds([labels[i] for i in order], [patients[i] for i in order], "occluded", seed=seed)
        side = np.zeros((3, 820), int)
        for n, (_, _, test) in enumerate(found):
            side[n // 5, np.array(order)[test]] = n % 5
        return side

    once, owner = sides(), np.array(patients)
    for other in (once[1], once[2], sides(seed=1)[0]):
        # Of two independent partitions into fifths a pair in one fold of the first is in one of the second 1 time in 5.
        pairs = np.random.default_rng(0).integers(0, 820, (2, 20_000))
        together = once[0][pairs[0]] == once[0][pairs[1]]
        strangers = owner[pairs[0]] != owner[pairs[1]]
        again = (other[pairs[0]] == other[pairs[1]])[together & strangers]
        assert again.mean() == pytest.approx(0.2, abs=0.03)
    np.testing.assert_array_equal(once, sides())
    np.testing.assert_array_equal(once, sides(order=np.random.default_rng(1).permutation(820).tolist()))


@pytest.mark.parametrize(
    ("num_ill", "num_well", "k", "message"),
    [
        (4, 40, 5, "the positive class 'ill' has 4 patients, too few for 5 folds"),
        (3, 40, 2, "the positive class 'ill' has 3 patients, too few for 2 folds"),
        (40, 1, 2, "the other classes have 1 patient, too few for 2 folds"),
    ],
)
def test_too_few_patients_for_so_many_folds(num_ill, num_well, k, message):
    labels = ["ill"] * num_ill + ["well"] * num_well
    with pytest.raises(UserError, match=message):
        repeated_folds(labels, [str(i) for i in range(len(labels))], "ill", k=k)


@pytest.mark.parametrize(("num", "k"), [(5, 5), (4, 2), (3, 3)])
def test_as_few_patients_as_there_may_be(num, k):
    """Each fold still holds out a positive patient, and leaves one to train on and one for validation."""
    labels = ["ill"] * num + ["well"] * 30
    for parts in repeated_folds(labels, [str(i) for i in range(num + 30)], "ill", k=k, repeats=2):
        assert min((part < num).sum() for part in parts) >= 1
        assert max((part < num).sum() for part in parts[2:]) <= math.ceil(num / k)


def test_a_patient_with_both_classes_may_leave_a_fold_without_one():
    labels, patients = ["ill", "well", "ill", "well", "well", "ill", "ill", "ill"], list("aabbcdef")
    with pytest.raises(UserError, match="lacks a class in .*: use fewer folds"):
        repeated_folds(labels, patients, "ill", k=3, repeats=1)


def test_a_training_of_a_cross_validation_is_a_data_set(data):
    cv = CrossValidation.parse("3x2", seed=4)
    trainings = cv.trainings()
    assert [t.name for t in trainings[2:4]] == ["repeat-0-fold-2", "repeat-1-fold-0"] and len(trainings) == 6
    sets = [training.apply(data) for training in trainings]
    assert sorted(np.concatenate([s.splits["test"] for s in sets[3:]])) == list(range(len(data)))
    assert len({s.fingerprint for s in sets}) == 6
    for found in sets:
        patients = [set(found.patients[indices]) for indices in found.splits.values()]
        assert sum(map(len, patients)) == len(set.union(*patients)) == 48
        assert found.labels[found.splits["test"]].sum() == 2 * 12 / 3
        image = found.batch(found.splits["train"]).unit_image().double()
        assert found.preprocess.mean == pytest.approx(image.mean((0, 2, 3)).tolist(), abs=1e-9)


def test_exact_duplicates_of_two_patients_are_held_out_together(make_set, tmp_path):
    twin = np.random.default_rng(5).integers(0, 256, (16, 16), np.uint8)
    manifest = make_set(["ill", "well"] * 12, images={0: twin, 9: twin}, patient=range(24))
    data = load(DataConfig(manifest=str(manifest), positive="ill", on_problem="skip"), tmp_path / "cache")
    for training in CrossValidation(3, 4).trainings():
        held_out = training.apply(data).splits["test"]
        assert (0 in held_out) == (9 in held_out)


def test_what_follows_cv_is_read_and_checked():
    assert CrossValidation.parse("5x3") == CrossValidation(5, 3)
    assert CrossValidation.parse("10", seed=2) == CrossValidation(10, 1, seed=2)
    assert RepeatedFold(CrossValidation(), 0, 1) == CrossValidation().trainings()[1]
    for text, message in (("five", "--cv must be FOLDSxREPEATS such as 5x3"), ("1x3", "folds must be >= 2, got 1")):
        with pytest.raises(UserError, match=message):
            CrossValidation.parse(text)
