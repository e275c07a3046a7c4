"""Backups of a storage, a folder or a bucket, in which jobs remove files after it was listed."""

from pathlib import Path

import pytest

from raymed.cluster import backup
from raymed.cluster.backup import Place, save
from raymed.config import UserError
from raymed.storage import is_remote, join, remote_of, resolve_storage, write_bytes
from raymed.storage.s3 import delete


@pytest.fixture(params=["folder", "bucket"])
def storage(request, tmp_path, monkeypatch):
    """A storage with checkpoints of two runs."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = resolve_storage(request.getfixturevalue("s3").url if request.param == "bucket" else str(tmp_path / "home"))
    url = remote_of(place) or str(place)
    for name in ("runs/a/checkpoints/index.json", "runs/a/checkpoints/1/state.json", "runs/a/checkpoints/1/net"):
        write_bytes(join(url, name), b"1")
    for name in ("runs/b/checkpoints/index.json", "runs/b/checkpoints/1/net", "runs/b/bundle/bundle.json"):
        write_bytes(join(url, name), b"b")
    return url


def remove(location: str) -> None:
    delete([location]) if is_remote(location) else Path(location).unlink()


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_that_rotates_meanwhile_is_saved_as_the_next_one(storage, meanwhile, tmp_path):
    """The index that is saved names what is saved."""

    def rotate():
        for name in ("2/state.json", "2/net", "index.json"):
            write_bytes(join(storage, "runs/a/checkpoints", name), b"2")
        remove(join(storage, "runs/a/checkpoints/1/net"))  # and state.json soon

    meanwhile(storage, rotate)
    save(tmp_path / "backup", Place(storage), checkpoints=True)
    found = files(tmp_path / "backup/storage")
    ours = {name: data for name, data in found.items() if name.startswith("runs/a/")}
    new = {f"runs/a/checkpoints/{name}": b"2" for name in ("index.json", "2/net", "2/state.json")}
    assert ours == new | {"runs/a/checkpoints/1/state.json": b"1"}
    assert len(found) == len(ours) + 3, "of the other run all"


def test_what_goes_meanwhile_is_left_out(storage, meanwhile, tmp_path):
    meanwhile(storage, lambda: remove(join(storage, "runs/b/bundle/bundle.json")))
    write_bytes(join(storage, "registry/audit.jsonl"), b"{}")
    save(tmp_path / "backup", Place(storage))
    assert files(tmp_path / "backup/storage") == {"registry/audit.jsonl": b"{}"}


def test_what_is_there_and_cannot_be_copied_is_an_error(storage, monkeypatch, tmp_path):
    """Nothing has gone: it is not tried again."""

    def refuse(files, into):
        raise UserError("no permission")

    monkeypatch.setattr(backup, "_copy", refuse)
    with pytest.raises(UserError, match="no permission"):
        save(tmp_path / "backup", Place(storage))
    assert not (tmp_path / "backup").exists()
