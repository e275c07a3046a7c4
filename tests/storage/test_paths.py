import errno
import os
import stat
from pathlib import Path

import pytest

from raymed.config import UserError
from raymed.storage import resolve_storage, storage_folder, write_atomic, write_private


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


@pytest.fixture(params=[0o000, 0o022, 0o077])
def mask(request):
    """Of this process."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_file_is_its_owners_alone_whatever_the_mask_and_what_was_there(tmp_path, mask):
    path = tmp_path / "own" / "token"
    write_private(path, "größe")
    assert path.read_bytes() == "größe".encode() and mode(path) == 0o600 and mode(path.parent) == 0o700
    path.chmod(0o644)
    write_private(path, b"new")
    assert path.read_text() == "new" and mode(path) == 0o600 and os.listdir(path.parent) == ["token"]
    write_atomic(path, "for all")
    assert mode(path) == 0o666 & ~mask


def test_of_a_private_file_that_the_disk_does_not_take_nothing_is_left(tmp_path, monkeypatch):
    path, seen = tmp_path / "token", []
    write_private(path, "old")

    def full(descriptor):
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"the disk of {path} is full"):
        write_private(path, "secret")
    assert seen == [0o600], "also while it is written"
    assert os.listdir(tmp_path) == ["token"] and path.read_text() == "old"
