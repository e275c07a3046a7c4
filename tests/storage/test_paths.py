import os
from pathlib import Path

import pytest

from raymed.config import UserError
from raymed.storage import resolve_storage, storage_folder, write_atomic


def test_home_is_the_variable_or_a_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYMED_HOME", "relative")
    assert storage_folder() == tmp_path / "relative"
    monkeypatch.delenv("RAYMED_HOME")
    assert storage_folder() == Path.home() / ".raymed"


def test_storage_is_absolute_and_created(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve_storage("a/b") == tmp_path / "a/b"
    assert (tmp_path / "a/b").is_dir() and not list((tmp_path / "a/b").iterdir())
    assert resolve_storage(None) == storage_folder()


@pytest.mark.parametrize("path", ["file/inside", "file"])
def test_storage_that_cannot_be_written(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"{tmp_path / path} .*--storage"):
        resolve_storage(str(tmp_path / path))


def test_storage_in_another_kind_of_bucket_is_refused_not_made_a_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="s3://BUCKET/PREFIX, got gs://bucket/x"):
        resolve_storage("gs://bucket/x")
    assert not list(tmp_path.iterdir())


def test_write_atomic_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "summary.json"
    write_atomic(path, "größe")
    assert path.read_bytes() == "größe".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_write_atomic_keeps_the_old_content_when_the_new_cannot_be_written(tmp_path):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]
