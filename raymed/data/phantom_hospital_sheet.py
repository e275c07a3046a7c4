"""The tables of a phantom hospital: the sheet of labels as a ward keeps it, and who has two numbers."""

import re
import unicodedata
import zipfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from raymed.data.phantom_hospital_register import MISTYPED, TWICE, TWO_IDS, ZEROS_LOST, Study

SHEET = "Labels"
HEADER = ("AccessionNumber", "PatientID", "Name", "Result", "Reader1", "Reader2", "ExamDate")
WORDS = {
    "occluded": ("폐쇄", "occluded", "Occ."),
    "patent": ("개통", "patent", "Patent "),
    "equivocal": ("equivocal", "판정 불가"),
}
"""How each finding is written in the sheet."""
_NUMBER_FORMAT = "0" * 8  # Excel shows the number 123456 as 00123456
_THEN = (2025, 1, 2, 0, 0, 0)


def write_sheet(path: Path, studies: Sequence[Study]) -> None:
    """Write labels.xlsx: a row a study in order of the days, then a second one for one of them.

    Most keys are text; every fifth is a number that Excel shows with its zeros; every fourth name is decomposed (NFD),
    as a Mac writes it. Three rows are wrong: a key that lost its zeros, a second and different result for one key, a
    key with two digits exchanged.
    """
    from openpyxl import Workbook

    book = Workbook()
    cover, sheet = book.worksheets[0], book.create_sheet(SHEET)
    cover.title = "Notes"
    cover["A1"] = "HSG 2021-2024. 판독 결과는 Labels 시트 참조"
    sheet.append(HEADER)
    for study in sorted(studies, key=lambda study: (study.day, study.number)):
        sheet.append(_row(study))
        key = sheet.cell(sheet.max_row, 1)
        if isinstance(key.value, int) and study.number != ZEROS_LOST:
            key.number_format = _NUMBER_FORMAT
        sheet.cell(sheet.max_row, len(HEADER)).number_format = "yyyy-mm-dd"
    twice = studies[TWICE]
    sheet.append([*_row(twice)[:3], _other_result(twice), *_row(twice)[4:]])
    book.save(path)
    _fix_times(path)


def write_mapping(path: Path, studies: Sequence[Study]) -> None:
    """Write mapping.csv: PatientID, and the number that it is to be counted under."""
    path.write_text(
        f"PatientID,SameAs\n{studies[TWO_IDS].patient_id},{studies[TWO_IDS - 1].patient_id}\n", encoding="utf-8"
    )


def key_in_sheet(study: Study) -> str:
    """The key as the sheet shows it."""
    if study.number == ZEROS_LOST:
        return study.accession.lstrip("0")
    if study.number == MISTYPED:
        return _exchanged(study.accession)
    return study.accession


def _row(study: Study) -> list:
    key = key_in_sheet(study)
    name = study.person.name if study.number % 4 else unicodedata.normalize("NFD", study.person.name)
    day = datetime.combine(study.day, datetime.min.time())
    readers = [_word(reader, study.number + 1) for reader in study.readers]
    shown = int(key) if study.number % 5 == 0 or study.number == ZEROS_LOST else key
    return [shown, study.patient_id, name, _word(study.reported, study.number), *readers, day]


def _word(finding: str, number: int) -> str | None:
    words = WORDS.get(finding)
    return words[number % len(words)] if words else None


def _other_result(study: Study) -> str:
    return WORDS["patent" if study.reported == "occluded" else "occluded"][1]


def _exchanged(key: str) -> str:
    """The key with the last two neighbouring digits that differ exchanged."""
    last = next(i for i in range(len(key) - 1, 0, -1) if key[i] != key[i - 1])
    return key[: last - 1] + key[last] + key[last - 1] + key[last + 1 :]


def _fix_times(path: Path) -> None:
    """Write a workbook again without the time at which it was written."""
    with zipfile.ZipFile(path) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    core = "docProps/core.xml"
    stamp = datetime(*_THEN).isoformat().encode() + b"Z"
    parts[core] = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", stamp, parts[core])
    with zipfile.ZipFile(path, "w") as book:
        for name, content in parts.items():
            book.writestr(zipfile.ZipInfo(name, _THEN), content, zipfile.ZIP_DEFLATED)
