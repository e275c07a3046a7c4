"""Folds of a nested cross-validation: every patient is tested once, and by nothing that has seen them."""

import numpy as np
import pytest

from raymed.config import UserError
from raymed.data.dataset import load
from raymed.data.folds import Fold
from raymed.data.manifest import DataConfig

OUTER, INNER = 3, 2


@pytest.fixture
def data(make_set, tmp_path):
    """Two images of each of 48 patients, every fourth of whom is ill."""
    patients = np.repeat(np.arange(48), 2)
    manifest = make_set(np.where(patients % 4 == 0, "ill", "well"), patient=patients)
    return load(DataConfig(manifest=str(manifest), positive="ill"), tmp_path / "cache")


@pytest.fixture
def folds(data):
    return {(o, i): Fold(o, OUTER, i, INNER).apply(data) for o in range(OUTER) for i in range(INNER)}


def test_every_image_is_in_the_test_split_of_one_outer_fold(data, folds):
    tested = np.concatenate([folds[o, 0].splits["test"] for o in range(OUTER)])
    assert sorted(tested) == list(range(len(data)))


def test_the_inner_folds_cover_what_the_outer_one_leaves(data, folds):
    for outer in range(OUTER):
        test = folds[outer, 0].splits["test"]
        validated = np.concatenate([folds[outer, i].splits["val"] for i in range(INNER)])
        assert sorted([*validated, *test]) == list(range(len(data)))
        for inner in range(INNER):
            assert np.array_equal(folds[outer, inner].splits["test"], test)


def test_splits_share_no_patient_and_have_both_classes(data, folds):
    for fold in folds.values():
        patients = [set(data.patients[indices]) for indices in fold.splits.values()]
        assert not (patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2])
        assert all(len(np.unique(data.labels[indices])) == 2 for indices in fold.splits.values())
        rates = [data.labels[indices].mean() for indices in fold.splits.values()]
        assert max(rates) - min(rates) < 0.2  # stratified: 25 % everywhere


def test_normalisation_is_measured_on_the_folds_own_training_images(data, folds):
    fold = folds[0, 0]
    image = data.batch(fold.splits["train"]).unit_image().double()
    assert fold.preprocess.mean == pytest.approx(image.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert fold.preprocess.mean != data.preprocess.mean
    assert fold.fingerprint not in {data.fingerprint, folds[0, 1].fingerprint}


def test_too_many_folds_are_refused(data):
    with pytest.raises(UserError, match="use fewer"):
        Fold(0, 40, 0, 2).apply(data)
