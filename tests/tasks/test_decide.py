"""From scores of images to decisions about cases: level, table, operating point."""

from types import SimpleNamespace

import numpy as np
import pytest

from raymed.config import UserError
from raymed.tasks.decide import Decide, decide_of


def data(cases=(0, 0, 1, 1, 2, 2), labels=(1, 1, 0, 0, 0, 0), sides=None, patients=None):
    """Without patients, as a manifest that names none is read: cases count as such, or images."""
    num = len(labels)
    return SimpleNamespace(
        labels=np.array(labels),
        cases=None if cases is None else np.array(cases),
        sides=None if sides is None else np.array(sides),
        patients=np.array(patients or cases or range(num)),
        rows=np.arange(1, num + 1),
    )


def test_the_unit_follows_the_data():
    assert Decide().level(data()) == "case"
    assert Decide().level(data(cases=None)) == "image"
    mixed = data(labels=(1, 0, 0, 0, 0, 0), sides=("left", "right") * 3)
    assert Decide().level(mixed) == "case+side" and Decide("image").level(mixed) == "image"


def test_a_case_has_the_mean_of_its_images_and_its_own_threshold():
    where, scores = np.arange(6), np.array([0.9, 0.5, 0.4, 0.2, 0.1, 0.45])
    decide, d = Decide(operating_point="sensitivity=1"), data(patients=(0, 0, 1, 1, 1, 1))
    table = decide.table(d, where, scores)
    assert table.scores.tolist() == pytest.approx([0.7, 0.3, 0.275]) and table.targets.tolist() == [1, 0, 0]
    assert table.patients.tolist() == [0, 1, 1]
    images = decide.table(d, where, scores, "image")
    assert images.scores.tolist() == scores.tolist()
    point = decide.point(table, images)
    assert point["threshold"] == pytest.approx(0.5) and point["image_threshold"] == pytest.approx(0.475)
    assert (point["unit"], point["aggregate"], point["criterion"]) == ("case", "mean", "sensitivity=1")
    again = decide_of(point)
    assert (again.unit, again.aggregate, again.operating_point) == ("case", "mean", "sensitivity=1")
    assert decide_of({"threshold": 0.5, "criterion": "youden"}).unit == "image"


def test_without_patients_a_case_is_drawn_whole():
    table = Decide("case", "max").table(data(), np.array([0, 1, 4, 5]), np.array([0.1, 0.8, 0.3, 0.2]))
    assert table.scores.tolist() == [0.8, 0.3] and table.patients.tolist() == [0, 2]


def test_labels_that_differ_within_a_case_are_named_by_row():
    with pytest.raises(UserError, match="(?s)the labels of one case differ.*rows 1, 2"):
        Decide("case").table(data(labels=(1, 0, 0, 0, 0, 0)), np.arange(6), np.full(6, 0.5))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"unit": "study"}, "decide.unit must be one of"),
        ({"aggregate": "median"}, "decide.aggregate must be one of"),
        ({"operating_point": "sensitivity"}, "needs a value"),
        ({"operating_point": "sensitivity=1.2"}, "sensitivity must be"),
        ({"calibration": "beta"}, "decide.calibration must be one of"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Decide(**fields)
