"""Servers that share a storage: each does the jobs of what it serves itself, and replicas those of each other."""

import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from batch_example import JOBS, ask, case_bundle, config, ended, expected, held, root, same_numbers, started, store_of
from predict_example import write_images
from waiting import until

__all__ = ["case_bundle", "config", "expected", "held", "root"]


@pytest.fixture
def other(config, case_bundle, tmp_path):
    """Of a server of another model, with the same storage and a folder of its own."""
    write_images(tmp_path / "more" / "set", 2)
    changed = replace(case_bundle, operating_point=case_bundle.operating_point | {"threshold": 0.6})
    saved = changed.save(tmp_path / "changed")
    return replace(config, models=(f"cxr={saved}",), batch_roots=(str(tmp_path / "more"),))


def test_each_of_two_servers_does_its_own_jobs(config, other):
    with started(config) as first, started(other) as second:
        mine = ended(first, ask(first).json()["id"])
        theirs = ended(second, ask(second, model="cxr").json()["id"])
        assert (mine["state"], theirs["state"]) == ("succeeded", "succeeded"), theirs["problem"]
        assert mine["bundle"] != theirs["bundle"] and theirs["total"] == 2
        assert len(first.get(JOBS).json()) == len(second.get(JOBS).json()) == 2, "both tell of all"


@pytest.mark.parametrize("name", ["hsg", "cxr"])
def test_what_another_server_is_to_do_waits_for_it(config, other, name):
    """Also where it has another model by the same name."""
    other = replace(other, models=(other.models[0].replace("cxr", name),))
    store = store_of(other)
    source = str(Path(other.batch_roots[0]) / "set")
    waiting, left = (store.add("", "predict", name, source, 9).id for _ in range(2))
    assert store.claim(left), "by a server that is just starting again"
    with started(config) as client:
        assert ended(client, ask(client).json()["id"])["state"] == "succeeded"
        states = [client.get(f"{JOBS}/{number}").json()["state"] for number in (waiting, left)]
        assert states == ["queued", "running"]
    with started(other) as client:
        assert [ended(client, number)["state"] for number in (waiting, left)] == ["succeeded", "succeeded"]
        digest = client.app.state.service.models.get(name).origin.digest
        assert client.get(f"{JOBS}/{left}").json()["bundle"] == digest


def test_a_source_in_a_folder_of_another_server_waits_for_it(config, other):
    other = replace(other, models=config.models)
    number = store_of(other).add("", "predict", "hsg", str(Path(other.batch_roots[0]) / "set"), 9).id
    with started(config) as client:
        assert ended(client, ask(client).json()["id"])["state"] == "succeeded"
        assert client.get(f"{JOBS}/{number}").json()["state"] == "queued"
    with started(replace(other, batch_roots=(*config.batch_roots, *other.batch_roots))) as client:
        assert ended(client, number)["state"] == "succeeded"


def test_a_replica_takes_over_what_another_leaves_and_nothing_before(config, held, expected):
    reached, go = held
    with started(config) as first:
        number = ask(first).json()["id"]
        assert reached.wait(20)
        with started(config) as second:
            (waiting,) = second.jobs._next()
            assert waiting.id == number and not second.jobs._work_off(waiting), "the first is at it"
            first.jobs._ending.set()
            go.set()
            until(lambda: not first.jobs._thread.is_alive())
            assert ended(second, number)["state"] == "succeeded"
            table = second.jobs.folder / number / "predictions.csv"
            assert same_numbers(table.read_bytes(), expected[0]), "no case twice"


def test_what_no_server_can_do_fails_after_a_day(config, other):
    store = store_of(other)
    number, fresh = (store.add("", "predict", "cxr", "/x", 9).id for _ in range(2))
    with closing(sqlite3.connect(store.path)) as rows, rows:
        rows.execute("UPDATE jobs SET seen = ? WHERE id = ?", (time.time() - 86401, number))
    with started(config) as client:
        assert ended(client, ask(client).json()["id"])["state"] == "succeeded"
        assert client.get(f"{JOBS}/{number}").json()["state"] == "queued", "its server may be about to start"
        client.jobs._since -= 86401
        done = ended(client, number)
        assert done["state"] == "failed" and "no server has had cxr" in done["problem"]
        assert client.get(f"{JOBS}/{fresh}").json()["state"] == "queued"


def test_jobs_of_before_servers_were_told_apart_go_by_their_names(config):
    path = store_of(config).path
    with closing(sqlite3.connect(path)) as rows, rows:
        for column in ("served", "seen"):
            rows.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
        for number, model in (("a" * 32, "hsg"), ("b" * 32, "cxr")):
            source = str(Path(config.batch_roots[0]) / "set" / "manifest.csv")
            rows.execute(
                "INSERT INTO jobs (id, owner, kind, model, source, state, created) "
                "VALUES (?, '', 'predict', ?, ?, 'queued', ?)",
                (number, model, source, time.time()),
            )
    with started(config) as client:
        assert ended(client, "a" * 32)["state"] == "succeeded"
        assert client.get(f"{JOBS}/{'b' * 32}").json()["state"] == "queued"
