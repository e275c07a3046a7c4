"""The whole import: a phantom hospital with a known truth."""

import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from raymed.config import UserError
from raymed.data import DataConfig, load
from raymed.data.intake import ImportConfig, ImportReport, SheetColumns, import_data
from raymed.data.intake.pseudonyms import open_vault
from raymed.data.phantom_hospital import write_hospital
from raymed.data.readers import read

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """Folder of the phantom hospital, and its truth, a row an image."""
    folder = write_hospital(tmp_path_factory.mktemp("share") / "hospital", num_studies=40)
    return folder, pd.read_csv(folder / "truth.csv", dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def config(hospital, tmp_path_factory):
    folder, home = hospital[0], tmp_path_factory.mktemp("import")
    return ImportConfig(
        images=folder / "images",
        labels=folder / "labels.xlsx",
        sheet="Labels",
        to=home / "imported",
        columns=SheetColumns(label="Result", readers=("Reader1", "Reader2"), patient="PatientID", date="ExamDate"),
        map=("occluded=폐쇄,occ.", "patent=개통"),
        unlabelled=("equivocal", "판정 불가"),
        patients=folder / "mapping.csv",
        modalities=("RF", "XA"),
        site="InstitutionName",
        on_problem="skip",
        key_file=home / "secret" / "my.key",
    )


@pytest.fixture(scope="module")
def report(config) -> ImportReport:
    return import_data(config)


def manifest_of(report, name="manifest.csv"):
    return pd.read_csv(report.manifest.with_name(name), dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def joined(hospital, config, report):
    """Manifest and truth side by side, a row an image; columns of the truth end in _t."""
    vault, manifest = open_vault(config.key_file), manifest_of(report)
    origins = [vault.whois(Path(name).stem)[0].split(" frame ")[0] for name in manifest["image"]]
    truth = hospital[1].add_suffix("_t").set_index("image_t")
    both = manifest.join(truth.loc[origins].reset_index())
    return both.assign(origin=origins)


def usable(truth):
    """The images that an honest import uses: their row is right, they are no CT, and somebody could tell."""
    rows = truth["key_in_sheet"] == truth["accession"]
    contradicted = truth["study"] == "7"  # has two rows that differ
    return rows & ~contradicted & (truth["modality"] != "CT") & (truth["reported"] != "equivocal")


def test_exactly_the_usable_images_are_in_the_manifest(hospital, joined):
    truth = hospital[1]
    assert sorted(joined["origin"]) == sorted(truth.loc[usable(truth), "image"])


def test_every_row_tells_the_truth(joined):
    assert joined["label"].tolist() == joined["reported_t"].tolist()
    for column in ("year", "right", "modality", "site", "burned_in", "age"):
        assert joined[column].tolist() == joined[f"{column}_t"].tolist(), column
    assert set(joined["view"]) == {"AP"} and set(joined["sex"]) == {"F"} and set(joined["frame"]) == {""}
    assert set(joined["label_reader1"]) == {"occluded", "patent"}
    assert (joined["label_reader1"] == joined["label_t"]).mean() > 0.75


def test_a_pseudonym_is_a_person_and_a_case_a_study(joined):
    assert joined.groupby("patient")["person_t"].nunique().max() == 1
    assert joined.groupby("person_t")["patient"].nunique().max() == 1
    assert joined.groupby("case")["study_t"].nunique().max() == joined.groupby("study_t")["case"].nunique().max() == 1
    assert joined.groupby("person_t")["study_t"].nunique().max() == 2  # seen twice, or under two numbers
    assert joined.groupby("name_t")["patient"].nunique().max() == 2  # namesakes


def test_the_flow_adds_up(hospital, report, joined):
    (first, total), *left_out, (last, num) = report.flow
    assert (first, last) == ("files", "in the manifest")
    assert total == sum(1 for file in (hospital[0] / "images").rglob("*") if file.is_file())
    assert total == sum(count for _, count in left_out) + num and num == len(joined)
    truth = hospital[1]
    equivocal = truth["reported"].eq("equivocal") & usable(truth.assign(reported="x"))
    assert dict(left_out) == {
        "not an image": 2,
        "no row in the sheet": 4,
        "its row cannot be used: duplicate key": 2,
        "modality CT": 1,
    } | {text: count for text, count in left_out if text.startswith("unlabelled")}
    assert len(manifest_of(report, "unlabelled.csv")) == equivocal.sum() >= 2
    assert report.classes == joined["label"].value_counts().to_dict()


def test_wrong_rows_are_named_without_identifiers(report):
    (near,) = (note for note in report.notes if "leading zeros" in note)
    (without,) = (note for note in report.notes if note.startswith("label without an image"))
    (twice,) = (note for note in report.notes if "duplicate key" in note)
    assert "1 row (" in near and "2 rows (" in without and "2 rows (" in twice
    assert "26 rows" not in report.text()
    listed = pd.read_csv(report.private / "problems.csv", dtype=str, encoding="utf-8-sig")
    assert listed["kind"].value_counts().to_dict() == {
        "image without a label": 4,
        "near miss": 2,
        "label without an image": 2,
        "duplicate key": 2,
    }


def test_no_name_and_no_number_leaves(hospital, config, report):
    truth = hospital[1]
    planted = {text for column in ("patient_id", "accession", "name") for text in truth[column]}
    planted |= {part for name in truth["roman"] for part in name.split("^") if len(part) > 3}
    planted |= {text.lstrip("0") for text in planted}
    files = [file for file in config.to.rglob("*") if file.is_file()]
    assert len(files) > 40
    content = b"\n".join([*(file.read_bytes() for file in files), *(file.name.encode() for file in files)])
    content += (
        report.text().encode() + (config.to / "import.json").read_text().encode().decode("unicode_escape").encode()
    )
    content = content.lower()
    assert [text for text in planted if text.lower().encode() in content] == []
    assert any(text.encode() in (report.private / "problems.csv").read_bytes() for text in planted)


def test_burned_in_text_is_blanked(config, joined):
    with_text = joined[joined["text_box_t"] != ""]
    assert len(with_text) >= 10
    for image, box in zip(with_text["image"], with_text["text_box_t"], strict=True):
        x0, y0, x1, y1 = map(int, box.split())
        assert (read(config.to / image)[y0:y1, x0:x1] == 0).mean() > 0.85, image
    without = joined[joined["text_box_t"] == ""]
    assert (without["blank_boxes"] != "").mean() < 0.15


def test_pixels_are_those_of_the_reader(hospital, config, joined):
    """MONOCHROME1 inverted, 12 bits in 16, the middle frame of a run."""
    for row in joined[joined["blank_boxes"] == ""].itertuples():
        frames = int(str(row.frames_t))
        original = read(hospital[0] / "images" / str(row.origin), (frames + 1) // 2 if frames > 1 else None)
        assert np.array_equal(read(config.to / str(row.image)), original)


def test_the_manifest_loads(report, tmp_path):
    (positive,) = re.findall(r"--data.positive=(\S+)", report.command)
    assert positive == "occluded" and f"--data.manifest={report.manifest}" in report.command
    data = load(DataConfig(manifest=str(report.manifest), positive=positive), tmp_path)
    assert data.classes == ("occluded", "patent") and data.preprocess.size == 160
    assert len(data) == report.counts["images"] and len(set(data.patients)) == report.counts["patients"]
    assert data.cases is not None and len(set(data.cases)) == report.counts["cases"]


def test_again_gives_the_same_and_copies_nothing(config, report):
    images = sorted((config.to / "images").iterdir())
    before = [image.stat().st_mtime_ns for image in images], report.manifest.read_bytes()
    assert import_data(config) == report
    assert before == ([image.stat().st_mtime_ns for image in images], report.manifest.read_bytes())


def test_another_key_is_refused_where_one_was_used(config, report):
    with pytest.raises(UserError, match="was imported with another key"):
        import_data(replace(config, key_file=config.key_file.with_name("other.key")))


def test_what_cannot_be_used_stops_it_unless_skipped(config, report, tmp_path):
    with pytest.raises(UserError) as info:
        import_data(replace(config, on_problem="error", to=tmp_path / "imported"))
    assert "duplicate key: row" in str(info.value) and "--on-problem skip" in str(info.value)
    assert not (tmp_path / "imported").exists()


def test_the_jobs(config, monkeypatch, capsys, report):
    def run(job, *arguments):
        monkeypatch.setattr(sys, "argv", [job, *map(str, arguments)])
        runpy.run_path(str(REPO / "jobs" / f"{job}.py"), run_name="__main__")
        return capsys.readouterr().out

    flags = ["--images", config.images, "--labels", config.labels, "--sheet", "Labels", "--to", config.to]
    flags += ["--columns.label", "Result", "--columns.readers", "Reader1", "Reader2", "--columns.patient", "PatientID"]
    flags += ["--columns.date", "ExamDate", "--map", *config.map, "--unlabelled", *config.unlabelled]
    flags += ["--patients", config.patients, "--modalities", "RF", "XA", "--site", "InstitutionName"]
    flags += ["--on-problem", "skip", "--key-file", config.key_file]
    assert run("import_data", *flags).strip() == report.text()
    row = manifest_of(report).iloc[0]
    told = run("whois", row["patient"], row["case"], "--key-file", config.key_file).splitlines()
    assert re.fullmatch(rf"{row['patient']}: \d{{8}}", told[0]) and re.fullmatch(rf"{row['case']}: \d{{8}}", told[1])


def test_paths_that_name_patients_need_copies(config, hospital, tmp_path):
    truth = hospital[1]
    share = tmp_path / truth.loc[0, "patient_id"]
    shutil.copytree(config.images, tmp_path / "share" / share.name)
    named = replace(config, images=tmp_path / "share", to=tmp_path / "imported", copy=False)
    with pytest.raises(UserError, match="hold a name or number of a patient or case.* leave out --no-copy"):
        import_data(named)
    assert share.name not in import_data(replace(named, copy=True)).manifest.read_text()
