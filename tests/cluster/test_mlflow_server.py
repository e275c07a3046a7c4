"""MLflow whose database goes with no machine: real servers, one after the other, on one storage."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing

import httpx
import pytest
from nodes import free_port, wait_for

from raymed.cluster import mlflow_server
from raymed.cluster.mlflow_server import DATABASE, keep, take_back
from raymed.config import UserError
from raymed.storage import write_bytes

USER, PASSWORD = "raymed", "only-in-this-test-123"


@pytest.fixture
def storage(tmp_path) -> str:
    return str(tmp_path / "storage")


def machine(tmp_path, name: str):
    """Its folder, where nothing is yet."""
    folder = tmp_path / name
    folder.mkdir()
    return folder


def insert(folder, *names: str) -> None:
    with closing(sqlite3.connect(folder / DATABASE)) as database:
        database.execute("create table if not exists runs (name text)")
        database.executemany("insert into runs values (?)", [(name,) for name in names])
        database.commit()


def runs(database) -> list[str]:
    with closing(sqlite3.connect(database)) as opened:
        return [name for (name,) in opened.execute("select name from runs")]


def restore(folder, storage: str) -> None:
    """As a backup's restore puts a database there."""
    write_bytes(f"{storage}/mlflow/{DATABASE}", (folder / DATABASE).read_bytes())


def test_a_database_that_is_written_to_is_kept_whole_and_taken_back(tmp_path, storage):
    first, second = machine(tmp_path, "first"), machine(tmp_path, "second")
    assert not take_back(first, storage)
    with closing(sqlite3.connect(first / DATABASE)) as database:
        database.execute("pragma journal_mode=wal")
        database.execute("create table runs (name text)")
        database.execute("insert into runs values ('first')")
        database.commit()
        database.execute("insert into runs values ('half')")  # a transaction that is open meanwhile
        keep(first, storage)
    assert take_back(second, storage)
    assert runs(second / DATABASE) == ["first"]


def test_what_was_not_brought_before_a_crash_is_newer_than_the_kept_one(tmp_path, storage):
    first, second = machine(tmp_path, "first"), machine(tmp_path, "second")
    insert(first, "brought")
    keep(first, storage)
    insert(first, "not brought")
    assert not take_back(first, storage)
    assert runs(first / DATABASE) == ["brought", "not brought"]
    assert take_back(second, storage)
    insert(second, "elsewhere")
    assert not take_back(second, storage), "what was taken back is its own too"
    assert runs(second / DATABASE) == ["brought", "elsewhere"]


def test_a_restored_database_replaces_the_one_of_before(tmp_path, storage):
    """Down, which leaves the folder; a backup restored; up."""
    head, backup = machine(tmp_path, "head"), machine(tmp_path, "backup")
    insert(backup, "of the backup")
    insert(head, "of before")
    keep(head, storage)
    restore(backup, storage)
    assert take_back(head, storage)
    assert runs(head / DATABASE) == ["of the backup"]
    keep(head, storage)
    assert runs(f"{storage}/mlflow/{DATABASE}") == ["of the backup"]
    right = machine(tmp_path, "right")
    insert(right, "of the right backup")
    restore(right, storage)
    assert take_back(head, storage), "the first backup was the wrong one"
    assert runs(head / DATABASE) == ["of the right backup"]
    replaced = sorted(runs(folder / DATABASE) for folder in (head / "replaced").iterdir())
    assert replaced == [["of before"], ["of the backup"]], "nothing of what stood there is lost"


@pytest.mark.parametrize("has_kept", [False, True])
def test_a_database_restored_beside_a_server_is_not_overwritten(tmp_path, storage, has_kept):
    """It is the next start's, and the server's own is put aside then."""
    head, backup = machine(tmp_path, "head"), machine(tmp_path, "backup")
    insert(backup, "of the backup")
    insert(head, "of the server")
    if has_kept:
        keep(head, storage)
    restore(backup, storage)
    for _ in range(2):
        with pytest.raises(UserError, match="mlflow.db is not what this server took or brought there.*down and up"):
            keep(head, storage)
    assert runs(f"{storage}/mlflow/{DATABASE}") == ["of the backup"]
    assert take_back(head, storage) and runs(head / DATABASE) == ["of the backup"]
    [replaced] = (head / "replaced").iterdir()
    assert runs(replaced / DATABASE) == ["of the server"]


@pytest.mark.parametrize("arrives", [False, True])
def test_a_copy_of_which_nobody_knows_whether_it_arrived_is_its_own(tmp_path, storage, arrives, monkeypatch):
    """A bucket that did not answer."""
    head = machine(tmp_path, "head")
    insert(head, "first")
    keep(head, storage)

    def lost(place: str, data: bytes) -> None:
        if arrives:
            write_bytes(place, data)
        raise OSError("no answer")

    insert(head, "second")
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_server, "write_bytes", lost)
        for _ in range(2):
            with pytest.raises(OSError, match="no answer"):
                keep(head, storage)
    assert not take_back(head, storage), "its own is newer, or the same"
    keep(head, storage)
    assert runs(f"{storage}/mlflow/{DATABASE}") == ["first", "second"]


def test_a_head_that_was_head_before_goes_on_from_the_one_in_between(tmp_path, storage):
    a, b = machine(tmp_path, "a"), machine(tmp_path, "b")
    insert(a, "a")
    keep(a, storage)
    assert take_back(b, storage)
    insert(b, "b")
    keep(b, storage)
    assert take_back(a, storage)
    assert runs(a / DATABASE) == ["a", "b"]


def test_a_journal_of_before_is_not_applied_to_what_replaces_it(tmp_path, storage):
    """A head that lost its power in a transaction: sqlite would write the old pages over the new database."""
    head, other = machine(tmp_path, "head"), machine(tmp_path, "other")
    insert(head, *map(str, range(1000)))
    with closing(sqlite3.connect(head / DATABASE)) as database:
        database.execute("pragma cache_spill=1")
        database.execute("update runs set name = 'x'")
        hot = {path.name: path.read_bytes() for path in head.glob(f"{DATABASE}*")}
    assert set(hot) == {DATABASE, f"{DATABASE}-journal"}
    for name, data in hot.items():
        (head / name).write_bytes(data)
    insert(other, "other")
    keep(other, storage)
    assert take_back(head, storage)
    assert runs(head / DATABASE) == ["other"]
    assert sorted(path.name for path in head.glob("mlflow*")) == [DATABASE]


@pytest.mark.parametrize("size", [0, 2000])
def test_a_part_of_a_database_is_replaced(tmp_path, storage, size):
    """As a crash left it while it was written in place."""
    head = machine(tmp_path, "head")
    insert(head, "whole")
    keep(head, storage)
    (head / "kept.sha256").unlink()
    (head / DATABASE).write_bytes((head / DATABASE).read_bytes()[:size])
    assert take_back(head, storage)
    assert runs(head / DATABASE) == ["whole"]


@pytest.mark.slow
def test_what_is_tracked_outlives_the_machine(tmp_path):
    pytest.importorskip("flask_wtf", reason="MLflow's passwords need it: pip install 'mlflow[auth]'")
    storage, name = tmp_path / "storage", "outlives"
    first = _Server(tmp_path / "first", storage)
    try:
        first.ready()
        assert (
            httpx.get(
                f"{first.url}/api/2.0/mlflow/experiments/search", params={"max_results": 1}, timeout=60
            ).status_code
            == 401
        )
        made = httpx.post(
            f"{first.url}/api/2.0/mlflow/experiments/create", json={"name": name}, auth=(USER, PASSWORD), timeout=60
        )
        assert made.status_code == 200, made.text
        first.process.terminate()
        assert first.process.wait(120) == 0, first.said()
    finally:
        first.process.kill()
    second = _Server(tmp_path / "second", storage)
    try:
        second.ready()
        query = {"experiment_name": name}
        found = httpx.get(
            f"{second.url}/api/2.0/mlflow/experiments/get-by-name", params=query, auth=(USER, PASSWORD), timeout=60
        )
        assert found.json()["experiment"]["name"] == name
        assert PASSWORD not in " ".join(_words_of(second.process.pid))
    finally:
        second.process.terminate()
        second.process.wait(120)


@pytest.mark.parametrize("missing", ["RAYMED_HOME", "MLFLOW_TRACKING_PASSWORD"])
def test_what_is_missing_is_named(tmp_path, missing):
    environment = {"RAYMED_HOME": str(tmp_path), "MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    del environment[missing]
    words = [sys.executable, "-m", "raymed.cluster.mlflow_server", "--folder", str(tmp_path / "f")]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAYMED_"))}
    done = subprocess.run(words, env=kept | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"{missing} is not set" in done.stderr


class _Server:
    def __init__(self, folder, storage):
        port, self.url = free_port(), ""
        self.url = f"http://127.0.0.1:{port}"
        folder.mkdir()
        self.log = folder / "log"
        own = {"RAYMED_HOME": str(storage), "MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
        words = [sys.executable, "-m", "raymed.cluster.mlflow_server", "--folder", str(folder / "mlflow")]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*words, "--port", str(port)], env=os.environ | own, stdout=log, stderr=log)

    def said(self) -> str:
        return self.log.read_text()

    def ready(self) -> None:
        def answers() -> bool:
            assert self.process.poll() is None, self.said()
            try:
                return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(answers, 200, "MLflow")


def _words_of(pid: int) -> list[str]:
    import psutil

    top = psutil.Process(pid)
    return [word for process in [top, *top.children(recursive=True)] for word in process.cmdline()]
