"""Jobs over a folder: answers are those of requests, and pseudonyms those of one key, whichever server goes on."""

import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import replace

import hostile
import numpy as np
import pytest
from batch_example import JOBS, ask, case_bundle, config, ended, held, root, started, store_of
from PIL import Image, ImageDraw
from predict_example import read_rows
from waiting import until

from raymed.data.intake.pseudonyms import default_key_file, open_vault
from raymed.data.intake.text_regions import text_boxes
from raymed.serve.config import Limits
from raymed.serve.live import Origin

__all__ = ["case_bundle", "config", "held", "root"]


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """at_home(name): the user of the next server is another one; returns where his key is."""
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)

    def move(name):
        monkeypatch.setenv("HOME", str(tmp_path / name))
        return default_key_file()

    move("first")
    return move


def with_text() -> np.ndarray:
    """An image with a name burned into a corner."""
    ramp = np.add.outer(np.arange(160), np.arange(200)) * 90 // 360
    image = Image.fromarray(ramp.astype(np.uint8))
    ImageDraw.Draw(image).text((6, 6), "HONG GILDONG 19700101", fill=255)
    pixels = np.asarray(image)
    assert text_boxes(pixels), "an import would paint it black"
    return pixels


def a_run(num: int) -> np.ndarray:
    """Frames of which each has another score."""
    random = np.random.default_rng(2)
    return np.stack([random.integers(0, high, (16, 16), dtype=np.uint8) for high in np.linspace(40, 255, num)])


@pytest.fixture
def folder(tmp_path, config):
    """(the folder of a job, config of a server that takes it)."""
    place = tmp_path / "mixed"
    place.mkdir()
    return place, replace(config, batch_roots=(str(place),))


def rows_of(client, source):
    """Of the cases of a job that has succeeded."""
    job = ended(client, ask(client, str(source)).json()["id"])
    assert job["state"] == "succeeded", job["problem"]
    return read_rows(client.jobs.folder / job["id"] / "predictions.csv").to_dict("records")


def test_a_folder_and_requests_for_its_files_answer_alike(folder, at_home):
    place, config = folder
    contents = {"run.dcm": hostile.dicom(a_run(5)), "text.png": hostile.picture(with_text(), "PNG")}
    for name, content in contents.items():
        (place / name).write_bytes(content)
    with started(config) as client:
        found = rows_of(client, place)
        told = [client.post("/v1/models/hsg:predict", files=[("file", c)]).json() for c in contents.values()]
    assert [row["num_images"] for row in found] == ["5", "1"]
    for row, answer in zip(found, told, strict=True):
        assert float(row["score"]) == pytest.approx(answer["result"]["probability"], abs=2e-6)
        assert row["answer"] == answer["decision"]


def test_a_file_of_more_frames_than_a_request_may_have_is_one_that_cannot_be_used(folder, at_home):
    """Also where its header names frames that are not there."""
    place, config = folder
    (place / "lie.dcm").write_bytes(hostile.dicom(a_run(2), NumberOfFrames=2**31 - 1))
    (place / "long.dcm").write_bytes(content := hostile.dicom(a_run(5)))
    with started(replace(config, limits=Limits(frames=4))) as client:
        lie, long = rows_of(client, place)
        assert client.post("/v1/models/hsg:predict", files=[("file", content)]).status_code == 413
    for row in (lie, long):
        assert (row["num_images"], row["answer"]) == ("0", "")
    assert "of a folder's file up to 4 are taken" in long["reasons"]


def test_a_server_with_another_key_leaves_a_job_to_those_who_have_its_key(config, root, held, at_home):
    reached, go = held
    source = str(root / "set")
    key_file = at_home("first")
    with started(config) as client:
        number = ask(client, source).json()["id"]
        assert reached.wait(20)
        client.jobs._ending.set()
        go.set()
        until(lambda: not client.jobs._thread.is_alive())
        table = client.jobs.folder / number / "predictions.csv"
    written = table.read_bytes()
    at_home("without a key")
    with started(config) as client:
        assert client.jobs._next() == []
        (row,) = client.jobs.rows.unfinished()
        assert client.jobs._work_off(row.job) and table.read_bytes() == written, "begun since it was looked for"
    at_home("other")
    with started(config) as client:
        assert ended(client, ask(client, source).json()["id"])["state"] == "succeeded", "its own job"
        assert client.get(f"{JOBS}/{number}").json()["state"] == "running" and table.read_bytes() == written
    copied = at_home("copy")
    shutil.copytree(key_file.parent, copied.parent)
    with started(config) as client:
        assert ended(client, number)["state"] == "succeeded"
    rows = read_rows(table)
    assert table.read_bytes().startswith(written) and rows["case"].is_unique and len(rows) > 3
    known = [open_vault(key).whois(case) for key in (key_file, copied) for case in rows["case"]]
    assert known[: len(rows)] == known[len(rows) :] and all(known)


def test_a_job_whose_key_is_gone_fails_after_a_day(config, root, at_home):
    store = store_of(config)
    number = store.add("", "predict", "hsg", str(root / "set"), 9).id
    assert store.claim(number)
    store.begin(number, Origin(config.models[0], "", "a" * 64), 12, "0" * 16)
    with closing(sqlite3.connect(store.path)) as rows, rows:
        rows.execute("UPDATE jobs SET seen = ?", (time.time() - 86401,))
    with started(config) as client:
        assert client.get(f"{JOBS}/{number}").json()["state"] == "running", "its server may be about to start"
        client.jobs._since -= 86401
        assert ended(client, number)["problem"].endswith("and the key of its pseudonyms")
