"""MLflow whose database goes with no machine: real servers, one after the other, on one storage."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing

import httpx
import pytest
from nodes import free_port, wait_for

from raymed.cluster.mlflow_server import DATABASE, keep, take_back

USER, PASSWORD = "raymed", "only-in-this-test-123"


def test_a_database_that_is_written_to_is_kept_whole_and_taken_back(tmp_path):
    machine, storage, next_machine = tmp_path / "machine", str(tmp_path / "storage"), tmp_path / "next"
    machine.mkdir()
    next_machine.mkdir()
    assert not take_back(machine, storage)
    with closing(sqlite3.connect(machine / DATABASE)) as database:
        database.execute("pragma journal_mode=wal")
        database.execute("create table runs (name text)")
        database.execute("insert into runs values ('first')")
        database.commit()
        database.execute("insert into runs values ('half')")  # a transaction that is open meanwhile
        keep(machine, storage)
    assert take_back(next_machine, storage)
    with closing(sqlite3.connect(next_machine / DATABASE)) as database:
        assert database.execute("select name from runs").fetchall() == [("first",)]
    assert not take_back(next_machine, storage), "what the machine has is newer"


@pytest.mark.slow
@pytest.mark.timeout(900)
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
