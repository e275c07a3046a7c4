"""This machine: libraries, memory, storage and disks, each with its fault."""

import errno
import os
import re
from pathlib import Path

import pytest

from raymed.config import UserError
from raymed.doctor.checks import memory, storage, versions
from raymed.doctor.place import Place

TMPFS = "mount -t tmpfs -o size={size} none {place}"
NO_GPU = not list(Path("/dev").glob("nvidia[0-9]*"))


def test_a_machine_that_is_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_HOME", str(tmp_path / "storage"))
    for look in (memory.this_machine, storage.tried):
        assert look(Place()).level == "ok"
    assert "GiB at" in storage.space(Place()).found
    assert [path for path in (tmp_path / "storage").iterdir()] == [], "nothing stays"


def test_libraries_that_are_broken_or_others_than_needed(tmp_path, doctor, monkeypatch):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed/__init__.py").write_text("raise OSError('libcudart.so is not there')")
    (tmp_path / "tyro-0.9.dist-info").mkdir()
    (tmp_path / "tyro-0.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: tyro\nVersion: 0.9\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    code, found = doctor("--only", "versions", PYTHONPATH=path)
    assert code == 1 and found["versions"]["level"] == "failure"
    assert "import deepspeed fails (OSError: libcudart.so is not there)" in found["versions"]["found"]
    if versions.importlib.metadata.requires("raymed"):
        assert "tyro 0.9 is installed and raymed needs <2,>=1.0" in found["versions"]["found"]
    assert "pip install" in found["versions"]["remedy"]


def test_little_shared_memory(doctor):
    """As in a container that was started without --shm-size."""
    code, found = doctor("--only", "shared memory", mount=TMPFS.format(size="64m", place="/dev/shm"))
    assert code == 1 and "/dev/shm does not give 200 MiB (No space left on device)" in found["shared memory"]["found"]
    assert "--shm-size" in found["shared memory"]["remedy"]


@pytest.mark.skipif(not NO_GPU, reason="has a GPU")
def test_a_gpu_that_torch_does_not_see(doctor):
    """A device file is there, and no driver behind it."""
    mount = "mount -t tmpfs none /dev; mknod /dev/null c 1 3; mknod /dev/urandom c 1 9; touch /dev/nvidia0"
    code, found = doctor("--only", "GPUs", mount=mount)
    assert code == 1 and "nvidia0 is there, and torch" in found["GPUs"]["found"]
    assert "nvidia-smi" in found["GPUs"]["remedy"]


@pytest.mark.parametrize(
    ("options", "said"),
    [("size=512k", "the disk of .* is full"), ("ro", "cannot write to .* \\(Read-only file system\\)")],
)
def test_a_storage_that_takes_nothing(options, said, tmp_path, doctor):
    mount = f"mount -t tmpfs -o {options} none {tmp_path}"
    code, found = doctor("--only", "storage", "--storage", str(tmp_path), mount=mount)
    assert code == 1 and re.search(said, found["storage"]["found"]), found
    assert found["storage"]["remedy"]


@pytest.mark.parametrize(("size", "level"), [("100m", "failure"), ("5g", "warning")])
def test_little_disk(size, level, tmp_path, doctor):
    mount = TMPFS.format(size=size, place=tmp_path)
    code, found = doctor("--only", "disk space", "--storage", str(tmp_path), mount=mount)
    assert found["disk space"]["level"] == level and code == (level == "failure")
    assert str(tmp_path) in found["disk space"]["found"] and "make room" in found["disk space"]["remedy"]


def test_a_storage_that_gives_back_something_else(tmp_path, monkeypatch):
    """A write that is lost without a word, as by a share that caches."""
    monkeypatch.setattr(storage, "write_atomic", lambda path, data: path.write_bytes(b"old"))
    with pytest.raises(UserError, match="gives back other bytes than were written"):
        storage.try_storage(str(tmp_path))
    assert [path for path in tmp_path.iterdir()] == []


def test_a_storage_that_lets_no_folder_be_renamed(tmp_path, monkeypatch):
    """As gcsfuse without a limit: a training would fail at its first checkpoint."""
    rename = os.replace

    def refuse(old: Path, new: Path) -> None:
        if os.path.isdir(old):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        rename(old, new)

    monkeypatch.setattr(os, "replace", refuse)
    said = "lets no folder be renamed \\(Too many open files\\).* mount a bucket with gcsfuse --rename-dir-limit 1000"
    with pytest.raises(UserError, match=said):
        storage.try_storage(str(tmp_path))
    assert [path for path in tmp_path.iterdir()] == []
