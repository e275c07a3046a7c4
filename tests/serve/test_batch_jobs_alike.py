"""A job and a request answer a case alike, and what a request is refused for is a problem of a job's image."""

from dataclasses import replace

import hostile
import numpy as np
import pytest
from batch_example import JOBS, ended, started
from predict_example import read_rows

from raymed.data.readers import ImageFile, ImageProblem
from raymed.registry.promote import promote, release
from raymed.registry.store import version_of
from raymed.results.predict import load_origin
from raymed.results.predict_cases import Case, CaseImage
from raymed.serve.config import Access, Hardware, Limits, ServeConfig
from raymed.serve.jobs import files
from raymed.serve.problems import Problem, busy
from raymed.serve.uploads import dicom
from raymed.tasks.predictor import Predictor
from raymed.tracking import connect

LIMITS = Limits(pixels=20_000, body_bytes=200_000, timeout_s=60)
STRIPES = np.tile(np.array([[255], [0]], np.uint8), (8, 16))


@pytest.fixture
def contents(bundle, images):
    """What each file holds, by its name."""
    predictor = Predictor.from_bundle(bundle)
    of_kind: dict[str, np.ndarray] = {}
    for pixels in images:
        found = predictor([pixels])[0]
        told, _ = predictor.answer(predictor.case([found]))
        of_kind.setdefault("uncertain" if told == "abstain" and not found.ood["foreign"] else told, pixels)
    plain = of_kind["positive"]
    small = {"Modality": "XA", "BodyPartExamined": "UTERUS", "WindowCenter": 128, "WindowWidth": 256}
    return {f"{name}.png": hostile.picture(pixels, "PNG") for name, pixels in of_kind.items() if name != "abstain"} | {
        "foreign.png": hostile.picture(STRIPES, "PNG"),
        "plain.dcm": hostile.dicom(plain, **small),
        "ct.dcm": hostile.dicom(plain, **small | {"Modality": "CT"}),
        "chest.dcm": hostile.dicom(plain, **small | {"BodyPartExamined": "CHEST"}),
        "kind.tif": hostile.picture(plain, "TIFF"),
        "kind.gif": hostile.picture(plain, "GIF"),
        "large.png": hostile.picture(np.tile(plain, (12, 12)), "PNG"),
        "flat.png": hostile.picture(np.full((16, 16), 9, np.uint8), "PNG"),
        "cut.png": hostile.picture(plain, "PNG")[:60],
        "deflated.dcm": hostile.hostile("deflated.dcm"),
        "frames.dcm": hostile.hostile("frames.dcm"),
        "size.dcm": hostile.hostile("size.dcm"),
        "report.dcm": hostile.hostile("report.dcm"),
        "jpeg.dcm": hostile.encapsulated("SC_rgb_jpeg_gdcm", **small),
        "lie.dcm": hostile.hostile("size.jpeg.dcm"),
    }


@pytest.fixture
def config(bundle, contents, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for name, content in contents.items():
        (root / name).write_bytes(content)
    (root / "set.csv").write_text("".join(f"{line}\n" for line in ("image", *contents)))
    return ServeConfig(
        models=(f"hsg={bundle.save(tmp_path / 'model')}",),
        access=Access(open=True, hosts=("testserver",)),
        hardware=Hardware(device="cpu", threads=1, max_batch=1),
        limits=LIMITS,
        batch_roots=(str(root),),
        storage=str(tmp_path / "home"),
    )


def tables(client, source="set.csv"):
    """(rows of cases, rows of images), by the image's name, of a job that has succeeded."""
    job = ended(client, client.post(JOBS, json={"model": "hsg", "source": source}).json()["id"])
    assert job["state"] == "succeeded", job["problem"]
    folder = client.jobs.folder / job["id"]
    names = ("predictions.csv", "predictions_images.csv")
    return tuple(read_rows(folder / name).set_index("image").to_dict("index") for name in names)


def test_a_job_and_a_request_answer_alike(config, contents, monkeypatch):
    apart = []
    real = dicom.decompressed
    monkeypatch.setattr(dicom, "decompressed", lambda *about: apart.append(about) or real(*about))
    told: dict[str, str] = {}
    with started(config) as client:
        cases, shown = tables(client)
        assert len(apart) == 1, "compressed pixels are decoded in a process of their own"
        for name, content in contents.items():
            answer, row = client.post("/v1/models/hsg:predict", files=[("file", content)]), cases[name]
            body = answer.json()
            if answer.status_code == 200:
                told[name] = row["answer"]
                assert (row["answer"], row["decision"]) == (body["decision"], body["result"]["label"]), name
                assert float(row["score"]) == pytest.approx(body["result"]["probability"], abs=2e-6)
                assert not shown[name]["problem"] and (not row["reasons"] or row["answer"] == "abstain")
                for column in ("run_id", "intended_use"):
                    assert row[column] == body[column] != ""
                assert row["research_only"] == "yes" and body["research_only"] is True
                continue
            why = body["detail"].removeprefix("files[0]").lstrip(".: ")
            assert answer.status_code in (413, 415, 422), name
            assert (row["answer"], row["decision"], row["score"]) == ("", "", ""), name
            assert shown[name]["problem"] == why and why in row["reasons"], name
        assert client.get("/readyz").status_code == 200
    answered = {"uncertain.png": "abstain", "foreign.png": "abstain", "plain.dcm": "positive"}
    answered |= {"positive.png": "positive", "negative.png": "negative", "jpeg.dcm": "abstain"}
    assert told == answered
    problems = {name: row["problem"] for name, row in shown.items()}
    assert problems["ct.dcm"] == "modality: XA is expected" and "20000 pixels" in problems["large.png"]


def test_a_released_version_is_marked_so_in_both_tables(registry_home, tmp_path, images):
    """That of a server, and that of the job `predict`."""
    root, client = tmp_path / "released", connect(None, registry_home)
    root.mkdir()
    (root / "one.png").write_bytes(hostile.picture(images[0], "PNG"))
    (root / "set.csv").write_text("image\none.png\n")
    promote(client, version_of(client, "hsg", 1), "triage of HSG")
    for is_released in (False, True):
        if is_released:
            release(client, version_of(client, "hsg", 1), by="the board", why="study 12")
        config = ServeConfig(
            models=("hsg=models:/hsg@champion",), access=Access(open=True, hosts=("testserver",)),
            hardware=Hardware(device="cpu", threads=1, max_batch=1), batch_roots=(str(root),),
            storage=str(registry_home),
        )  # fmt: skip
        with started(config) as http:
            row = tables(http)[0]["one.png"]
        _, origin = load_origin("models:/hsg@champion", None, str(registry_home))
        assert {name: row[name] for name in origin.row()} == origin.row()
        assert (row["intended_use"], row["research_only"]) == ("triage of HSG", "no" if is_released else "yes")


def test_frames_are_those_that_a_manifest_names(config, images, tmp_path):
    root = tmp_path / "root"
    run = hostile.dicom(np.stack([images[0], images[3][:16, :16]]), BodyPartExamined="UTERUS", NumberOfFrames=2)
    (root / "run.dcm").write_bytes(run)
    (root / "still.png").write_bytes(hostile.picture(images[0], "PNG"))
    (root / "frames.csv").write_text("image,frame\nrun.dcm,2\nrun.dcm,3\nrun.dcm,\nstill.png,1\nstill.png,2\n")
    with started(config) as client:
        cases, shown = tables(client, "frames.csv")
        asked = client.post("/v1/models/hsg:predict", files=[("file", run)], data={"frames": 2}).json()
    assert cases["run.dcm frame 2"]["answer"] == asked["decision"]
    assert float(cases["run.dcm frame 2"]["score"]) == pytest.approx(asked["result"]["probability"], abs=2e-6)
    assert shown["run.dcm frame 3"]["problem"] == "has no frame 3"
    assert shown["run.dcm"]["problem"].startswith("holds several frames: name one")
    assert cases["still.png frame 1"]["answer"] and shown["still.png frame 2"]["problem"] == "has no frame 2"


@pytest.fixture
def image(bundle, images, tmp_path):
    """image(limits, **of the file) -> a case of two such images, as a job reads them."""
    path = tmp_path / "one.png"
    path.write_bytes(hostile.picture(images[0], "PNG"))

    def make(limits=LIMITS, **changes):
        source = ImageFile(path, **changes)
        case = Case("C", "", "", "P", (CaseImage("one", source), CaseImage("other", source)))
        return files.as_uploads(case, bundle, limits).images

    return make


def test_pixels_are_those_of_the_file(image, images, tmp_path):
    assert np.array_equal(image()[0].read(None), images[0])
    blank = image(blank=((0.0, 0.0, 4.0, 4.0),))[0]
    assert blank.read(None)[:4, :4].max() == 0
    assert blank.source.identity() == (str(tmp_path / "one.png"), None, "0 0 4 4")


@pytest.mark.parametrize(
    ("limits", "message"),
    [(replace(LIMITS, held_pixels=400), "may have 400 pixels"), (replace(LIMITS, body_bytes=60), "at most 60 bytes")],
)
def test_a_case_is_no_larger_than_that_of_a_request(image, limits, message):
    with pytest.raises(ImageProblem, match=message):
        [each.read(None) for each in image(limits)]


def test_an_image_without_room_now_is_not_left_out(image, monkeypatch):
    """The case would be decided without it."""

    def full(*_):
        raise busy("there is no memory left for this image")

    monkeypatch.setattr(files, "decode", full)
    with pytest.raises(Problem, match="no memory left"):
        image()[0].read(None)


def test_what_is_no_file_is_told(image, tmp_path):
    (one, _), path = image(), tmp_path / "one.png"
    changes = {"is empty": lambda: path.write_bytes(b""), "no such file": path.unlink, "is a folder": path.mkdir}
    for why, change in changes.items():
        change()
        with pytest.raises(ImageProblem, match=why):
            one.read(None)
