"""Checks run apart from each other, in the cluster's environment, and tell people and scripts what they found."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import psutil
import pytest
from cluster.nodes import free_port

from raymed.cluster import state
from raymed.cluster.providers import tunnels
from raymed.config import UserError, to_json
from raymed.doctor import __main__ as command
from raymed.doctor import runner
from raymed.doctor.checks import CHECKS, Check
from raymed.doctor.finding import Finding, failure, ok, warning
from raymed.doctor.head import read
from raymed.doctor.one import look
from raymed.doctor.place import Place, Sweep, find

HANGS = """
import subprocess, time
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""


def instead(monkeypatch, code: str) -> None:
    """What runs in place of a check."""
    popen = subprocess.Popen

    def start(words, **options):
        return popen([sys.executable, "-c", code], **options)

    monkeypatch.setattr(runner.subprocess, "Popen", start)


def test_a_check_that_hangs_is_ended_with_what_it_started(monkeypatch, tmp_path):
    path = tmp_path / "pid"
    instead(monkeypatch, f"import sys; sys.stdout = open({str(path)!r}, 'w')\n{HANGS}")
    finding = runner.run(replace(CHECKS[0], seconds=1.5), Place(), os.environ)
    assert finding.level == "failure" and "no answer within 1.5 s" in finding.found
    assert f"--only '{CHECKS[0].name}'" in finding.remedy and finding.seconds < 10
    child, until = int(path.read_text()), time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until


def test_a_check_that_dies(monkeypatch):
    instead(monkeypatch, "import os, sys; print('the last words', file=sys.stderr, flush=True); os.abort()")
    finding = runner.run(CHECKS[0], Place(), os.environ)
    assert finding.level == "failure" and "ended with code -6: the last words" in finding.found


def raising(error: Exception) -> Check:
    def check(place: Place):
        raise error

    return Check("this", check)


def test_errors_are_findings():
    assert look(raising(UserError("a is b: do c")), Place()) == failure("a is b", "do c")
    assert look(raising(UserError("a is b")), Place()).found == "a is b"
    unforeseen = look(raising(KeyError("x")), Place())
    assert (
        unforeseen.level == "failure" and unforeseen.found == "KeyError: 'x'" and "--only 'this'" in unforeseen.remedy
    )


def test_where_ray_does_not_answer_the_rest_is_left_out(monkeypatch):
    monkeypatch.setattr(
        runner, "run", lambda check, *_: replace(failure("", "") if check.name == "Ray" else ok(""), name=check.name)
    )
    names = [finding.name for finding in runner.examine(Place(ray="there:1"), {}, (), lambda finding: None)]
    assert "Ray" in names and "versions" in names
    assert not [name for name in names if name.startswith("nodes:") or name == "Ray's token"]


@pytest.mark.parametrize(("finding", "code"), [(ok("x"), 0), (warning("x", "y"), 0), (failure("x", "y"), 1)])
def test_exit_code_json_and_table(finding, code, monkeypatch, capsys):
    monkeypatch.setattr(runner, "_asked", lambda *_: replace(finding, found="at http://me:secret@host/"))
    assert command.main(command.Doctor(json=True, only=("storage",))) == code
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is (code == 0)
    one = said["findings"][0]
    assert one | {"seconds": 0} == {
        "level": finding.level, "found": "at http://host/", "remedy": finding.remedy, "name": "storage", "seconds": 0,
    }  # fmt: skip
    assert command.main(command.Doctor(only=("storage",))) == code
    table = capsys.readouterr().out
    assert "storage" in table and finding.level in table and ("do: y" in table) is bool(finding.remedy)
    assert "secret" not in table


def test_flags_that_are_wrong():
    for flags, said in (
        (["--only", "storge"], "did you mean 'storage'?"),
        (["--trials", "-1"], "--trials must be >= 0"),
        (["--trials", "2", "--workers", "0"], "--workers must be >= 1"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "raymed.doctor", *flags], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2 and said in done.stdout + done.stderr, done


def test_what_is_examined(monkeypatch):
    """The cluster that is up, else what the environment names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://here:5000/")
    monkeypatch.setenv("RAY_ADDRESS", "http://here:8265")
    monkeypatch.setenv("RAYMED_HOME", "/here")
    place, environment = find(None, (), True, Sweep(), None)
    assert place == Place(storage="/here", dashboard="http://here:8265", mlflow="http://here:5000")
    assert "RAY_ADDRESS" not in environment, "a driver would take it for a cluster's"

    monkeypatch.setenv("RAY_ADDRESS", "here:6379")
    assert find("s3://b/x", (), True, Sweep(), None)[0].s3 == "https://s3.amazonaws.com"
    assert find(None, (), True, Sweep(), None)[0].ray == "here:6379"

    cluster = state.Cluster(
        "local",
        {
            "ray": "127.0.0.1:1",
            "dashboard": "http://127.0.0.1:2",
            "mlflow": "http://127.0.0.1:3",
            "s3": "http://127.0.0.1:4",
        },
        {"RAYMED_HOME": "s3://raymed", "MLFLOW_TRACKING_PASSWORD": "p"},
    )
    place, environment = find(None, (), False, Sweep(2), cluster)
    assert place == Place(
        "s3://raymed",
        "127.0.0.1:1",
        "http://127.0.0.1:2",
        "http://127.0.0.1:3",
        "http://127.0.0.1:4",
        (),
        False,
        Sweep(2),
    )
    assert environment["RAY_ADDRESS"] == "127.0.0.1:1"
    assert environment["MLFLOW_TRACKING_PASSWORD"] == "p"
    assert set(place.services()) == {"dashboard", "MLflow", "S3"}


def test_the_storage_of_a_cluster_elsewhere_is_its_heads_to_look_at(monkeypatch, tmp_path):
    """A path on the hosts, or a bucket whose keys the nodes alone have."""
    monkeypatch.setenv("RAY_ADDRESS", "here:6379")
    for home in (str(tmp_path / "on the hosts"), "s3://b/x"):
        far = state.Cluster("onprem", {"dashboard": "http://127.0.0.1:9"}, {"RAYMED_HOME": home})
        place, environment = find(None, (), True, Sweep(), far)
        assert place.ray is None and "RAY_ADDRESS" not in environment, "the one of the shell is another cluster"
        assert place.s3 is None and environment["RAYMED_HOME"] == home
        assert runner.examine(place, environment, ("storage", "disk space"), lambda finding: None) == []
    assert not (tmp_path / "on the hosts").exists()

    asked, environment = find(str(tmp_path / "here"), (), True, Sweep(), far)
    names = [f.name for f in runner.examine(asked, environment, ("storage", "disk space"), lambda finding: None)]
    assert names == ["storage", "disk space"] and (tmp_path / "here").is_dir()


def test_a_machine_without_a_cluster(monkeypatch, capsys):
    monkeypatch.setattr(command, "examine", lambda *_: [ok("x")])
    assert command.main(command.Doctor(json=True)) == 0
    assert "no cluster is up" in json.loads(capsys.readouterr().out)["findings"][-1]["found"]


@pytest.fixture
def far(monkeypatch):
    """far(words) -> a cluster elsewhere that is up, whose dashboard lies behind a tunnel, which has ended and which the
    command `words` (of the port) opens. The doctor's job there asks for the way again, as a client of jobs does."""
    port = free_port()

    def made(words: Callable[[int], list[str]]) -> state.Cluster:
        provider = ModuleType("a provider")
        tunnel = tunnels.Tunnel("dashboard", port, words(port))

        @contextmanager
        def reached(cluster: state.Cluster):
            tunnels.opened(cluster, [tunnel])
            yield cluster.addresses["dashboard"]

        def on_head(cluster: state.Cluster, _) -> list[Finding]:
            with reached(cluster):
                return [replace(ok("x"), name="head: Ray")]

        monkeypatch.setattr(provider, "reached", reached, raising=False)
        monkeypatch.setitem(sys.modules, "raymed.cluster.providers.gcp", provider)
        monkeypatch.setattr(command, "on_head", on_head)
        ended = subprocess.Popen(["true"])
        ended.wait()
        gone = state.Process("dashboard", ended.pid, 0.0)
        cluster = state.Cluster("gcp", {"dashboard": f"http://127.0.0.1:{port}"}, processes=(gone,))
        state.save(cluster)
        return cluster

    yield made
    tunnels.close(state.required())


def test_what_has_ended_on_the_way_is_opened_before_the_services_are_asked(far, capsys):
    far(lambda port: [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"])
    assert command.main(command.Doctor(json=True, only=("clock",))) == 0
    found = {one["name"]: one["found"] for one in json.loads(capsys.readouterr().out)["findings"]}
    assert found == {"clock": "within 5 s of dashboard", "head: Ray": "x"}


def test_no_way_to_the_head_is_one_finding(far, capsys):
    """What needs none is looked at all the same."""
    far(lambda _: [sys.executable, "-c", "import sys; sys.exit('Permission denied (publickey)')"])
    assert command.main(command.Doctor(json=True, only=("clock", "MLflow", "shared memory"))) == 1
    one, other = json.loads(capsys.readouterr().out)["findings"]
    assert (one["name"], one["level"], one["remedy"]) == ("way to the head", "failure", "make cluster-status")
    assert "Permission denied (publickey)" in one["found"] and other["name"] == "shared memory"


def test_what_the_head_says():
    findings = {
        "ok": False,
        "findings": [{"level": "failure", "found": "x", "remedy": "y", "name": "Ray", "seconds": 1}],
    }
    [one] = read(f"a line of Ray's\n{to_json(findings)}another line\n")
    assert one.name == "head: Ray" and one.level == "failure" and one.remedy == "y"
    [failed] = read("2026 Traceback\nNo module named raymed.doctor\n")
    assert failed.level == "failure" and "No module named raymed.doctor" in failed.found and "install" in failed.remedy
