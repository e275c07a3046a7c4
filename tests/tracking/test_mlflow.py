import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from raymed.config import UserError
from raymed.tracking import Outbox, Tracker, without_credentials


def _upload(storage, *outboxes, uri=None):
    with Tracker(uri, "exp", storage, period=0.01) as tracker:
        for outbox in outboxes:
            tracker.follow(outbox.path)
    return tracker


def _runs(client, experiment="exp"):
    """{run key: run} of all runs; fails when a key has two."""
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    by_key = {run.data.tags["raymed.run_key"]: run for run in runs}
    assert len(by_key) == len(runs), "a run key stands for two runs"
    return by_key


def _curve(client, run, name="loss"):
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]


def _text(client, run, file):
    with open(client.download_artifacts(run.info.run_id, file)) as opened:
        return opened.read()


@pytest.fixture
def outbox(storage):
    outbox = Outbox(storage / "run/outbox.jsonl")
    outbox.open("key", "name", params={"data": {"positive": "normal"}, "lr": 0.1}, tags={"method": "asl"})
    return outbox


def test_a_whole_run(storage, outbox, client):
    (storage / "figures").mkdir()
    (storage / "figures/roc.svg").write_text("<svg/>")
    for step in range(1, 4):
        outbox.metrics({"loss": 1 / step, "lr": 0.1}, step)
    outbox.artifact(storage / "figures/roc.svg", "figures")
    outbox.artifact(storage / "figures", "all")
    outbox.text("a==1", "packages.txt")
    outbox.tags({"raymed.git": "abc"})
    outbox.close()
    tracker = _upload(storage, outbox)
    run = _runs(client)["key"]
    assert run.info.status == "FINISHED" and run.info.run_name == "name"
    assert run.info.start_time == outbox.records()[0]["time"] and run.info.end_time == outbox.records()[-1]["time"]
    assert run.data.params == {"data.positive": "normal", "lr": "0.1"}
    assert run.data.tags["method"] == "asl" and run.data.tags["raymed.git"] == "abc"
    assert _curve(client, run) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert json.loads(_text(client, run, "config.json")) == {"data": {"positive": "normal"}, "lr": 0.1}
    assert _text(client, run, "packages.txt") == "a==1"
    assert _text(client, run, "figures/roc.svg") == _text(client, run, "all/roc.svg") == "<svg/>"
    assert run.info.artifact_uri.startswith((storage / "mlartifacts").as_uri())
    assert tracker.run_id("key") == run.info.run_id
    where = f"mlflow ui --backend-store-uri sqlite:///{storage}/mlflow/mlflow.db, run name ({run.info.run_id})"
    assert tracker.where("key").startswith(where)


def test_sweep_trial_and_seed_are_nested_whatever_is_followed_first(storage, client):
    outboxes = {key: Outbox(storage / f"{key}.jsonl") for key in ("seed", "trial", "sweep")}
    outboxes["sweep"].open("sweep", "sweep")
    outboxes["trial"].open("trial", "trial", parent="sweep")
    outboxes["seed"].open("seed", "seed", parent="trial")
    for outbox in outboxes.values():
        outbox.close()
    tracker = _upload(storage, *outboxes.values())
    runs = _runs(client)
    parents = {key: run.data.tags.get("mlflow.parentRunId") for key, run in runs.items()}
    assert parents == {"sweep": None, "trial": runs["sweep"].info.run_id, "seed": runs["trial"].info.run_id}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert tracker.close()


def test_a_child_waits_for_its_parent(storage, client, capsys):
    child, parent = Outbox(storage / "child.jsonl"), Outbox(storage / "parent.jsonl")
    child.open("child", "child", parent="parent")
    child.close()
    assert not _upload(storage, child).close()
    assert str(child.path) in capsys.readouterr().out
    parent.open("parent", "parent")
    assert _upload(storage, parent).close()  # the child is known from the first time
    runs = _runs(client)
    assert runs["child"].data.tags["mlflow.parentRunId"] == runs["parent"].info.run_id


def test_a_resumed_run_is_the_same_run_without_double_points(storage, outbox, client):
    for step in range(1, 6):
        outbox.metrics({"loss": float(step)}, step)
    outbox.close("FAILED")
    _upload(storage, outbox)
    first = _runs(client)["key"]
    assert first.info.status == "FAILED"

    outbox.open("key", "name", params={"lr": 0.2, "new": 1})  # a parameter never changes in MLflow
    outbox.rewind(3)
    for step in range(4, 8):
        outbox.metrics({"loss": float(step), "auroc": 0.9}, step)
    _upload(storage, outbox)
    second = _runs(client)["key"]
    assert second.info.run_id == first.info.run_id and second.info.status == "RUNNING"
    assert second.data.params == {"data.positive": "normal", "lr": "0.1", "new": "1"}
    assert _curve(client, second) == [(step, float(step)) for step in range(1, 8)]
    assert [step for step, _ in _curve(client, second, "auroc")] == [4, 5, 6, 7]
    assert json.loads(_text(client, second, "config.json"))["lr"] == 0.2

    outbox.close()
    _upload(storage, outbox)
    assert _runs(client)["key"].info.status == "FINISHED"


def test_what_was_rewound_before_any_upload_never_arrives(storage, outbox, client):
    for step in range(1, 6):
        outbox.metrics({"loss": float(step)}, step)
    outbox.rewind(3)
    outbox.metrics({"loss": 40.0}, 4)
    _upload(storage, outbox)
    assert _curve(client, _runs(client)["key"]) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.parametrize("loss", ["cursor", "half the cursor"])
def test_uploading_again_changes_nothing(storage, outbox, client, loss):
    """A process that dies after an upload and before its cursor is written repeats the upload."""
    cursor = outbox.path.with_suffix(".cursor.json")
    _upload(storage, outbox)
    old = cursor.read_text()
    for step in range(1, 4):
        outbox.metrics({"loss": float(step), "bad": math.nan}, step)
    outbox.text("t", "t.txt")
    outbox.close("KILLED")
    _upload(storage, outbox)
    before = _runs(client)["key"]
    if loss == "cursor":
        cursor.unlink()
    else:
        cursor.write_text(old)
    _upload(storage, outbox)
    after = _runs(client)["key"]
    assert after.info.run_id == before.info.run_id and after.info.status == "KILLED"
    assert _curve(client, after) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(_curve(client, after, "bad")) == 3


def test_a_run_deleted_in_mlflow_is_made_anew_when_it_goes_on(storage, outbox, client):
    outbox.metrics({"loss": 1.0}, 1)
    _upload(storage, outbox)
    deleted = _runs(client)["key"].info.run_id
    client.delete_run(deleted)
    outbox.metrics({"loss": 2.0}, 2)
    _upload(storage, outbox)
    run = _runs(client)["key"]
    assert run.info.run_id != deleted and _curve(client, run) == [(1, 1.0), (2, 2.0)]


def test_a_lost_store_is_filled_again(storage, outbox, client, empty_store):
    outbox.metrics({"loss": 1.0}, 1)
    _upload(storage, outbox)
    with sqlite3.connect(storage / "mlflow/mlflow.db") as database:
        for table in ("tags", "metrics", "latest_metrics", "params", "runs"):
            database.execute(f"DELETE FROM {table}")
    outbox.close()
    _upload(storage, outbox)
    run = _runs(client)["key"]
    assert _curve(client, run) == [(1, 1.0)] and run.info.status == "FINISHED" and run.data.params["lr"] == "0.1"


def test_the_driver_closes_what_its_process_left_open(storage, outbox, client):
    done = Outbox(storage / "done.jsonl")
    done.open("done", "done")
    done.close()
    with Tracker(None, "exp", storage, period=0.01) as tracker:
        tracker.follow(outbox.path)
        tracker.follow(done.path)
        tracker.follow(storage / "never_written.jsonl")
        tracker.close_run("key", "KILLED")
        tracker.close_run("done", "FINISHED")
        tracker.close_run("never opened", "FAILED")
    assert {key: run.info.status for key, run in _runs(client).items()} == {"key": "KILLED", "done": "FINISHED"}
    assert [r["op"] for r in done.records()] == ["open", "close"]  # its end stays when it was
    assert not (storage / "never_written.jsonl").exists()


def test_a_torn_line_of_a_killed_process_does_not_hold_anything_up(storage, outbox, client):
    with outbox.path.open("ab") as file:
        file.write(b'{"op": "metrics", "ti')
    assert _upload(storage, outbox).close()
    outbox.metrics({"loss": 1.0}, 1)
    _upload(storage, outbox)
    assert _curve(client, _runs(client)["key"]) == [(1, 1.0)]


def test_an_outbox_that_was_removed_and_begun_again(storage, outbox, client):
    outbox.metrics({"loss": 1.0}, 1)
    _upload(storage, outbox)
    outbox.path.unlink()
    outbox.open("other", "n")
    _upload(storage, outbox)
    assert set(_runs(client)) == {"key", "other"}


DRIVER = """
import sys, time
from pathlib import Path
from raymed.tracking import Outbox, Tracker
storage = Path(sys.argv[1])
outbox = Outbox(storage / "run/outbox.jsonl")
tracker = Tracker(None, "exp", storage)
tracker.follow(outbox.path)
outbox.open("key", "name")
step = 0
while True:
    step += 1
    outbox.metrics({"loss": float(step)}, step)
    if step % 100 == 0 and tracker.run_id("key"):
        print(step, flush=True)
    time.sleep(0.001)
"""


def test_a_driver_killed_in_the_middle_and_started_again(storage, client):
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(storage)], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            reached = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    run_id = _runs(client)["key"].info.run_id
    outbox = Outbox(storage / "run/outbox.jsonl")
    outbox.open("key", "name")
    outbox.rewind(reached - 50)
    for step in range(reached - 49, reached + 500):
        outbox.metrics({"loss": float(step)}, step)
    outbox.close()
    _upload(storage, outbox)
    run = _runs(client)["key"]
    assert run.info.run_id == run_id and run.info.status == "FINISHED"
    assert [step for step, _ in _curve(client, run)] == list(range(1, reached + 500))


def test_more_than_one_request_takes(storage, outbox, client):
    for step in range(1, 1300):
        outbox.metrics({"loss": 1.0, "lr": 2.0}, step)
    outbox.metrics({f"class/{i}": float(i) for i in range(1100)}, 1)
    outbox.open("key", "name", params={f"p{i}": i for i in range(250)}, tags={f"t{i}": "x" for i in range(150)})
    _upload(storage, outbox)
    run = _runs(client)["key"]
    assert len(_curve(client, run)) == len(_curve(client, run, "lr")) == 1299
    assert run.data.metrics["class/1099"] == 1099.0
    assert len(run.data.params) == 252 and sum(tag.startswith("t") for tag in run.data.tags) == 150


def test_what_mlflow_does_not_take_as_it_is(storage, outbox, client, capsys):
    outbox.open("key", "name", params={"long": "x" * 7000}, tags={"tag#1": "y" * 9000})
    outbox.metrics({"f1@0.5 (test)": 0.5, "../up//x": 1.0, "loss": math.inf}, 1)
    outbox.artifact(storage / "gone.png")
    outbox.text("t", "../../outside.txt")
    outbox.metrics({"loss": 2.0}, 2)
    assert _upload(storage, outbox).close()
    run = _runs(client)["key"]
    assert run.data.params["long"] == "x" * 6000
    assert json.loads(_text(client, run, "config.json")) == {"long": "x" * 7000}
    assert run.data.tags["tag_1"] == "y" * 8000
    assert run.data.metrics["f1_0.5 _test_"] == 0.5 and run.data.metrics["up/x"] == 1.0
    curve = _curve(client, run)
    assert [step for step, _ in curve] == [1, 2] and math.isnan(curve[0][1]) and curve[1][1] == 2.0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and "gone.png is not there" in printed[0]
    assert _text(client, run, "outside.txt") == "t" and not list(storage.glob("*.txt"))


def test_mlflow_variables_of_the_user_do_not_disturb(storage, outbox, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    _upload(storage, outbox)
    assert _runs(client)["key"].info.run_id != "0" * 32


def test_the_uri_comes_from_the_environment(storage, outbox, empty_store, monkeypatch, tmp_path):
    from mlflow import MlflowClient

    shutil.copy(empty_store, tmp_path / "mine.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    _upload(storage, outbox)
    assert "key" in _runs(MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mine.db"))
    assert not (tmp_path / "mlruns").exists()


def test_two_stores_have_each_their_own_run(storage, outbox, client, empty_store, tmp_path):
    from mlflow import MlflowClient

    outbox.metrics({"loss": 1.0}, 1)
    shutil.copy(empty_store, tmp_path / "other.db")
    _upload(storage, outbox)
    _upload(storage, outbox, uri=f"sqlite:///{tmp_path}/other.db")
    other = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/other.db")
    for each in (client, other):
        assert _curve(each, _runs(each)["key"]) == [(1, 1.0)]


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "mlruns", "/tmp/mlruns"])
def test_a_plain_folder_is_no_store(storage, uri):
    with pytest.raises(UserError, match=r"sqlite:///"):
        Tracker(uri, "exp", storage)


def test_a_password_is_never_shown(storage, capsys):
    with Tracker("http://me:secret@127.0.0.1:1/", "exp", storage) as tracker:
        tracker.follow(storage / "x.jsonl")
        Outbox(storage / "x.jsonl").open("k", "n")
    shown = capsys.readouterr().out + tracker.where("k") + "".join(p.read_text() for p in storage.rglob("*.json"))
    assert "secret" not in shown and "http://127.0.0.1:1" in shown


class _Hangs(BaseHTTPRequestHandler):
    """A server that is healthy and closes the connection at every other request."""

    def do_GET(self):
        if self.path == "/health":
            self.send_response(200)
            self.end_headers()

    def log_message(self, *_):
        pass


def test_what_mlflow_says_of_an_error_is_shown_without_the_password(storage, capsys):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hangs) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Tracker(f"http://me:secret@127.0.0.1:{server.server_port}", "exp", storage) as tracker:
            tracker.follow(storage / "x.jsonl")
            Outbox(storage / "x.jsonl").open("k", "n")
        server.shutdown()
    shown = capsys.readouterr().out
    assert f"API request to http://127.0.0.1:{server.server_port}/api/" in shown and "secret" not in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://u:p@h/db", "postgresql://h/db"),
        ("no way to http://u:p@ss@h:80/x?a=b@c: a@b", "no way to http://h:80/x?a=b@c: a@b"),
        ("http://h:5000 and sqlite:////a@b/c", "http://h:5000 and sqlite:////a@b/c"),
        ('["http://u:p@h","a@b"]', '["http://h","a@b"]'),
        ('["http://h","a@b"]', '["http://h","a@b"]'),
    ],
)
def test_credentials(text, expected):
    assert without_credentials(text) == expected


def test_a_server_that_never_answers_delays_nothing(storage, capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.perf_counter()
        tracker = Tracker(f"http://127.0.0.1:{silent.getsockname()[1]}", "exp", storage, period=0.01)
        outbox = Outbox(storage / "outbox.jsonl")
        tracker.follow(outbox.path)
        outbox.open("key", "name")
        outbox.metrics({"loss": 1.0}, 1)
        assert time.perf_counter() - start < 2
        assert not tracker.close(timeout=10)
        assert time.perf_counter() - start < 8
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "no answer within 3 s" in lines[0] and "the next start uploads" in lines[1]


@pytest.fixture
def server(tmp_path, empty_store):
    """address, start, kill: start() runs a real MLflow server on the address, kill() ends all its processes at once, as
    the test's end does."""
    import psutil

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shutil.copy(empty_store, tmp_path / "server.db")
    started = []

    def start():
        where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
        command = [sys.executable, "-m", "mlflow", "server", *where, *store, "--artifacts-destination", tmp_path / "a"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # it would start ten processes more
        started.append(psutil.Popen(command, cwd=tmp_path, env=environment, **quiet))

    def kill():
        while started:
            process = started.pop()
            for each in [process, *process.children(recursive=True)]:
                each.kill()
            process.wait()

    yield f"http://127.0.0.1:{port}", start, kill
    kill()


def test_a_server_that_comes_late_gets_everything_once(storage, server, capsys):
    from mlflow import MlflowClient

    address, start, _ = server
    outboxes = [Outbox(storage / f"{name}.jsonl") for name in ("sweep", "trial")]
    outboxes[0].open("sweep", "sweep")
    outboxes[1].open("trial", "trial", parent="sweep", params={"lr": 0.1})
    for step in range(1, 1501):
        outboxes[1].metrics({"loss": 1 / step, "bad": math.nan}, step)
    outboxes[1].text("t", "t.txt")
    assert not _upload(storage, *outboxes, uri=address).close()  # the server is down for the whole first process
    assert "no connection" in capsys.readouterr().out

    tracker = Tracker(address, "exp", storage, period=0.05)  # a later job: it knows nothing of these runs
    start()
    deadline = time.monotonic() + 150
    while tracker.run_id("trial") is None and time.monotonic() < deadline:
        time.sleep(0.1)
    outboxes[1].close()
    outboxes[0].close()
    assert tracker.close(timeout=60)
    client = MlflowClient(tracking_uri=address)
    runs = _runs(client)
    assert runs["trial"].data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert _curve(client, runs["trial"]) == [(step, 1 / step) for step in range(1, 1501)]
    assert len(_curve(client, runs["trial"], "bad")) == 1500 and runs["trial"].data.params == {"lr": "0.1"}
    assert _text(client, runs["trial"], "t.txt") == "t"
    experiment = client.get_experiment_by_name("exp").experiment_id
    assert tracker.where("trial") == f"{address}/#/experiments/{experiment}/runs/{runs['trial'].info.run_id}"
    assert "/#/experiments/" not in capsys.readouterr().out, "MLflow's own lines, two a run"
    assert not os.listdir(storage / "outboxes")


WRITER = """
import sys, time
from raymed.tracking import Outbox
outbox, step = Outbox(sys.argv[1]), 0
outbox.open("key", "name", params={"lr": 0.1})
while True:
    step += 1
    outbox.metrics({"loss": 1 / step, "lr": 0.1}, step)
    time.sleep(0.01)
"""


def test_a_server_that_is_killed_and_restarted_while_training_writes(storage, server, capsys):
    """Nothing is lost and nothing double, whatever the server was doing when it was killed."""
    from mlflow import MlflowClient

    address, start, kill = server
    outbox = Outbox(storage / "run/tracking.jsonl")
    start()
    with Tracker(address, "exp", storage, period=0.05) as tracker:
        tracker.follow(outbox.path)
        with subprocess.Popen([sys.executable, "-c", WRITER, str(outbox.path)]) as training:
            _wait(lambda: _sent(outbox) > 5_000, "the server takes records")
            kill()
            _wait(lambda: tracker._trouble, "the server is missed")
            before = outbox.path.stat().st_size
            _wait(lambda: outbox.path.stat().st_size > before + 10_000, "training goes on")
            start()
            _wait(lambda: _sent(outbox) > before + 10_000, "the server takes them again")
            training.kill()
        outbox.close()
        assert tracker.close(timeout=120)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MLflow at")]
    assert "does not take records" in said[-2] and "takes records again" in said[-1]
    steps = [record["step"] for record in outbox.records() if record["op"] == "metrics"]
    client = MlflowClient(tracking_uri=address)
    run = _runs(client)["key"]
    assert run.info.status == "FINISHED" and len(steps) > 100
    assert _curve(client, run) == [(step, 1 / step) for step in steps]
    assert [step for step, _ in _curve(client, run, "lr")] == list(range(1, len(steps) + 1))


def _sent(outbox):
    """Bytes of an outbox that are uploaded."""
    cursor = outbox.path.with_suffix(".cursor.json")
    return json.loads(cursor.read_text())["offset"] if cursor.exists() else 0


def _wait(condition, what, seconds=150):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.05)
