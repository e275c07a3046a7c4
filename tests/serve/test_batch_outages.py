"""Jobs that wait for what is gone for a while: a share, the list of jobs, the registry."""

import socket
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from batch_example import JOBS, ask, case_bundle, config, ended, held, root, started
from predict_example import read_rows, write_images
from test_batch_refused import ends
from waiting import until

from raymed.serve.jobs import outages, runner
from raymed.serve.jobs import predict as work
from raymed.serve.live import Origin
from raymed.serve.sources import Folder, Registry
from raymed.storage import lock

__all__ = ["case_bundle", "config", "held", "root"]


@pytest.fixture(autouse=True)
def soon(monkeypatch, tmp_path):
    """All is tried again soon, under a key of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr("raymed.data.intake.scan.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr("raymed.serve.jobs.outages._PAUSE_S", 0.05)
    monkeypatch.setattr(runner, "_LOOK_S", 0.05)
    monkeypatch.setattr(runner, "_PATIENCE_S", 0.05)


@pytest.fixture
def share(tmp_path):
    """A share of 12 cases, and a list of them that lies elsewhere."""
    (tmp_path / "mounts").mkdir()
    place = tmp_path / "mounts" / "share"
    write_images(place, 12)
    table = read_rows(place / "manifest.csv")
    table["image"] = [str(place / name) for name in table["image"]]
    table.to_csv(tmp_path / "mounts" / "list.csv", index=False)
    return place


@pytest.fixture
def unplugged(share, monkeypatch):
    """Let the share go away at the fourth case; gives where to."""
    real, cases, away = work.answer_case, [], share.parent.parent / "away"

    def answer(*arguments):
        cases.append(arguments)
        if len(cases) == 4:
            share.rename(away)
            share.mkdir()  # as where something was mounted
        return real(*arguments)

    monkeypatch.setattr(work, "answer_case", answer)
    return away


def waiting(client, number):
    """A job that runs and says what it waits for."""
    job = client.get(f"{JOBS}/{number}").json()
    assert job["state"] in ("queued", "running"), job["problem"]
    return job if job["problem"] else None


@pytest.mark.parametrize("source", ["share/manifest.csv", "share", "list.csv"])
def test_a_job_waits_for_its_share_while_others_are_done(config, root, share, unplugged, source):
    with started(replace(config, batch_roots=(str(share.parent), str(root)))) as client:
        number = ask(client, str(share.parent / source)).json()["id"]
        job = until(lambda: waiting(client, number))
        assert "check the share" in job["problem"]
        assert ended(client, ask(client, str(root / "set" / "manifest.csv")).json()["id"])["state"] == "succeeded"
        table = client.jobs.folder / number / "predictions.csv"
        tried = client.jobs._outages._of[number].again
        until(lambda: client.jobs._outages._of[number].again > tried)
        written = table.read_bytes()
        assert len(written.splitlines()) == 1 + 3, "another try loses nothing"
        share.rmdir()
        unplugged.rename(share)
        done = ended(client, number)
        assert (done["state"], done["done"], done["problem"]) == ("succeeded", done["total"], None)
        assert table.read_bytes().startswith(written) and read_rows(table)["case"].is_unique


def test_a_job_whose_share_stays_away_fails_and_leaves_nothing(config, share, unplugged, monkeypatch):
    monkeypatch.setattr("raymed.serve.jobs.outages._LONGEST_S", 0.0)
    with started(replace(config, batch_roots=(str(share.parent),))) as client:
        done = ended(client, ask(client, "share/manifest.csv").json()["id"])
        assert done["state"] == "failed" and "check the share" in done["problem"]
        assert client.get(f"{JOBS}/{done['id']}/result").status_code == 409
        client.jobs._sweep()
        assert not (client.jobs.folder / done["id"]).exists()


def test_what_an_attempt_has_answered_by_the_outage_counts(config, share, unplugged, monkeypatch):
    monkeypatch.setattr(runner, "_TOLD_S", 0.0)
    with started(replace(config, batch_roots=(str(share.parent),))) as client:
        number = ask(client, "share/manifest.csv").json()["id"]
        until(lambda: waiting(client, number))
        assert client.jobs._outages._of[number].done == 3


def test_a_job_that_got_further_since_the_last_outage_has_a_day_again(monkeypatch):
    clock, known, job = [0.0], outages.Outages(), cast(Any, SimpleNamespace(id="1", model="hsg"))
    monkeypatch.setattr(outages, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    found = []
    for clock[0], done in ((0.0, 5000), (86_399.0, 5000), (90_000.0, 35_000), (170_000.0, 35_000), (180_000.0, 35_000)):
        found.append(known.note(job, done))
    assert found == [True, True, True, True, False]


def test_a_folder_that_may_not_be_read_is_none_that_is_away(config, share, monkeypatch):
    def refused(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(work.Path, "iterdir", refused)
    with pytest.raises(PermissionError) as error:
        work.present(str(share), [str(share.parent)])
    assert not outages.may_pass(error.value)


def test_a_job_outlives_a_list_of_jobs_that_nobody_can_write(config, held, monkeypatch):
    monkeypatch.setattr("raymed.serve.jobs.store._WAIT_S", 0.05)
    monkeypatch.setattr(runner, "_TOLD_S", 0.0)
    reached, go = held
    with started(config) as client:
        number = ask(client).json()["id"]
        assert reached.wait(20)
        with closing(sqlite3.connect(client.jobs.store.path, isolation_level=None)) as rows:
            rows.execute("BEGIN EXCLUSIVE")
            go.set()
            until(lambda: number in client.jobs._outages)
            rows.execute("ROLLBACK")
        done = ended(client, number)
        assert (done["state"], done["done"]) == ("succeeded", 12)


def begun_elsewhere(client) -> str:
    """Number of a job that a server began with a version that is not loaded here."""
    jobs, source = client.jobs, Path(client.jobs.config.batch_roots[0]) / "set" / "manifest.csv"
    with lock(jobs.folder / f".{jobs.served['hsg']}.lock"):
        job = jobs.rows.add("", "predict", "hsg", str(source), 9)
        jobs.rows.begin(job.id, Origin("models:/hsg/1", "1", "a" * 64), 12)
    return job.id


def broken(origin):
    """As a client of a store may do it."""
    raise RuntimeError("the password is s3cret")


@pytest.mark.parametrize("where", ["http://127.0.0.1:{port}", "store"])
def test_a_job_that_is_taken_over_waits_for_the_registry(config, tmp_path, where):
    with socket.socket() as nobody:  # bound, so that nobody else answers there
        nobody.bind(("127.0.0.1", 0))
        tracking = where.format(port=nobody.getsockname()[1])
        with started(config) as client:
            served = client.app.state.service.models.served["hsg"]
            down = SimpleNamespace(name="", fetch=broken)
            served.source = down if where == "store" else Registry("models:/hsg", tracking, tmp_path)
            number = begun_elsewhere(client)
            job = until(lambda: waiting(client, number))
            assert ("cannot be fetched now" if where == "store" else "MLflow does not answer") in job["problem"]
            assert "s3cret" not in job["problem"]
            served.source = Folder(config.models[0].partition("=")[2])
            done = ended(client, number)
            assert (done["state"], done["version"], done["done"]) == ("succeeded", "1", 12)


def test_a_server_ends_while_a_version_waits_for_a_device_that_hangs(config, case_bundle):
    loading, go = threading.Event(), threading.Event()

    def fetch(origin):
        loading.set()
        return case_bundle

    with started(config) as client:
        client.app.state.service.models.served["hsg"].source = SimpleNamespace(name="", fetch=fetch)
        client.app.state.service.engine._thread.submit(go.wait, 60)
        number = begun_elsewhere(client)
        assert loading.wait(20)
        assert ends(client)
        go.set()
        assert client.get(f"{JOBS}/{number}").json()["state"] == "running"
