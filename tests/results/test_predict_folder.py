"""A folder as it comes off a share: studies put together, names under pseudonyms, nothing lost."""

import os
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from predict_example import make_bundle, origin_of, read_rows

from raymed.config import UserError
from raymed.data.intake import ImportConfig, SheetColumns, import_data
from raymed.data.intake.pseudonyms import open_vault
from raymed.data.manifest import DataConfig
from raymed.data.phantom_hospital import write_hospital
from raymed.data.preprocess import Preprocess
from raymed.data.readers import ImageProblem
from raymed.results.predict import asked_cases, predict
from raymed.results.predict_cases import ImageFolder

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle():
    return make_bundle()


@pytest.fixture(scope="module")
def hospital(tmp_path_factory) -> Path:
    """With a DICOM file whose pixels are cut off, a volume with a damaged header, and an empty file."""
    folder = write_hospital(tmp_path_factory.mktemp("share") / "hospital", num_studies=12, size=96)
    first = folder / "images" / truth_of(folder)["image"].iloc[0]
    first.write_bytes(first.read_bytes()[:-3000])
    (folder / "images" / "damaged.nii").write_bytes(bytes(400))
    (folder / "images" / "empty.dcm").touch()
    return folder


def truth_of(hospital: Path) -> pd.DataFrame:
    return read_rows(hospital / "truth.csv")


@pytest.fixture(scope="module")
def asked(bundle, hospital, tmp_path_factory):
    """(what is asked of the folder, key file)."""
    key_file = tmp_path_factory.mktemp("secret") / "my.key"
    config = ImageFolder(images=hospital / "images", modalities=("RF", "XA"), key_file=key_file)
    return asked_cases(bundle, config, DataConfig(manifest="")), key_file


@pytest.fixture(scope="module")
def answered(bundle, asked, tmp_path_factory):
    to = tmp_path_factory.mktemp("answers") / "found.csv"
    return predict(bundle, replace(origin_of(bundle), preprocessing=asked[0].settings), asked[0].cases, to)


def test_images_are_put_together_by_their_study(asked, answered, hospital):
    vault, truth = open_vault(asked[1]), truth_of(hospital)
    rows, images = read_rows(answered.path), read_rows(answered.image_path)
    images["file"] = [vault.whois(name)[0].split(" frame ")[0] for name in images["image"]]
    study = dict(zip(truth["image"], truth["study"], strict=True))
    person = dict(zip(truth["image"], truth["patient_id"], strict=True))
    known = images[images["file"].isin(truth["image"])]
    assert set(known["file"]) == set(truth["image"]) and known["image"].is_unique
    assert (known.groupby("case")["file"].agg(lambda files: len({study[file] for file in files})) == 1).all()
    assert known["case"].nunique() == truth["study"].nunique()
    for row in known.itertuples():
        assert vault.whois(row.patient) == [person[row.file]]
        (uid,) = vault.whois(row.case)
        assert uid == pydicom.dcmread(hospital / "images" / row.file, stop_before_pixels=True).StudyInstanceUID
    assert len(rows) == known["case"].nunique() + 2  # what is damaged or empty is of no study that could be known


def test_nothing_is_lost(asked, answered, hospital):
    vault, images = open_vault(asked[1]), read_rows(answered.image_path)
    problems = {vault.whois(row.image)[0]: row.problem for row in images[images["problem"] != ""].itertuples()}
    truth = truth_of(hospital)
    (ct,) = truth.loc[truth["modality"] == "CT", "image"]
    assert problems == {
        truth["image"].iloc[0]: "truncated or damaged",
        ct: "modality CT",
        "damaged.nii": "damaged header",
        "empty.dcm": "empty file",
    }
    assert "2 files: not an image" in asked[0].notes
    rows = read_rows(answered.path)
    assert (rows["score"] == "").sum() == answered.unscored
    assert (rows.loc[rows["score"] == "", "num_images"] == "0").all()


def test_no_identifier_is_in_the_answers_nor_in_what_is_told(asked, answered, hospital):
    truth = truth_of(hospital)
    planted = {*truth["name"], *truth["patient_id"], *truth["accession"], *truth["image"]}
    planted |= {part for roman in truth["roman"] for part in roman.replace("^", " ").split() if len(part) > 2}
    planted |= {
        pydicom.dcmread(hospital / "images" / n, stop_before_pixels=True).StudyInstanceUID for n in truth["image"]
    }
    assert len(planted) > 50
    texts = [answered.path.read_text(), answered.image_path.read_text(), *asked[0].notes, asked[0].settings]
    texts += [file.name for file in answered.path.parent.iterdir()]
    whole = "\n".join(texts).casefold()
    words = set(re.findall(r"[^\W_]+", whole))  # a name as short as Bae is within many a pseudonym
    assert [text for text in planted if text and text.casefold() in (words if len(text) < 6 else whole)] == []


def test_cases_have_the_pseudonyms_and_pixels_of_the_import_with_its_key(hospital, tmp_path):
    key_file = tmp_path / "secret" / "my.key"
    config = ImportConfig(
        images=hospital / "images",
        labels=hospital / "labels.xlsx",
        sheet="Labels",
        to=tmp_path / "imported",
        columns=SheetColumns(label="Result"),
        modalities=("RF", "XA"),
        on_problem="skip",
        key_file=key_file,
    )
    manifest = read_rows(import_data(config).manifest)
    folder = ImageFolder(config.images, "AccessionNumber", modalities=("RF", "XA"), key_file=key_file)
    asked = asked_cases(make_bundle(), folder, DataConfig(manifest=""))
    cases = {case.case: case for case in asked.cases}
    assert set(manifest["case"]) <= set(cases) and len(manifest) > 10
    for case, rows in manifest.groupby("case"):
        assert set(rows["patient"]) == {cases[case].patient}
        mine = [image for image in cases[case].images if not image.problem]
        pictures = [np.asarray(Image.open(config.to / name)) for name in rows["image"]]
        read = []
        for image in mine:
            try:
                read.append(image.read(None))
            except ImageProblem:
                continue
        assert all(any(np.array_equal(picture, pixels) for pixels in read) for picture in pictures)
    assert manifest["blank_boxes"].ne("").any()


def write_pictures(root: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("a.png", "b.png", "Kim Minji/1.png", "Kim Minji/2.png", "late/Lee/7.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 200, (20, 20), dtype=np.uint8)).save(root / name)
    frames = [Image.fromarray(random.integers(0, 200, (20, 20), dtype=np.uint8)) for _ in range(4)]
    frames[0].save(root / "late" / "run.tif", save_all=True, append_images=frames[1:])


def test_pictures_are_put_together_by_their_folder(tmp_path):
    root, key_file = tmp_path / "pictures", tmp_path / "secret" / "my.key"
    write_pictures(root)
    config = ImageFolder(images=root, key_file=key_file)
    cases = asked_cases(make_bundle(), config, DataConfig(manifest="")).cases
    vault = open_vault(key_file)
    told = {vault.whois(case.case)[0]: [vault.whois(image.name)[0] for image in case.images] for case in cases}
    assert told == {
        "a.png": ["a.png"],
        "b.png": ["b.png"],
        "Kim Minji": ["Kim Minji/1.png", "Kim Minji/2.png"],
        "late": ["late/run.tif frame 2"],
        "late/Lee": ["late/Lee/7.png"],
    }
    by_stem = asked_cases(make_bundle(), replace(config, key="stem", frames="all"), DataConfig(manifest="")).cases
    assert sorted(len(case.images) for case in by_stem) == [1, 1, 1, 1, 1, 4]


def test_pictures_without_a_side_are_listed_where_sides_are_decided_about(tmp_path):
    bundle = make_bundle(unit="case+side")
    write_pictures(tmp_path / "pictures")
    config = ImageFolder(images=tmp_path / "pictures", key_file=tmp_path / "my.key")
    asked = asked_cases(bundle, config, DataConfig(manifest=""))
    done = predict(bundle, origin_of(bundle), asked.cases, tmp_path / "found.csv")
    assert set(read_rows(done.image_path)["problem"]) == {"no side is stated"} and done.unscored == done.cases == 5


def test_another_export_in_the_same_folder_is_answered_anew(bundle, tmp_path):
    """Names and pseudonyms are those of the last one; names in another encoding are told, and do not end it."""
    root, to = tmp_path / "pictures", tmp_path / "found.csv"
    config = ImageFolder(images=root, key_file=tmp_path / "my.key", blank="none")
    write_pictures(root)

    def run(to):
        asked = asked_cases(bundle, config, DataConfig(manifest=""))
        return predict(bundle, origin_of(bundle), asked.cases, to), asked.notes

    assert run(to)[0].before == 0 and run(to)[0].before == 5
    for number, file in enumerate(sorted(root.rglob("*.png"))):
        Image.fromarray(np.random.default_rng(number).integers(0, 120, (20, 20), dtype=np.uint8)).save(file)
    (root / "empty.png").touch()
    os.rename(root / "empty.png", os.fsencode(root) + "/김영희.png".encode("cp949"))
    done, notes = run(to)
    assert done.before == 1 and done.cases == 5  # that of the TIFF, which is the same
    assert "1 files: name is not UTF-8: mount the share with iocharset=utf8" in notes
    anew = run(tmp_path / "fresh.csv")[0]
    rows, fresh = (read_rows(path).set_index("case") for path in (to, anew.path))
    assert rows.loc[fresh.index].equals(fresh)


def test_what_cannot_be_a_folder_of_images_is_refused(bundle, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("nothing")
    for config, message in (
        (ImageFolder(images=tmp_path / "texts", key_file=tmp_path / "my.key"), "holds no image"),
        (ImageFolder(images=tmp_path / "none", key_file=tmp_path / "my.key"), "there is no folder"),
        (ImageFolder(images=tmp_path / "texts", key_file=tmp_path / "texts" / "my.key"), "must not lie in"),
        (ImageFolder(images=tmp_path / "texts", key="Accesion", key_file=tmp_path / "my.key"), "did you mean 'Acc"),
    ):
        with pytest.raises(UserError, match=message):
            asked_cases(bundle, config, DataConfig(manifest=""))
    for wrong in ({"blank": "some"}, {"frames": "every"}):
        with pytest.raises(UserError, match="blank|frames"):
            ImageFolder(**wrong)


def test_the_job_reads_a_folder_and_its_rows_are_taken_back(bundle, tmp_path, monkeypatch, capsys):
    root, to = tmp_path / "pictures", tmp_path / "found.csv"
    write_pictures(root)
    model = replace(bundle, preprocess=bundle.preprocess | {"normalisation": "image"}).save(tmp_path / "model")

    def run(job, *flags):
        monkeypatch.setattr(sys, "argv", [job, *map(str, flags)])
        runpy.run_path(str(REPO / "jobs" / f"{job}.py"), run_name="__main__")
        return capsys.readouterr().out

    flags = ["--model", model, "--images", root, "--key-file", tmp_path / "my.key", "--to", to]
    assert "5 cases\n" in run("predict", *flags)
    before = to.read_bytes()
    assert "5 of them there already" in run("predict", *flags) and to.read_bytes() == before
    case = read_rows(to)["case"].iloc[0]
    assert run("whois", case, "--key-file", tmp_path / "my.key").startswith(f"{case}: ")
    assert set(read_rows(to)["preprocessing"].str.contains("frames=middle blank=found")) == {True}
    shutil.rmtree(root / "late")
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, flags), "--blank", "none"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(REPO / "jobs" / "predict.py"), run_name="__main__")
    assert "another preprocessing" in capsys.readouterr().err


def test_a_model_s_window_is_that_of_the_images(tmp_path):
    """A CT slice in the units of the rescaled values."""
    folder = write_hospital(tmp_path / "hospital", num_studies=12, size=64)
    truth = truth_of(folder)
    (ct,) = truth.loc[truth["modality"] == "CT", "image"]
    config = ImageFolder(folder / "images", files=(ct,), blank="none", key_file=tmp_path / "my.key")
    (case,) = asked_cases(make_bundle(), config, DataConfig(manifest="")).cases
    wide, narrow = (case.images[0].read(window) for window in (None, (0.0, 50.0)))
    assert Preprocess(size=16).to_array(narrow).std() > 0 and not np.array_equal(wide, narrow)
