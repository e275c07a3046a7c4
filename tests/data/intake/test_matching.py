"""Keys are joined where they are equal, and shown where they nearly are."""

import unicodedata

import pytest

from raymed.config import UserError
from raymed.data.intake.matching import NearMiss, difference, match, one_person
from raymed.data.intake.sheet import read_sheet


def test_equal_keys_are_joined():
    decomposed = unicodedata.normalize("NFD", "가1")
    found = match(["007", "007", "8", "", "가1"], {2: "007 ", 3: "9", 4: "8", 5: "8", 6: decomposed})
    assert found.rows == {"007": [2], "8": [4, 5], "가1": [6]}
    assert found.images == {"007": [0, 1], "8": [2], "가1": [4]}
    assert (found.without_label, found.without_image, found.near_misses) == ([3], [3], [])


def test_near_misses_are_shown_and_not_joined():
    found = match(["00042", "a-1", "17", "5", "6"], {2: "42", 3: "A-1", 4: "17.0", 5: "5", 6: "7"})
    assert found.rows == {"5": [5]}
    assert found.near_misses == [
        NearMiss(2, 0, "leading zeros"),
        NearMiss(3, 1, "capitals"),
        NearMiss(4, 2, "a decimal .0"),
    ]


def test_a_key_that_has_its_match_is_no_near_miss():
    """1 and 01 may be two cases."""
    found = match(["1", "01"], {2: "1", 3: "01"})
    assert found.near_misses == [] and found.without_image == []


@pytest.mark.parametrize(
    ("one", "other", "trifle"),
    [
        ("0042", "42", "leading zeros"),
        ("a1", "A1", "capitals"),
        ("１２", "12", "full-width characters"),
        ("12-3", "123", "spaces, hyphens or other signs"),
        ("00A-1", "a1", "several signs"),
        ("000", "0", "leading zeros"),
        ("42", "43", ""),
    ],
)
def test_differences(one, other, trifle):
    assert difference(one, other) == trifle


@pytest.fixture
def persons(tmp_path):
    def read(text):
        (tmp_path / "mapping.csv").write_text(text)
        return one_person(read_sheet(tmp_path / "mapping.csv"))

    return read


def test_identifiers_of_one_person(persons):
    assert persons("old,new\nA,B\nC,B\nX,Y\n") == {"A": "B", "B": "B", "C": "B", "X": "Y", "Y": "Y"}
    assert set(persons("old,new\nA,B\nB,C\nD,C\n").values()) == {"C"}
    assert set(persons("old,new\nA,B\nC,D\nB,D\n").values()) == {"D"}
    assert len(set(persons("old,new\nA,B\nB,A\n").values())) == 1


def test_mapping_files_that_are_refused(persons):
    for text, told in (("a,b,c\n1,2,3\n", "3 columns where two"), ("a,b\n1,\n", "row 2 has an empty cell")):
        with pytest.raises(UserError, match=told):
            persons(text)
    with pytest.raises(UserError, match="no column names") as info:
        persons("00100001,00100002\n00100003,00100004\n")
    assert "001" not in str(info.value)
