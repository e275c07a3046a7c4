"""A row a case says what the predictor says; killed anywhere, the same call ends with the same bytes."""

import csv
import hashlib
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from predict_example import BAND, BIAS, TEMPERATURE, THRESHOLD, make_bundle, origin_of, read_rows, write_images

from raymed.config import UserError
from raymed.data.manifest import DataConfig
from raymed.data.readers import read
from raymed.results.predict import asked_cases, bundle_hash, load_origin, predict
from raymed.results.predict_cases import ImageFolder
from raymed.results.predict_table import CASE_COLUMNS, IMAGE_COLUMNS
from raymed.tasks.predictor import Predictor
from raymed.threads import one_thread

REPO = Path(__file__).resolve().parents[2]
NUM = 12


@pytest.fixture(scope="module")
def bundle():
    return make_bundle()


@pytest.fixture
def images(tmp_path) -> Path:
    """Folder of a manifest: in case 3 one image is cut off, in case 4 one is gone and one empty."""
    folder = tmp_path / "images"
    write_images(folder, NUM)
    cut = folder / "003_left.png"
    cut.write_bytes(cut.read_bytes()[:100])
    (folder / "004_left.png").unlink()
    (folder / "004_right.png").write_bytes(b"")
    return folder


def cases_of(bundle, folder: Path):
    return asked_cases(bundle, ImageFolder(), DataConfig(manifest=str(folder / "manifest.csv"))).cases


def run(bundle, folder: Path, to: Path):
    return predict(bundle, origin_of(bundle), cases_of(bundle, folder), to)


def files_of(to: Path) -> tuple[bytes, bytes]:
    return to.read_bytes(), to.with_name("found_images.csv").read_bytes()


def test_rows_say_what_the_predictor_says(bundle, images, tmp_path):
    done = run(bundle, images, tmp_path / "found.csv")
    rows, shown = read_rows(done.path), read_rows(done.image_path)
    assert (*rows,) == CASE_COLUMNS and (*shown,) == IMAGE_COLUMNS
    assert rows["case"].tolist() == [f"C-{case:03d}" for case in range(NUM)] and len(shown) == 2 * NUM
    predictor = Predictor.from_bundle(bundle)
    decisions = set()
    for case, row in rows.set_index("case").iterrows():
        names = [f"{case[2:]}_{side}.png" for side in ("left", "right")]
        if case in ("C-003", "C-004"):
            names = names[1:] if case == "C-003" else []
        with one_thread():
            predictions = predictor([read(images / name) for name in names])
        of_case = shown[shown["case"] == case].set_index("image")
        for name, prediction in zip(names, predictions, strict=True):
            assert float(of_case.loc[name, "raw_score"]) == pytest.approx(prediction.raw_probability, abs=2e-6)
            assert of_case.loc[name, "foreign"] == ("yes" if prediction.ood["foreign"] else "no")
        if names:
            mean = np.mean([prediction.raw_probability for prediction in predictions])
            calibrated = 1 / (1 + np.exp(-(np.log(mean / (1 - mean)) / TEMPERATURE + BIAS)))
            assert float(row["score"]) == pytest.approx(calibrated, abs=2e-6)
            assert row["decision"] == ("occluded" if mean >= THRESHOLD else "개통")
            assert (float(row["score"]) >= float(row["threshold"])) == (mean >= THRESHOLD)
            assert float(row["score"]) == predictor.case(predictions).probability  # to the last bit
            assert row["answer"] == predictor.answer(predictor.case(predictions))[0]
            assert row["uncertain"] == ("yes" if BAND[0] <= mean <= BAND[1] else "no")
            assert ("inside the uncertain band" in row["reasons"]) == (row["uncertain"] == "yes")
            foreign = [n for n, p in zip(names, predictions, strict=True) if p.ood["foreign"]]
            assert all(n in row["reasons"] for n in foreign) and ("unlike" in row["reasons"]) == bool(foreign)
            assert (row["answer"] == "abstain") == (row["uncertain"] == "yes" or bool(foreign))
            decisions.add(row["decision"])
        assert row["num_images"] == str(len(names)) and row["patient"] == f"P-{int(case[2:]) // 2:03d}"
        assert bool(names) == bool(row["answer"])
        assert row["bundle"] == bundle_hash(bundle) and row["model"] == row["run_id"] == "train-1/final"
        assert row["intended_use"] == bundle.intended_use and row["research_only"] == "yes"
    assert decisions == {"occluded", "개통"} and set(rows["uncertain"]) == {"yes", "no", ""}


def test_images_that_cannot_be_used_are_listed_and_their_cases_answered_from_the_others(bundle, images, tmp_path):
    done = run(bundle, images, tmp_path / "found.csv")
    assert (done.cases, done.problems, done.unscored) == (NUM, 3, 1) and "3 images could not be used" in done.text()
    problems = read_rows(done.image_path).set_index("image")["problem"]
    assert problems[problems != ""].to_dict() == {
        "003_left.png": "truncated or damaged",
        "004_left.png": "there is no such file",
        "004_right.png": "the file is empty (0 bytes)",
    }
    rows = read_rows(done.path).set_index("case")
    one, none = rows.loc["C-003"], rows.loc["C-004"]
    assert "fewer images than usual: 1 of 2" in one["reasons"] and one["score"] and one["decision"]
    assert one["answer"] == "abstain", "nobody knows what the other one shows"
    assert "not used: 003_left.png (truncated or damaged)" in one["reasons"]
    assert not none["score"] and not none["decision"] and none["reasons"].startswith("no image can be used; ")
    assert not rows["reasons"].drop(["C-003", "C-004"]).str.contains("usual|not used").any()


def test_killed_anywhere_the_same_call_ends_with_the_same_bytes(bundle, images, tmp_path):
    """Rows are written images first; whatever was cut off, in the middle of a letter of Hangul too."""
    to = tmp_path / "found.csv"
    run(bundle, images, to)
    of_cases, of_images = whole = files_of(to)
    ends = [i + 1 for i, byte in enumerate(of_cases) if byte == 10]  # of the header, then of each case
    hangul = of_cases.index("개통".encode()) + 1
    for cut in (0, ends[0], ends[3] - 1, ends[3], ends[6] + 9, hangul, len(of_cases)):
        num_whole = sum(end <= cut for end in ends[1:])
        # The images of the case that was being written stand there in part.
        lines = of_images.split(b"\n", 2 * num_whole + 2)
        written = b"\n".join(lines[:-1]) + b"\n" + lines[-1][:7] if num_whole < NUM else of_images
        to.write_bytes(of_cases[:cut])
        to.with_name("found_images.csv").write_bytes(written if cut else b"")
        again = run(bundle, images, to)
        assert again.before == num_whole and files_of(to) == whole, cut


def test_rows_whose_images_the_disk_has_lost_are_answered_again(bundle, images, tmp_path):
    """After a power cut the file of cases may be ahead of that of images."""
    to = tmp_path / "found.csv"
    run(bundle, images, to)
    whole, beside = files_of(to), to.with_name("found_images.csv")
    beside.write_bytes(
        b"\n".join(whole[1].split(b"\n")[:-4]) + b"\n"
    )  # the last image of the case before, and two more
    again = run(bundle, images, to)
    assert again.before == NUM - 2 and files_of(to) == whole


def test_an_intended_use_of_several_lines_is_cut_off_nowhere(bundle, images, tmp_path):
    """A row is a line, whatever somebody has stated."""
    stated, to = replace(bundle, intended_use='triage,\n"of" HSG\n'), tmp_path / "found.csv"
    run(stated, images, to)
    whole = files_of(to)
    assert set(read_rows(to)["intended_use"]) == {'triage, "of" HSG'} and whole[0].count(b"\n") == NUM + 1
    to.write_bytes(whole[0][:-20])
    assert run(stated, images, to).before == NUM - 1 and files_of(to) == whole


def test_an_interrupted_run_keeps_what_it_has(bundle, images, tmp_path):
    cases, to = cases_of(bundle, images), tmp_path / "found.csv"

    class Interrupts:
        path = images / "006_left.png"

        def read(self, window):
            raise KeyboardInterrupt

    stopped = replace(cases[6], images=(replace(cases[6].images[0], source=Interrupts()), *cases[6].images[1:]))
    with pytest.raises(KeyboardInterrupt):
        predict(bundle, origin_of(bundle), [*cases[:6], stopped, *cases[7:]], to)
    assert read_rows(to)["case"].tolist() == [case.case for case in cases[:6]]
    assert predict(bundle, origin_of(bundle), cases, to).before == 6
    run(bundle, images, tmp_path / "found2.csv")
    assert to.read_bytes() == (tmp_path / "found2.csv").read_bytes()


def test_a_case_with_other_images_than_before_is_answered_again(bundle, images, tmp_path):
    to = tmp_path / "found.csv"
    run(bundle, images, to)
    shutil.copy(images / "001_left.png", images / "late.png")
    with (images / "manifest.csv").open("a") as manifest:
        manifest.write("late.png,C-005,P-002,left\nnew.png,C-900,P-900,left\n")
    done = run(bundle, images, to)
    rows = read_rows(to)
    assert done.before == NUM - 1 and rows["case"].is_unique and len(rows) == NUM + 1
    assert rows.set_index("case").loc["C-005", "num_images"] == "3"
    assert len(read_rows(done.image_path)) == 2 * NUM + 2
    # Rows of cases that are not asked for any more stay.
    predict(bundle, origin_of(bundle), cases_of(bundle, images)[:2], to)
    assert len(read_rows(to)) == NUM + 1


def test_a_file_with_other_content_than_before_is_answered_again(bundle, images, tmp_path):
    """Of the same name; and one in which something else is painted black."""
    to, table = tmp_path / "found.csv", read_rows(images / "manifest.csv")
    run(bundle, images, to)
    before = read_rows(to).set_index("case")["score"]
    shutil.copy(images / "000_left.png", images / "001_left.png")
    shutil.copy(images / "002_left.png", images / "004_left.png")  # was gone
    table["blank_boxes"] = ""
    table.loc[table["case"] == "C-005", "blank_boxes"] = "0 0 9 20"
    table.to_csv(images / "manifest.csv", index=False)
    done = run(bundle, images, to)
    rows, fresh = (read_rows(path).set_index("case") for path in (to, run(bundle, images, tmp_path / "fresh.csv").path))
    assert done.before == NUM - 3 and done.decisions.keys() <= {"occluded", "개통"} and len(rows) == NUM
    assert rows.loc[fresh.index].equals(fresh)
    assert (rows["score"] != before.loc[rows.index]).sum() == 3 and rows["score"].all()
    assert run(bundle, images, to).before == NUM


def test_an_image_that_could_not_be_opened_is_asked_for_again(bundle, images, tmp_path, monkeypatch):
    """Its file is the same: what was lacking is the permission."""
    cases, to, opened = cases_of(bundle, images), tmp_path / "found.csv", Path.open

    def forbid(path, *rest, **named):
        if path == cases[6].images[0].source.path:
            raise PermissionError(13, "Permission denied")
        return opened(path, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", forbid)
        predict(bundle, origin_of(bundle), cases, to)
    assert read_rows(to).set_index("case").loc["C-006", "num_images"] == "1"
    assert predict(bundle, origin_of(bundle), cases, to).before == NUM - 1
    assert read_rows(to).set_index("case").loc["C-006", "num_images"] == "2"


def test_answers_of_another_model_or_table_are_not_mixed(bundle, images, tmp_path):
    to = tmp_path / "found.csv"
    cases = cases_of(bundle, images)
    predict(bundle, origin_of(bundle), cases[:2], to)
    before = files_of(to)
    other = make_bundle(aggregate="max")
    with pytest.raises(UserError, match="another model.*--to"):
        predict(other, origin_of(other), cases, to)
    with pytest.raises(UserError, match="another preprocessing.*--to"):
        predict(bundle, replace(origin_of(bundle), preprocessing="size=16 blank=none"), cases, to)
    assert files_of(to) == before
    for content in ("name,age\nKim,44\n", "my notes"):
        (tmp_path / "other.csv").write_text(content)
        with pytest.raises(UserError, match="no table of predictions"):
            predict(bundle, origin_of(bundle), cases, tmp_path / "other.csv")
        assert (tmp_path / "other.csv").read_text() == content
    later = ("answer", "run_id", "intended_use", "research_only")
    read_rows(to).drop(columns=[*later]).to_csv(to, index=False, encoding="utf-8-sig")
    before = files_of(to)
    with pytest.raises(UserError, match="an earlier version, without answer, .*--to"):
        predict(bundle, origin_of(bundle), cases, to)
    assert files_of(to) == before
    with pytest.raises(UserError, match="on this machine"):
        predict(bundle, origin_of(bundle), cases, Path("s3://bucket/found.csv"))


@pytest.mark.parametrize(
    ("unit", "num", "filled"),
    [
        ("image", 2 * NUM, {"case", "side", "image", "patient"}),
        ("case+side", 2 * NUM, {"case", "side", "patient"}),
        ("patient", NUM // 2, {"patient"}),
    ],
)
def test_rows_are_of_what_the_model_decides_about(unit, num, filled, images, tmp_path):
    """And an interrupted run goes on there too."""
    bundle = make_bundle(unit=unit)
    done = run(bundle, images, tmp_path / "found.csv")
    rows, whole = read_rows(done.path), files_of(done.path)
    assert len(rows) == num and len(read_rows(done.image_path)) == 2 * NUM
    assert {name for name in ("case", "side", "image", "patient") if rows[name].all()} == filled
    assert not rows["reasons"].str.contains("usual").any()
    done.path.write_bytes(whole[0][: len(whole[0]) // 2])
    assert 0 < run(bundle, images, done.path).before < num and files_of(done.path) == whole


def test_a_manifest_must_tell_what_the_model_decides_about(images):
    manifest = images / "manifest.csv"
    read_rows(manifest)[["image", "case"]].to_csv(manifest, index=False)
    assert len(cases_of(make_bundle(), images)) == NUM
    for unit, missing in (("patient", "patient"), ("case+side", "side")):
        with pytest.raises(UserError, match=f"decides about a .*--data.{missing} COLUMN"):
            cases_of(make_bundle(unit=unit), images)
    for stated in ({}, {"images": images}):
        with pytest.raises(UserError, match="--images DIR or --data.manifest FILE"):
            asked_cases(make_bundle(), ImageFolder(**stated), DataConfig(manifest=str(manifest) if stated else ""))


def test_who_is_not_stated_is_a_case_of_its_own_and_images_twice_count_once(images):
    table = read_rows(images / "manifest.csv")
    table.loc[:1, "case"] = ""
    pd.concat([table, table.tail(1)]).to_csv(images / "manifest.csv", index=False)
    asked = asked_cases(make_bundle(), ImageFolder(), DataConfig(manifest=str(images / "manifest.csv")))
    assert [case.case for case in asked.cases[:3]] == ["row 1", "row 2", "C-001"]
    assert len(asked.cases) == NUM + 1 and len(asked.cases[-1].images) == 2
    assert f"the same image as an earlier row: 1 row ({2 * NUM + 1})" in asked.notes[-1]


def test_images_of_a_case_without_a_patient_stay_together(images):
    table = read_rows(images / "manifest.csv")
    table.loc[table["case"] == "C-002", "patient"] = ""
    table.loc[0, ["case", "patient"]] = ""
    table.to_csv(images / "manifest.csv", index=False)
    asked = asked_cases(make_bundle(), ImageFolder(), DataConfig(manifest=str(images / "manifest.csv")))
    found = {case.case: (case.patient, len(case.images)) for case in asked.cases}
    assert found["C-002"] == ("case C-002", 2) and found["row 1"] == ("row 1", 1) and found["C-001"] == ("P-000", 2)
    assert len(asked.cases) == NUM + 1


def test_a_share_that_is_gone_stops_the_run_and_lists_nothing_as_unreadable(bundle, images, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    cases, to, away = cases_of(bundle, images), tmp_path / "found.csv", tmp_path / "away"

    class Disconnects:
        path = cases[7].images[0].source.path

        def read(self, window):
            images.rename(away)
            return read(away / self.path.name, window=window)

    lost = replace(cases[7], images=(replace(cases[7].images[0], source=Disconnects()), *cases[7].images[1:]))
    with pytest.raises(UserError, match="stopped answering.*the same command goes on"):
        predict(bundle, origin_of(bundle), [*cases[:7], lost, *cases[8:]], to)
    assert len(read_rows(to)) == 7
    away.rename(images)
    assert predict(bundle, origin_of(bundle), cases, to).before == 7
    assert read_rows(to.with_name("found_images.csv"))["problem"].ne("").sum() == 3


def test_the_job_answers_and_goes_on(bundle, images, tmp_path, monkeypatch, capsys):
    folder = bundle.save(tmp_path / "model")
    flags = ["--model", folder, "--data.manifest", images / "manifest.csv", "--to", tmp_path / "out" / "found.csv"]
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, flags)])
    said = []
    for _ in range(2):
        runpy.run_path(str(REPO / "jobs" / "predict.py"), run_name="__main__")
        said.append(capsys.readouterr().out)
    assert "12 cases\n" in said[0] and "12 cases, 12 of them there already" in said[1]
    rows = read_rows(tmp_path / "out" / "found.csv")
    loaded, origin = load_origin(str(folder), None, None)
    assert set(rows["bundle"]) == {origin.bundle} == {hashlib.sha256((folder / "bundle.json").read_bytes()).hexdigest()}
    assert bundle_hash(loaded) == bundle_hash(bundle) and set(rows["preprocessing"]) == {origin.preprocessing}
    assert "size=16 fit=letterbox" in origin.preprocessing
    with (tmp_path / "out" / "found.csv").open("rb") as file:
        assert next(csv.reader([file.readline().decode("utf-8-sig")])) == list(CASE_COLUMNS)
    monkeypatch.setattr(sys, "argv", ["predict", "--model", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(REPO / "jobs" / "predict.py"), run_name="__main__")
    assert "--images DIR or --data.manifest FILE" in capsys.readouterr().err
