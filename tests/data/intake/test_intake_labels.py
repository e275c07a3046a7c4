"""What the texts of a label column mean."""

import pytest

from raymed.config import UserError
from raymed.data.intake.labels import Label, LabelMap, parse_map


def test_texts_classes_and_the_rest():
    told = LabelMap({"occluded": ["occ.", "폐쇄"], "patent": ["open"]}, excluded=["cancelled"])
    texts = ["Occluded", " OCC. ", "폐쇄", "open", "patent", "Cancelled", "equivocal", "", "ocluded"]
    assert [told(text) for text in texts] == [
        *[Label("class", "occluded")] * 3,
        *[Label("class", "patent")] * 2,
        Label("excluded", "cancelled"),
        Label("unlabelled", "equivocal"),
        Label("unlabelled", "empty cell"),
        Label("unknown", ""),
    ]
    assert told.nearest("ocluded") == "occluded" and told.nearest("17") == ""


def test_without_a_map_every_text_is_a_class():
    told = LabelMap(unlabelled=["?"])
    assert told(" Sick ") == Label("class", "Sick")
    assert told("?").kind == "unlabelled"


def test_two_meanings_are_refused():
    with pytest.raises(UserError, match="'x' has two meanings"):
        LabelMap({"a": ["X"], "b": ["x"]})
    with pytest.raises(UserError, match="'a' has two meanings"):
        LabelMap({"a": []}, excluded=["A"])


def test_maps_on_the_command_line():
    assert parse_map(["occluded=occ, 폐쇄,", "patent="]) == {"occluded": ["occ", "폐쇄"], "patent": []}
    for texts, told in ((["occluded"], "expected CLASS=text"), (["=x"], "expected CLASS"), (["a=x", "a=y"], "twice")):
        with pytest.raises(UserError, match=told):
            parse_map(texts)
