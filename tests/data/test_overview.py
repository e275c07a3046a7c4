"""Counts by case, and that each warning comes when its cause is planted and not without."""

import numpy as np
import pandas as pd
import pytest

from raymed.data import Augment, DataConfig, load
from raymed.data.overview import Count, counts, of_different, per_image, unit_name, warnings
from raymed.data.overview_images import Duplicates

NO_PAIRS = Duplicates(np.zeros((0, 2), np.int64), np.zeros(0), 0)
CALM = Augment.none()


@pytest.fixture
def make_data(make_set, tmp_path):
    """make_data(labels, **columns) -> DataSet; each class goes to train, val, test in turn, unless split is given."""

    def make(labels, positive="sick", **columns):
        columns = {
            "split": [("train", "val", "test")[labels[:i].count(name) % 3] for i, name in enumerate(labels)]
        } | columns
        return load(DataConfig(manifest=str(make_set(labels, **columns)), positive=positive), tmp_path / "cache")

    return make


@pytest.fixture
def warned(make_data):
    """warned(labels, attributes, augment, pairs, **columns) -> warnings, without those on few positives."""

    def warn(labels, attributes=None, augment=CALM, pairs=NO_PAIRS, **columns):
        data = make_data(labels, **columns)
        images = per_image(data, None if attributes is None else pd.DataFrame(attributes))
        return [said for said in warnings(data, images, augment, pairs) if "say next to nothing" not in said]

    return warn


def test_units_are_cases_else_patients_else_images(make_data):
    labels = ["sick", "well"] * 4
    patient, case = list("aabbccdd"), list("11121211")
    split = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    by_case = make_data(labels, patient=patient, case=case, split=split)
    assert unit_name(by_case) == "case" and of_different(by_case) == " of different patients"
    assert len(set(per_image(by_case)["unit"])) == 6  # a1, b1, b2, c1, c2, d1
    by_patient = make_data(labels, patient=patient, split=split)
    assert unit_name(by_patient) == "patient" and len(set(per_image(by_patient)["unit"])) == 4
    by_image = make_data(labels, split=split)
    assert unit_name(by_image) == "image" and len(set(per_image(by_image)["unit"])) == 8
    assert of_different(by_image) == ""


def test_counts_by_hand(make_data):
    data = make_data(
        ["sick", "well", "well", "well", "well", "sick", "well", "sick", "well"],
        patient=list("aaabbccde"),
        case=list("112111121"),
        split=["train"] * 5 + ["val", "val", "test", "test"],
        view=["early", "late", "late", "early", "late", "early", "late", "late", ""],
    )
    by_split = counts(per_image(data), "split")
    # train: case a1 (one sick image of two), a2, b1.
    assert by_split["train"] == Count(5, 3, 1, {"train": 3, "val": 0, "test": 0}, {"sick": 1, "well": 3})
    assert by_split["val"] == Count(2, 1, 1, {"train": 0, "val": 1, "test": 0}, {"sick": 1, "well": 1})
    assert by_split["test"] == Count(2, 2, 1, {"train": 0, "val": 0, "test": 2}, {"sick": 1, "well": 1})
    by_view = counts(per_image(data), "view")
    assert list(by_view) == ["late", "early", "not stated"]
    # late: a1, a2, b1, c1, d2; sick only in d2's image.
    assert by_view["late"] == Count(5, 5, 1, {"train": 3, "val": 1, "test": 1}, {"sick": 1, "well": 4})


def test_attributes_become_text_in_bands_and_in_order(make_data):
    attributes = pd.DataFrame(
        {
            "year": [2021.0, 2019.0, None, 2019.0],
            "age": ["34", "9", "030", "unknown"],
            "site": ["", "B", "B", "A"],
            "patient_name": list("wxyz"),
        }
    )
    data = make_data(["sick", "well"] * 4)
    images = per_image(data, pd.concat([attributes, attributes], ignore_index=True))
    assert list(counts(images, "year")) == ["2019", "2021", "not stated"]
    assert list(counts(images, "age")) == ["0 – 9", "30 – 39", "not stated"]
    assert list(counts(images, "site")) == ["B", "A", "not stated"]
    assert "patient_name" not in images  # only what is to be shown goes further
    with pytest.raises(ValueError, match="4 rows, the data set has 8 images"):
        per_image(data, attributes)


def test_few_positives_are_told_by_split(make_data):
    labels = ["sick"] * 45 + ["well"] * 10
    split = ["train"] * 25 + ["val"] * 9 + ["test"] * 11 + ["train", "val", "test"] * 3 + ["train"]
    data = make_data(labels, split=split)
    said = warnings(data, per_image(data), CALM, NO_PAIRS)
    assert len(said) == 1 and said[0].startswith("The val split has 9 positive images:")


SITES = {
    "a class at one site": (
        ["sick"] * 8 + ["well"] * 24,
        ["A"] * 16 + ["B"] * 16,
        "All 8 images of the class 'sick' have",
    ),
    "a site with one class": (
        ["sick"] * 16 + ["well"] * 20,
        ["A"] * 8 + ["B"] * 6 + ["C"] * 2 + ["A"] * 12 + ["C"] * 8,
        "All 6 images with the site 'B' are of the class 'sick'",
    ),
    "uneven": (
        ["sick"] * 20 + ["well"] * 20,
        ["A"] * 16 + ["B"] * 4 + ["A"] * 4 + ["B"] * 16,
        "20% of images with 'B', 80%",
    ),
    "even": (["sick", "well"] * 16, ["A", "A", "B", "B"] * 8, None),
    "three by chance": (["sick"] * 3 + ["well"] * 30, ["A"] * 3 + ["A", "B"] * 15, None),
    "one site": (["sick", "well"] * 8, ["A"] * 16, None),
    "not stated elsewhere": (["sick", "well"] * 16, ["A"] * 16 + [""] * 16, None),
}


@pytest.mark.parametrize("name", SITES)
def test_a_site_that_tells_the_class(name, warned):
    labels, site, said = SITES[name]
    order = np.random.default_rng(0).permutation(len(labels))
    labels, site = ([values[i] for i in order] for values in (labels, site))
    found = warned(labels, {"site": site})
    assert [said in text for text in found] == ([True] if said else [])
    assert len(warned(labels, {"scanner": site})) == len(found)
    assert warned(labels, {"view": site}) == []


def test_a_site_counts_cases_not_images(warned):
    # Four cases of eight images each: at one site by chance in one of 16 sets, which is not told.
    labels = ["sick"] * 4 + ["well"] * 4
    one_image = warned(labels * 8, {"site": (["A"] * 4 + ["A", "B", "B", "B"]) * 8})
    assert len(one_image) == 1
    cases = [str(i) for i in range(8)] * 8
    split = ["train", "train", "val", "test"] * 16
    site = (["A"] * 4 + ["A", "B", "B", "B"]) * 8
    assert warned(labels * 8, {"site": site}, patient=cases, split=split) == []


def test_mixed_orientations(warned):
    labels = ["sick", "well"] * 4
    found = warned(labels, {"right": ["left"] * 5 + ["right"] * 2 + [""]})
    assert len(found) == 1 and "the left edge of 5 images, the right edge of 2, not stated in 1" in found[0]
    assert warned(labels, {"right": ["left"] * 7 + [""]}) == []


def test_mirroring_and_sides(warned):
    flip = Augment(flip=0.5)
    by_side = {"patient": [i // 2 for i in range(16)], "side": ["left", "right"] * 8}
    split = {"split": [name for name in ("train", "train", "val", "test") for _ in range(4)]}
    # One tube of a patient is occluded, the other is not.
    found = warned(["sick", "well"] * 8, augment=flip, **by_side, **split)
    assert any("two sides of a case have labels of their own" in text for text in found)
    assert not any("mirrors" in text for text in warned(["sick", "well"] * 8, **by_side, **split))
    # Both images of a patient have one label: a mirror image does no harm.
    assert warned(["sick", "sick", "well", "well"] * 4, augment=flip, **by_side, **split) == []


@pytest.mark.parametrize(
    ("name", "is_side"),
    [("left occluded", True), ("Right", True), ("좌측 폐쇄", True), ("bright", False), ("cleft palate", False)],
)
def test_a_class_that_names_a_side(name, is_side, warned):
    labels = [name, "well"] * 4
    found = warned(labels, augment=Augment(flip=0.5), positive=name)
    assert [("a class names a side" in text, name in text) for text in found] == [(True, True)] * is_side
    assert warned(labels, positive=name) == []


def test_burned_in_text_that_is_not_blanked(warned):
    labels = ["sick", "well"] * 4
    marked = ["yes", "", "yes", "no", "YES", "", "", ""]
    boxes = ["0 0 4 4", "", "", "", "", "", "", ""]
    found = warned(labels, {"burned_in": marked, "blank_boxes": boxes})
    assert len(found) == 1 and "3 images" in found[0] and "2 rows (3, 5)" in found[0]
    assert warned(labels, {"burned_in": marked, "blank_boxes": ["0 0 4 4"] * 8}) == []
    assert "3 rows (1, 3, 5)" in warned(labels, {"burned_in": marked})[0]


def test_duplicates_across_splits_and_labels_are_counted(warned):
    labels = ["sick", "well"] * 4  # each class in train, val, test, train
    pairs = Duplicates(np.array([[0, 1], [0, 6], [0, 2]]), np.ones(3), 8)
    found = warned(labels, pairs=pairs)
    assert len(found) == 1
    assert "3 pairs of images look nearly the same; in two splits: 1, with two labels: 1." in found[0]
    patients = warned(labels, pairs=pairs, patient=list("abcdefgh"))
    assert "of images of different patients look" in patients[0]


def test_two_classes_in_one_case(warned):
    labels = ["sick", "well", "well", "sick"] * 3
    split = ["train", "train", "val", "val"] + ["test"] * 4 + ["train"] * 4
    found = warned(labels, patient=list("aabbccddeeff"), split=split)
    assert found == ["Images of two classes lie in 6 patients, counted under both."]
