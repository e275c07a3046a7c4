"""Names and identifiers of patients are found in texts as people write them, and nothing else is."""

import time

import pytest

from raymed.data.intake.telling import Telling

KIM = Telling(["00012345", "PX0001", "00123", "77"], ["Kim^Minji=金^敏智=김^민지", "O'Brien^Seo-yeon", ""])


@pytest.mark.parametrize(
    "text",
    [
        *("pt 12345", "00012345 ok", "0000012345", "PA12345b", "１２３４５ 재검", "see px0001a", "00123"),
        *("KIM Minji", "HSG_kim_late", "Kim님", "김민지님", "敏智", "Dr o'brien", "seo-yeon 2"),
    ],
)
def test_what_names_a_patient(text):
    assert KIM.within(text)


@pytest.mark.parametrize(
    "text", ["", "112345", "123456", "123", "0123", "77", "Kimura", "minjis", "김", "PX 0001", "HSG late"]
)
def test_what_names_nobody(text):
    assert not KIM.within(text)


def test_many_patients_cost_no_more_than_few():
    many = Telling((f"A{i:08d}" for i in range(50_000)), (f"Family{i}^이름{i}" for i in range(50_000)))
    began = time.perf_counter()
    assert not any(many.within(f"series number {i} of a study, nobody's") for i in range(2000))
    assert time.perf_counter() - began < 5  # a regular expression of all of them takes minutes
    assert many.within("of FAMILY4711 late") and many.within("이름31415님") and many.within("A00049999")
