"""What goes wrong in a hospital, typed as a user types it: one message that names the cell or row and says what to do,
exit code 2, nothing half-written; or an import that comes out right."""

import datetime
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from openpyxl import Workbook
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, XRayRadiofluoroscopicImageStorage
from rich.progress import Progress

from raymed.config import UserError
from raymed.data import Augment, DataConfig, load
from raymed.data.intake import importer
from raymed.data.manifest import read_table
from raymed.data.overview import per_image, warnings
from raymed.data.overview_images import look, near_duplicates

JOB = Path(__file__).resolve().parents[3] / "jobs" / "import_data.py"
NUM = 8


@pytest.fixture
def hospital(tmp_path):
    """hospital(tags of an image by its number, change of the worksheet, rows): DICOM files and an Excel sheet."""

    def write(tags=lambda i: {}, change=lambda sheet: None, rows=None, num=NUM):
        for i in range(num):
            _dicom(tmp_path / "share" / f"ST{i}" / "IM1", i, tags(i))
        book = Workbook()
        sheet = book.worksheets[0]
        sheet.title = "Labels"
        truth = [[f"0070{i:04d}", "occluded" if i % 3 == 0 else "patent"] for i in range(NUM)]
        for row in [["AccessionNumber", "Result"], *(rows or truth)]:
            sheet.append(row)
        change(sheet)
        book.save(tmp_path / "labels.xlsx")

    return write


def _dicom(path, i, tags):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = XRayRadiofluoroscopicImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.{i}")
    ds.PatientID, ds.PatientName, ds.AccessionNumber = f"0010{i:04d}", f"Kim^M{i}", f"0070{i:04d}"
    ds.Modality, ds.PatientOrientation = "RF", ["L", "F"]
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 16, 16, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8).tobytes()
    for name, value in tags.items():
        setattr(ds, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    """typed(*flags) -> (exit code, what was printed, what was said on stderr)."""

    def run(*flags):
        where = ["--images", tmp_path / "share", "--labels", tmp_path / "labels.xlsx", "--to", tmp_path / "imported"]
        where += ["--key-file", tmp_path / "secret" / "my.key"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in (JOB, *where, *flags)])
        code = 0
        try:
            runpy.run_path(str(JOB), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def manifest(tmp_path):
    return read_table(tmp_path / "imported" / "manifest.csv")


def _title(sheet):
    sheet.insert_rows(1)
    sheet["A1"] = "HSG 2021"
    sheet.merge_cells("A1:B1")


def _put(**cells):
    """A change of the worksheet."""

    def change(sheet):
        for address, value in cells.items():
            sheet[address] = value

    return change


def _second(sheet):
    sheet.parent.create_sheet("Old").append(["Accession", "Result"])


REFUSED = {
    "merged cells": (
        {"change": lambda sheet: sheet.merge_cells("B3:B5")},
        [],
        r"merged cells: B4 is part of the merged cells B3:B5: unmerge them and fill in each\n.*B5 is part of",
    ),
    "merged title": ({"change": _title}, [], r"labels.xlsx: A1:B1 is one merged cell.*\(--header-row\)"),
    "formula": ({"change": _put(B4='=IF(A4>1,"x","y")')}, [], "B4 is a formula without a stored result: open the file"),
    "error of Excel": ({"change": _put(B4="#REF!")}, [], "B4 holds an error of Excel, .*mend its formula"),
    "date as identifier": (
        {"change": _put(A4=datetime.date(2021, 3, 4))},
        [],
        "A4 holds a date where an identifier is expected: format the cell as text and type it again",
    ),
    "rounded identifier": ({"change": _put(A4=12345678901234567)}, [], "A4 is a number of more than 15 digits, which"),
    "which sheet": ({"change": _second}, [], r"which sheet holds the labels\? .*'Labels', 'Old' \(--sheet NAME\)"),
    "misspelt sheet": ({"change": _second}, ["--sheet", "labels"], r"did you mean 'Labels'\?"),
    "wrong sheet": (
        {"change": _second},
        ["--sheet", "Old"],
        r"no column 'AccessionNumber' \(--columns.key\); .* Did you mean --columns.key Accession\?",
    ),
    "duplicate keys": (
        {"rows": [["00700000", "occluded"], ["00700001", "patent"], ["00700000", "patent"]]},
        [],
        "row 2: the rows 2, 4 have one key and say different things\n.*row 4: .*\n.*problems.csv\n.*--on-problem skip",
    ),
    "lost zeros": (
        {"rows": [[700000 + i, "patent"] for i in range(NUM)]},
        [],
        r"\(8 images, 8 rows\). 8 pairs differ only in leading zeros: mend that in the sheet",
    ),
    "a key of two patients": (
        {"tags": lambda i: {"AccessionNumber": "00700000"} if i == 1 else {}},
        [],
        "several patients with one key: row 2: 2 images with its key name 2 patients",
    ),
    "another modality": (
        {"tags": lambda i: {"Modality": "CT"} if i == 3 else {}},
        [],
        r"several modalities: RF \(7\), CT \(1\). State yours: --modalities RF",
    ),
    "a modality that is not there": ({}, ["--modalities", "XA"], r"no labelled image has the modality XA .*RF \(8\)"),
    "no mapping file": ({}, ["--patients", "none.csv"], "there is no file none.csv: check its name and folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_message_and_nothing_written(hospital, typed, tmp_path, name):
    wrong, flags, told = REFUSED[name]
    hospital(**wrong)
    code, printed, said = typed(*flags)
    assert code == 2 and printed.strip() == ""
    assert said.startswith("error: ") and said.count("error: ") == 1 and re.search(told, said), said
    assert not (tmp_path / "imported").exists()
    assert not re.search(r"0?0[17]0000\d|Kim", said)


def test_a_row_under_a_title_and_a_formula_that_is_left_out(hospital, typed, tmp_path):
    hospital(change=_title)
    assert typed("--header-row", "2")[0] == 0 and len(manifest(tmp_path)) == NUM
    hospital(change=_put(B4="=1"))
    code, printed, _ = typed("--on-problem", "skip")
    assert code == 0 and len(manifest(tmp_path)) == NUM - 1
    assert "left out, formula without a result: 1 row (4) of the sheet" in printed


def test_two_patients_with_one_name_are_two(hospital, typed, tmp_path):
    hospital(lambda i: {"PatientName": "Kim^Minji"})
    assert typed()[0] == 0
    assert len(set(manifest(tmp_path)["patient"])) == NUM


def test_one_patient_with_two_identifiers_is_one(hospital, typed, tmp_path):
    hospital()
    (tmp_path / "mapping.csv").write_text("old,new\n00100000,00100001\n")
    code, printed, _ = typed("--patients", str(tmp_path / "mapping.csv"))
    assert code == 0 and f"patients: {NUM - 1}," in printed
    before = manifest(tmp_path)
    for text, told in (
        (
            "old,new\n100000,100001\n",
            "2 of its identifiers differ from those of images and sheet only in leading zeros",
        ),
        ("old,new\n1.0E+08,00100001\n", "A2 holds a number cut short by Excel"),
        ("old\n100000\n", "has 1 columns where two are expected: an identifier, and the one"),
        ("00100000,00100001\n00100002,00100003\n", "has no column names"),
    ):
        (tmp_path / "mapping.csv").write_text(text)
        code, _, said = typed("--patients", str(tmp_path / "mapping.csv"))
        assert code == 2 and told in said and "0010000" not in said
        assert manifest(tmp_path).equals(before)
    (tmp_path / "mapping.csv").write_text("old,new\n100000,00100000\n555,666\n")  # the zeros are what it mends
    code, printed, _ = typed("--patients", str(tmp_path / "mapping.csv"))
    assert code == 0 and f"patients: {NUM}," in printed and "3 of its identifiers stand in no image" in printed


def test_an_excel_file_of_patients_is_read_as_identifiers(hospital, typed, tmp_path):
    hospital()
    book = Workbook()
    book.worksheets[0].append(["old", "new"])
    book.worksheets[0].append([datetime.date(2021, 3, 4), "00100001"])
    book.save(tmp_path / "mapping.xlsx")
    code, _, said = typed("--patients", str(tmp_path / "mapping.xlsx"))
    assert code == 2 and "A2 holds a date where an identifier is expected" in said


def test_names_and_short_numbers_in_free_text_stay_here(hospital, typed, tmp_path):
    """The patients of images that have no row, too."""
    names = ["Kim^Younghee=김^영희", "Lee^Chulsoo=이^철수", "Park^Jiwoo"]
    series = {6: "HSG Chulsoo", 7: "HSG Chulsoo"}
    hospital(
        lambda i: (
            {"PatientName": names[i % 3], "SpecificCharacterSet": "ISO_IR 192"}
            | {"SeriesDescription": series.get(i, "HSG"), "PatientID": f"0015678{i}"}
        ),
        change=_put(C1="Remark", C2="영희님 재검", C3="pt 156783", C4="see lee, CHULSOO", C5="jiwoon", C6="grade 2"),
        rows=[[f"0070{i:04d}", "occluded" if i % 3 == 0 else "patent"] for i in range(NUM - 1)],
    )
    code, printed, _ = typed("--columns.keep", "Remark")
    table = manifest(tmp_path)
    assert code == 0 and table["Remark"].tolist() == ["", "", "", "jiwoon", "grade 2", "", ""]
    assert table["series"].tolist() == ["HSG"] * 6 + [""]
    assert "column Remark: 3 cells named a patient and are empty" in printed


def test_a_sheet_without_column_names_is_not_recited(hospital, typed, tmp_path):
    hospital(change=lambda sheet: (sheet.delete_rows(1), _put(C1="홍길동", C2="김영희")(sheet)))
    code, _, said = typed()
    assert code == 2 and "labels.xlsx: row 1 is to hold the names of its 3 columns, and looks like data" in said
    assert not any(told in said for told in ("홍길동", "007", "occluded"))


def test_an_image_of_another_modality_is_left_out_and_counted(hospital, typed, tmp_path):
    hospital(lambda i: {"Modality": "CT"} if i == 3 else {})
    code, printed, _ = typed("--modalities", "RF")
    assert code == 0 and re.search(r"^modality CT +1$", printed, re.MULTILINE)
    assert set(manifest(tmp_path)["modality"]) == {"RF"} and len(manifest(tmp_path)) == NUM - 1


def test_mixed_orientations_are_told_and_recorded(hospital, typed, tmp_path):
    hospital(lambda i: {"PatientOrientation": ["R", "F"]} if i < 3 else {})
    code, printed, _ = typed()
    assert code == 0 and "lies at different edges of the images (column right): left 5, right 3" in printed
    assert manifest(tmp_path)["right"].tolist() == ["right"] * 3 + ["left"] * 5


def test_a_class_at_one_site_is_warned_of_and_no_test_set(hospital, typed, tmp_path):
    rows = [[f"0070{i:04d}", "occluded" if i < 12 else "patent"] for i in range(24)]
    hospital(lambda i: {"InstitutionName": "Hanbit" if i < 12 else "Saebyeok"}, rows=rows, num=24)
    code, _, _ = typed("--site", "InstitutionName")
    config = DataConfig(str(tmp_path / "imported" / "manifest.csv"), positive="occluded")
    data = load(config, tmp_path / "cache")
    images = per_image(data, read_table(tmp_path / "imported" / "manifest.csv").iloc[data.rows - 1])
    said = warnings(data, images, Augment(), near_duplicates(data, look(data)))
    assert code == 0 and any("All 12 cases of the class 'occluded' have the site 'Hanbit'" in text for text in said), (
        said
    )
    by_site = DataConfig(config.manifest, positive="occluded", split_how="by_site", test_sites=("Hanbit",))
    with pytest.raises(UserError, match="the test set is at Hanbit; of what is left, .*Choose another test set"):
        load(by_site, tmp_path / "cache")


def test_text_that_is_stated_and_not_found_is_told(hospital, typed, tmp_path):
    hospital(lambda i: {"BurnedInAnnotation": "YES"} if i < 2 else {})
    code, printed, _ = typed()
    assert code == 0 and manifest(tmp_path)["burned_in"].tolist() == ["yes"] * 2 + [""] * 6
    (names,) = re.findall(r"text in the image is stated, but none blanked: look at 2 images \((.*)\)", printed)
    assert [f"images/{name}.png" for name in names.split(", ")] == manifest(tmp_path)["image"].tolist()[:2]
    assert "is stated" not in typed("--blank", "0 0 16 4")[1]


@pytest.mark.parametrize("moment", ["scan", "copy"])
def test_a_share_that_goes_away_ends_it_and_the_same_command_goes_on(hospital, typed, tmp_path, monkeypatch, moment):
    hospital()
    share, away = tmp_path / "share", tmp_path / "away"
    for function in (importer.scan, importer.make_pictures):
        monkeypatch.setitem(function.__kwdefaults__, "patience", (0.01, 0.01))
    advance, copy = Progress.update, importer.make_pictures

    def after_four(bar, task, *, completed=0.0, **rest):
        advance(bar, task, completed=completed, **rest)
        if completed == 4 and share.exists():
            share.rename(away)

    def without_share(*args, **options):
        share.rename(away)
        return copy(*args, **options)

    with monkeypatch.context() as patch:
        if moment == "scan":
            patch.setattr(Progress, "update", after_four)
        else:
            patch.setattr(importer, "make_pictures", without_share)
        code, printed, said = typed()
    told = {"scan": "after 4 of 8 files", "copy": "after 0 of 8 images"}[moment]
    assert code == 2 and printed.strip() == "" and f"stopped answering {told}" in said
    assert "check the share or the network; then the same command goes on from there" in said
    assert not list((tmp_path / "imported").rglob("*.csv"))
    checkpoints = list((tmp_path / "secret").rglob("scan.jsonl"))
    assert len(checkpoints) == (moment == "scan")
    for checkpoint in checkpoints:
        files = [json.loads(line)["file"]["path"] for line in checkpoint.read_text().splitlines()[1:]]
        assert files == [f"ST{i}/IM1" for i in range(4)]
    away.rename(share)
    assert typed()[0] == 0 and len(manifest(tmp_path)) == NUM
