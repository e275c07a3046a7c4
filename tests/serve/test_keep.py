"""Nothing is kept but where it was asked for: pixels without names, answers, and only for so many days."""

import io
import json
import os
import resource
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image, PngImagePlugin
from waiting import until

from raymed.config import UserError
from raymed.serve.app import create_app
from raymed.serve.keep import Keeper

NAME = "MUSTER^ANNA"
PREDICT = "/v1/models/hsg:predict"


@pytest.fixture
def named_png(images) -> bytes:
    """An image whose header names somebody."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("Title", NAME)
    Image.fromarray(images[0]).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def large_png() -> bytes:
    """More than a form holds in memory."""
    file, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (1500, 1500), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def everything(*folders: Path) -> set[Path]:
    """All files below some folders."""
    return {Path(root, name) for folder in folders for root, _, names in os.walk(folder) for name in names}


def test_without_being_told_to_nothing_is_kept(app_config, named_png, tmp_path, monkeypatch):
    home, temporary, here = tmp_path / "home", tmp_path / "tmp", tmp_path / "here"
    for folder in (home, temporary, here):
        folder.mkdir()
    monkeypatch.setenv("RAYMED_HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(here)
    with TestClient(create_app(app_config())) as client:
        before = everything(tmp_path)
        found = [
            client.post(PREDICT, content=named_png, headers={"X-Patient": NAME}),
            client.post(PREDICT, files=[("file", (f"{NAME}.png", large_png())), ("file", ("b.png", named_png))]),
            client.post(PREDICT, content=b"no image"),
        ]
        assert [answer.status_code for answer in found] == [200, 200, 415]
        assert everything(tmp_path) == before


def test_kept_are_pixels_and_answer(app_config, named_png, images, tmp_path):
    folder = tmp_path / "kept"
    with TestClient(create_app(app_config(keep=str(folder)))) as client:
        sent = {"files": [("file", (f"{NAME}.png", named_png)), ("file", (f"{NAME}2.png", named_png))]}
        answer = client.post(PREDICT, **sent, headers={"X-Patient": NAME})
        client.post(PREDICT, content=b"no image")
    (kept,) = folder.iterdir()
    time_of, _, number = kept.name.partition("Z-")
    assert number == answer.headers["X-Request-Id"]
    made = datetime.strptime(time_of, "%Y%m%dT%H%M%S.%f").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - made) < timedelta(minutes=1)
    assert sorted(path.name for path in kept.iterdir()) == ["0.png", "1.png", "answer.json"]
    for name in ("0.png", "1.png"):
        with Image.open(kept / name) as image:
            assert image.info.get("Title") is None
            np.testing.assert_array_equal(np.asarray(image), images[0])
    assert json.loads((kept / "answer.json").read_text()) == answer.json()
    assert not any(NAME.encode() in path.read_bytes() or NAME in str(path) for path in everything(folder))
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["grey 8", "grey 16", "colour 8", "colour 16"])
def test_pixels_come_back_as_they_were(tmp_path, kind):
    colours, bits = kind.split()
    shape = (5, 7, 3) if colours == "colour" else (5, 7)
    most = 2 ** int(bits)
    pixels = np.random.default_rng(0).integers(0, most, shape).astype(f"uint{bits}")
    kept = Keeper(tmp_path, 1).keep("abc", [pixels], "{}")
    (file,) = [path for path in kept.iterdir() if path.stem == "0"]
    back = np.load(file)["pixels"] if file.suffix == ".npz" else np.asarray(Image.open(file))
    np.testing.assert_array_equal(back, pixels)


def test_what_is_older_than_the_days_is_deleted_and_nothing_else(tmp_path):
    keeper = Keeper(tmp_path, days=30)
    kept = keeper.keep("abc", [], "{}")
    others = [tmp_path / "20200101T000000.000000Z-", tmp_path / "mine", tmp_path / "2020.txt"]
    for other in others:
        other.mkdir()
    half = tmp_path / ".20200101T000000.000000Z-def.tmp"
    half.mkdir()
    (half / "0.png").write_text("")
    now = datetime.now(UTC)
    assert keeper.forget(now + timedelta(days=29, hours=23)) == 1 and not half.exists()
    assert kept.exists() and all(other.exists() for other in others)
    assert keeper.forget(now + timedelta(days=30, hours=1)) == 1
    assert not kept.exists() and all(other.exists() for other in others)


def test_a_server_deletes_what_is_old_when_it_starts(app_config, tmp_path):
    old = tmp_path / "20200101T000000.000000Z-abc"
    old.mkdir()
    with TestClient(create_app(app_config(keep=str(tmp_path), days=1))):
        until(lambda: not old.exists())


def test_what_could_not_be_deleted_is_deleted_later(app_config, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("raymed.serve.service._FORGET_S", 0.02)
    folder, said = tmp_path / "kept", []
    with TestClient(create_app(app_config(keep=str(folder)))):
        folder.rmdir()
        folder.write_text("no folder")
        until(lambda: said.append(capfd.readouterr().err) or '"Not a directory"' in "".join(said))
        folder.unlink()
        old = folder / "20200101T000000.000000Z-abc"
        old.mkdir(parents=True)
        until(lambda: not old.exists())
    told = [json.loads(line) for line in "".join(said).splitlines() if '"Not a directory"' in line]
    assert told[0]["event"] == "not forgotten"


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_half(tmp_path):
    keeper = Keeper(tmp_path, 1)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError):
            keeper.keep("abc", [noise[:8, :8], noise], "{}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    kept = keeper.keep("abc", [noise[:8, :8], noise], "{}")
    assert sorted(path.name for path in kept.iterdir()) == ["0.png", "1.png", "answer.json"]


def test_a_disk_that_takes_nothing_stops_no_answer(app_config, named_png, tmp_path, capfd):
    folder = tmp_path / "kept"
    with TestClient(create_app(app_config(keep=str(folder)))) as client:
        folder.rmdir()
        folder.write_text("no folder")
        answer = client.post(PREDICT, content=named_png)
        assert answer.status_code == 200
        assert "raymed_not_kept_total 1.0" in client.get("/metrics").text
        folder.unlink()
        folder.mkdir()
        again = client.post(PREDICT, content=named_png)
        (kept,) = folder.iterdir()
        assert again.status_code == 200 and kept.name.endswith(again.headers["X-Request-Id"]), "it goes on"
        assert "raymed_not_kept_total 1.0" in client.get("/metrics").text
    told = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"not kept"' in line]
    assert [line["id"] for line in told] == [answer.headers["X-Request-Id"]]


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--keep"):
        Keeper(tmp_path / "file" / "below", 1)
    with pytest.raises(UserError, match="--keep"):
        Keeper(tmp_path / "file", 1)
    with pytest.raises(UserError, match="a folder of this machine"):
        Keeper("s3://bucket/kept", 1)
