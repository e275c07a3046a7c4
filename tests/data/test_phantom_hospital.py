"""The hospital's files as pydicom and openpyxl read them: all that is promised to be hard is there, once or more."""

import unicodedata
from datetime import datetime

import numpy as np
import openpyxl
import pandas as pd
import pydicom
import pytest

from raymed.config import UserError
from raymed.data.intake.scan import scan
from raymed.data.intake.text_regions import text_boxes
from raymed.data.phantom_hospital import write_hospital
from raymed.data.phantom_hospital_register import (
    LIE,
    MISTYPED,
    NAMESAKE,
    REPEAT,
    SMALLEST,
    TELLING,
    TWICE,
    TWO_IDS,
    WITH_CT,
    ZEROS_LOST,
    draw_register,
    site_of,
)
from raymed.data.phantom_hospital_sheet import HEADER, WORDS
from raymed.data.phantoms import hsg
from raymed.data.readers import read

NUM, SEED, SIZE = 20, 3, 128


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """(folder, truth) of a small hospital."""
    folder = write_hospital(tmp_path_factory.mktemp("hospital") / "share", num_studies=NUM, seed=SEED, size=SIZE)
    return folder, pd.read_csv(folder / "truth.csv", dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def objects(hospital):
    """Path -> data set."""
    folder, truth = hospital
    return {image: pydicom.dcmread(folder / "images" / image) for image in truth["image"]}


@pytest.fixture(scope="module")
def sheet(hospital):
    """Rows of the sheet as lists of cells."""
    book = openpyxl.load_workbook(hospital[0] / "labels.xlsx")
    assert book.sheetnames == ["Notes", "Labels"]
    return list(book["Labels"].iter_rows())


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    one, two = (write_hospital(tmp_path / name, num_studies=SMALLEST, seed=1, size=64) for name in "ab")
    assert files(one) == files(two)
    assert (
        files(one)["labels.xlsx"]
        != files(write_hospital(tmp_path / "c", num_studies=12, seed=2, size=64))["labels.xlsx"]
    )


def test_a_hospital_is_kept_and_nothing_else_is_touched(tmp_path):
    folder = write_hospital(tmp_path / "a", num_studies=SMALLEST, size=64)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_hospital(folder, num_studies=SMALLEST, size=64) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    with pytest.raises(UserError, match="holds other files"):
        write_hospital(folder, num_studies=SMALLEST, size=64, seed=1)
    with pytest.raises(UserError, match="num_studies must be >= 12"):
        write_hospital(tmp_path / "b", num_studies=11)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_the_register_of_sixty():
    studies = draw_register(60, 0)
    assert len(studies) == 60 and len({study.accession for study in studies}) == 60
    assert sum(study.label == "occluded" for study in studies) == 15
    assert {study.side for study in studies} == {"left", "right", "none"}
    assert sum(study.reported == "equivocal" for study in studies) == 3
    assert all(study.reported in (study.label, "equivocal") for study in studies)
    assert {study.day.year for study in studies} == {2021, 2022, 2023, 2024}
    assert sum(study.site for study in studies) == 24
    assert all(study.accession[0] == "0" and len(study.accession) == 8 for study in studies)
    assert len({study.person.number for study in studies}) == 58
    assert len({study.patient_id for study in studies}) == 59
    assert 25 <= min(study.age for study in studies) and max(study.age for study in studies) <= 45
    agreement = np.mean([reader == study.label for study in studies for reader in study.readers if reader])
    assert 0.8 < agreement < 1
    for kind in ("frames", "bits", "photometric", "charset", "right"):
        assert len({getattr(study, kind) for study in studies}) == 2, kind
    assert {study.text for study in studies} == {"none", "denied", "stated", "unsaid", "lie"}


def test_another_seed_may_be_another_hospital():
    places = [{site_of(study, seed) for study in draw_register(SMALLEST, seed)} for seed in (0, 1, 2)]
    assert [len(names) for names in places] == [2, 2, 2]
    assert not places[0] & places[1] and places[0] == places[2]


def test_people(hospital):
    _, truth = hospital
    person = truth.drop_duplicates("study").set_index("study")[["person", "patient_id", "name"]]
    first, again = person.loc[str(REPEAT - 1)], person.loc[str(REPEAT)]
    assert list(first) == list(again)
    first, other = person.loc[str(TWO_IDS - 1)], person.loc[str(TWO_IDS)]
    assert first["person"] == other["person"] and first["patient_id"] != other["patient_id"]
    mapping = pd.read_csv(hospital[0] / "mapping.csv", dtype=str)
    assert mapping.to_dict("records") == [{"PatientID": other["patient_id"], "SameAs": first["patient_id"]}]
    one, namesake = person.loc[str(NAMESAKE - 1)], person.loc[str(NAMESAKE)]
    assert one["name"] == namesake["name"]
    assert one["person"] != namesake["person"] and one["patient_id"] != namesake["patient_id"]


def test_headers_say_what_the_truth_says(hospital, objects):
    _, truth = hospital
    for row in truth.itertuples():
        ds = objects[row.image]
        assert (ds.AccessionNumber, ds.PatientID, ds.Modality) == (row.accession, row.patient_id, row.modality)
        assert (
            ds.InstitutionName == row.site and ds.StudyDate[:4] == row.year and int(ds.PatientAge[:3]) == int(row.age)
        )
        assert int(ds.get("NumberOfFrames", 1)) == int(row.frames)
        name = "".join((ds.PatientName.ideographic if "=" in str(ds.PatientName) else "", ds.PatientName.phonetic))
        hangul = name or str(ds.PatientName)
        assert hangul.replace("^", "") == row.name
    studies = truth.groupby("study")["image"].apply(list)
    assert all(len(images) == 2 + (study == str(WITH_CT)) for study, images in studies.items())
    uids = [objects[image].SOPInstanceUID for image in truth["image"]]
    assert len(set(uids)) == len(uids)
    assert len({objects[images[0]].StudyInstanceUID for images in studies}) == NUM
    assert {tuple(np.atleast_1d(ds.SpecificCharacterSet)) for ds in objects.values()} == {
        ("", "ISO 2022 IR 149"),
        ("ISO_IR 192",),
    }
    told = {ds.AccessionNumber for ds in objects.values() if ds.SeriesDescription not in ("HSG early", "HSG late")}
    assert told == set(truth.loc[truth["study"].isin([str(TELLING), str(WITH_CT)]), "accession"])


def test_scanning_finds_the_truth(hospital):
    folder, truth = hospital
    result = scan(folder / "images", site="InstitutionName")
    assert result.others == {"not an image": 2}
    found = {image.path: image for image in result.found}
    assert set(found) == set(truth["image"])
    for row in truth.itertuples():
        image = found[row.image]
        assert (image.key, image.patient, str(image.frames)) == (row.accession, row.patient_id, row.frames)
        assert image.burned_in == row.burned_in
        for column in ("modality", "site", "year", "age", "right"):
            assert image.tags.get(column, "") == getattr(row, column), column
        assert image.telling == (("series",) if row.study == str(TELLING) or row.modality == "CT" else ())
        assert image.tags.get("series", "") == ("" if image.telling else f"HSG {row.view}")


def test_every_way_of_storing_gives_the_same_picture(hospital):
    folder, truth = hospital
    ways = set()
    for row in truth.loc[(truth["modality"] != "CT") & (truth["text_box"] == "")].itertuples():
        drawn_side = {"left": "right", "right": "left", "none": "none"}[row.side]
        drawn = hsg(int(row.study), row.view, drawn_side, seed=SEED, size=SIZE)[0].astype(float)
        expected = drawn if row.right == "left" else drawn[:, ::-1]
        frames = int(row.frames)
        pixels = read(folder / "images" / row.image, frames)
        assert pixels.dtype == (np.uint8 if row.bits == "8" else np.uint16)
        shown = pixels / (1 if row.bits == "8" else 257)
        tolerance = {"8": 0, "12": 0.5}[row.bits] if frames == 1 else 2.5
        assert np.abs(shown - expected).mean() <= tolerance, row.image
        if frames > 1:
            assert read(folder / "images" / row.image, 1).mean() < pixels.mean()
        ways.add((row.bits, row.photometric))
    assert ways == {(bits, photometric) for bits in ("8", "12") for photometric in ("MONOCHROME1", "MONOCHROME2")}


def test_text_is_where_the_truth_says_and_what_the_tag_says_of_it(hospital):
    folder, truth = hospital
    with_text = truth["text_box"] != ""
    assert set(truth.loc[with_text, "burned_in"]) == {"yes", "no", ""}
    assert set(truth.loc[~with_text, "burned_in"]) == {"no", ""}
    lies = truth.loc[with_text & (truth["burned_in"] == "no"), "study"]
    assert set(lies) == {str(LIE)}
    for row in truth.loc[with_text].itertuples():
        x0, y0, x1, y1 = map(int, row.text_box.split())
        pixels = read(folder / "images" / row.image, int(row.frames))
        pixels = pixels if row.bits == "8" else (pixels / 257).round().astype(np.uint8)
        assert pixels[y0:y1, x0:x1].max() == 255
        near_edge = min(x0, SIZE - x1) <= 5 and min(y0, SIZE - y1) <= 5
        assert near_edge and 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE
        boxes = text_boxes(pixels)
        assert boxes and all(x0 - 20 < b[2] and b[0] < x1 + 20 and y0 - 20 < b[3] and b[1] < y1 + 20 for b in boxes)


def test_the_sheet(sheet, hospital):
    _, truth = hospital
    assert tuple(cell.value for cell in sheet[0]) == HEADER
    rows = sheet[1:]
    assert len(rows) == NUM + 1

    def shown(cell):
        return f"{cell.value:08d}" if cell.number_format == "00000000" else str(cell.value)

    keys = [shown(row[0]) for row in rows]
    studies = truth.drop_duplicates("study").set_index("accession")
    known = [key for key in keys if key in studies.index]
    accession = truth.drop_duplicates("study").set_index("study")["accession"]
    assert set(accession) - set(keys) == {accession[str(ZEROS_LOST)], accession[str(MISTYPED)]}
    assert accession[str(ZEROS_LOST)].lstrip("0") in keys
    wrong = [key for key in keys if key not in studies.index and key != accession[str(ZEROS_LOST)].lstrip("0")]
    assert len(wrong) == 1 and sorted(wrong[0]) == sorted(accession[str(MISTYPED)])
    assert [key for key in set(known) if known.count(key) == 2] == [accession[str(TWICE)]]
    assert any(isinstance(row[0].value, int) for row in rows) and any(isinstance(row[0].value, str) for row in rows)

    words = {word: finding for finding, words in WORDS.items() for word in words}
    twice = []
    for key, row in zip(keys, rows, strict=True):
        _, patient, name, result, *readers, date = (cell.value for cell in row)
        assert isinstance(patient, str) and isinstance(date, datetime) and words[result]
        assert all(reader is None or words[reader] in ("occluded", "patent") for reader in readers)
        if key == accession[str(TWICE)]:
            twice.append(words[result])
        elif key in studies.index:
            study = studies.loc[key]
            assert patient == study["patient_id"] and words[result] == study["reported"]
            assert unicodedata.normalize("NFC", name) == study["name"] and str(date.year) == study["year"]
    assert len(set(twice)) == 2
    assert {"equivocal", "판정 불가"} <= {row[3].value for row in rows}
    names = [row[2].value for row in rows]
    assert 0 < sum(name == unicodedata.normalize("NFC", name) for name in names) < len(names)
    assert any("가" <= word[0] <= "힣" for word in WORDS["occluded"])
