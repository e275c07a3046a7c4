"""A patient of whom a model has seen one image is not new to it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from external_hospital import make_bundle

from raymed.config import UserError
from raymed.results.seen import knows_training_set, seen_by, unseen

SEEN = [7, 100]  # images of case 3 and case 50


@pytest.fixture
def trained(hospital):
    """A model that was trained on these images, and the data."""
    data = hospital.data()
    contents = torch.from_numpy(np.sort(data.content[SEEN].view(np.int64)))
    return make_bundle(extras={"trained_on": contents}), data


def test_all_images_of_a_patient_are_seen_with_one(trained):
    bundle, data = trained
    where = data.splits["test"]
    assert np.array_equal(where[seen_by(bundle, data, where)], [6, 7, 100, 101])
    last = np.flatnonzero(data.patients == data.patients[110])  # the patient with several cases
    contents = torch.from_numpy(data.content[[110]].view(np.int64))
    assert len(last) == 10 and np.array_equal(
        where[seen_by(make_bundle(extras={"trained_on": contents}), data, where)], last
    )


def test_without_patients_it_is_the_case_and_without_cases_the_image(hospital, trained):
    bundle, _ = trained
    cases, images = hospital.data(patient=""), hospital.data(patient="", case="")
    assert np.flatnonzero(seen_by(bundle, cases, np.arange(120))).tolist() == [6, 7, 100, 101]
    assert np.flatnonzero(seen_by(bundle, images, np.arange(120))).tolist() == SEEN


def test_a_patient_with_new_images_is_known_by_the_pseudonym_of_the_same_key(trained):
    _, data = trained
    named = replace(data, patient_keys=data.patients.astype(np.uint64) + np.uint64(1))
    whom = int(named.patients[110])
    only_key = make_bundle(extras={"trained_on": torch.tensor([whom + 1])})
    found = np.flatnonzero(seen_by(only_key, named, np.arange(120)))
    assert np.array_equal(found, np.flatnonzero(named.patients == whom)) and len(found) == 10
    assert not seen_by(only_key, data, np.arange(120)).any()  # names that are no pseudonyms mean nobody elsewhere


def test_the_patient_is_known_by_an_image_that_is_not_scored(trained):
    bundle, data = trained
    assert seen_by(bundle, data, np.array([6, 8])).tolist() == [True, False]


def test_refused_by_row_or_left_out_and_counted(trained):
    bundle, data = trained
    where, notes = data.splits["test"], []
    with pytest.raises(UserError, match=r"A was trained.* 4 rows \(7, 8, 101, 102\)"):
        unseen({"A": (bundle, data)}, where, "error", notes)
    kept = unseen({"A": (bundle, data), "B": (make_bundle(), data)}, where, "skip", notes)
    assert np.array_equal(kept, np.setdiff1d(where, [6, 7, 100, 101]))
    assert notes == ["left out, patients that A was trained on: 4 rows (7, 8, 101, 102)"]
    with pytest.raises(UserError, match="nobody who is new"):
        unseen({"A": (bundle, data)}, np.array([6, 7]), "skip", [])


def test_each_model_knows_images_as_it_reads_them(trained):
    """With another window the pixels are others."""
    bundle, data = trained
    other = replace(data, content=data.content + np.uint64(1))
    where = data.splits["test"]
    assert len(unseen({"A": (bundle, other)}, where, "error", [])) == len(where)
    with pytest.raises(UserError):
        unseen({"A": (bundle, other), "B": (bundle, data)}, where, "error", [])


def test_a_model_that_does_not_say(trained):
    _, data = trained
    silent = make_bundle(extras={})
    assert not knows_training_set(silent) and knows_training_set(make_bundle())
    assert not seen_by(silent, data, data.splits["test"]).any()
