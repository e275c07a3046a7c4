"""The commands without a cluster, and around one of a provider that is a folder: what is said, and the exit codes."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from raymed.cluster import jobs, state, submit
from raymed.cluster.__main__ import COMMANDS, main
from raymed.cluster.providers import Line
from raymed.cluster.state import Cluster
from raymed.config import UserError

PARTS = ("mlflow", "raymed-head@me@a", "raymed-worker@me@a", "raymed-worker@me@ws-100234")
"""Of the folder, as their logs are named."""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "cluster"))
    return tmp_path


@dataclasses.dataclass(frozen=True)
class Config:
    """A folder."""

    place: str
    breaks: bool = False


class Folder(ModuleType):
    """A provider whose cluster is a folder: it is up while that is there."""

    Config = Config

    def up(self, config: Config) -> Cluster:
        secret = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "hidden-word"}
        cluster = Cluster("gcp", {"mlflow": "http://127.0.0.1:5"}, secret, facts={"place": config.place})
        state.save(cluster)
        Path(config.place).mkdir(exist_ok=True)
        if config.breaks:
            raise UserError("the other half does not start")
        return cluster

    def status(self, cluster: Cluster) -> list[Line]:
        there = Path(cluster.facts["place"]).is_dir()
        return [
            Line("mlflow", True, "asks [b]for[/b] a password"),
            Line("folder", there, "" if there else "make it again"),
        ]

    def down(self, cluster: Cluster) -> None:
        Path(cluster.facts["place"]).rmdir()

    def logs(self, cluster: Cluster) -> dict[str, Callable[[], str]]:
        return {part: lambda part=part: f"the last\nlines of {part}" for part in PARTS}

    @contextmanager
    def reached(self, cluster: Cluster) -> Iterator[str]:
        yield "http://127.0.0.1:9"


@pytest.fixture
def place(home, monkeypatch) -> Path:
    """Where the cluster of `up gcp` is."""
    monkeypatch.setitem(sys.modules, "raymed.cluster.providers.gcp", Folder("gcp"))
    return home / "place"


def test_no_command_tells_them_all(capsys):
    assert main([]) == 2
    said = capsys.readouterr().out
    assert all(f"raymed.cluster {name}" in said for name in COMMANDS)
    assert main(["--help"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["statu"], "did you mean 'status'?"),
        (["up", "moon"], "provider must be one of 'local', 'onprem', 'aws', 'gcp', 'kuberay', got 'moon'"),
        (["status"], "no cluster is up"),
        (["submit", "jobs/train_classifier.py"], "no cluster is up"),
        (["logs"], "no cluster is up"),
        (["stop"], "no cluster is up"),
    ],
)
def test_what_cannot_be_done_is_one_message(words, says, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and says in said.err and said.err.count("\n") == 1


def test_up_without_a_provider_names_them(capsys):
    assert main(["up"]) == 2
    assert "{local,onprem,aws,gcp,kuberay}" in capsys.readouterr().out


def test_down_with_nothing_up_is_well(capsys):
    assert main(["down"]) == 0
    assert capsys.readouterr().out == "no cluster is up\n"


@pytest.mark.parametrize("words", [["status", "--all"], ["down", "now"], ["up", "gcp", "--plaice", "x"], ["submit"]])
def test_unknown_flags_are_refused(words, place, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


def test_up_says_where_things_are_and_no_secret(place, capsys):
    assert main(["up", "gcp", "--place", str(place)]) == 0
    said = capsys.readouterr().out
    assert "the gcp cluster is up" in said and "http://127.0.0.1:5" in said and "me of MLflow" in said
    assert "hidden-word" not in said
    assert main(["up", "gcp", "--place", str(place)]) == 0
    assert "was up already" in capsys.readouterr().out
    assert main(["up", "gcp", "--place", f"{place}-2"]) == 0
    assert "the gcp cluster is up\n" in capsys.readouterr().out, "it is another one than it was"


def test_up_beside_a_cluster_of_another_provider_is_refused(place, capsys):
    main(["up", "gcp", "--place", str(place)])
    assert main(["up", "local"]) == 2
    assert "a cluster is up already, with gcp" in capsys.readouterr().err
    cluster = state.load()
    assert cluster is not None and cluster.provider == "gcp"


def test_status_ends_with_1_when_a_part_is_down(place, capsys):
    main(["up", "gcp", "--place", str(place)])
    assert main(["status"]) == 0
    place.rmdir()
    capsys.readouterr()
    assert main(["status"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mlflow", "up", "asks", "[b]for[/b]", "a", "password"] in lines
    assert ["folder", "down", "make", "it", "again"] in lines


def test_half_a_cluster_is_ended_by_down(place, capsys):
    assert main(["up", "gcp", "--place", str(place), "--breaks"]) == 2
    said = capsys.readouterr().err
    assert "the other half does not start" in said and "down ends it" in said
    assert main(["down"]) == 0
    assert not place.exists() and state.load() is None
    assert main(["down"]) == 0


def test_log_of_a_part(place, capsys):
    main(["up", "gcp", "--place", str(place)])
    capsys.readouterr()
    assert main(["logs", "mlflow"]) == 0
    assert capsys.readouterr().out == "the last\nlines of mlflow\n"
    assert main(["logs", "mlflow", "--follow"]) == 2
    assert "only a job is followed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("raymed-head@me@a", ["raymed-head@me@a"]),
        ("raymed-head", ["raymed-head@me@a"]),
        ("head", ["raymed-head@me@a"]),
        ("raymed-worker", ["raymed-worker@me@a", "raymed-worker@me@ws-100234"]),
        ("me@a", ["raymed-head@me@a", "raymed-worker@me@a"]),
        ("raymed-worker@me@ws-100234", ["raymed-worker@me@ws-100234"]),
        ("me@ws-100234", ["raymed-worker@me@ws-100234"]),
    ],
)
def test_log_of_a_part_that_hosts_have(name, parts, place, capsys):
    """Also of one whose host is called as a job is."""
    main(["up", "gcp", "--place", str(place)])
    capsys.readouterr()
    assert main(["logs", name]) == 0
    said = capsys.readouterr().out
    assert [part for part in PARTS if f"lines of {part}\n" in said] == parts
    assert said.count("==>") == (len(parts) if len(parts) > 1 else 0)


@pytest.mark.parametrize("name", [["raymed-heed"], ["train-00000a"], []])
def test_where_the_dashboard_is_down_the_parts_that_have_logs_are_named(name, place, capsys):
    main(["up", "gcp", "--place", str(place)])
    capsys.readouterr()
    assert main(["logs", *name]) == 2
    said = capsys.readouterr().err
    assert "does not answer" in said and said.endswith(f"parts that have a log: {', '.join(PARTS)}\n")


def test_state_that_cannot_be_read(home, capsys):
    (home / "cluster").mkdir()
    (home / "cluster" / "cluster.json").write_text('{"provider": ')
    for command in ("status", "down"):
        assert main([command]) == 2
        assert "cannot be read" in capsys.readouterr().err


def client_of(*names: str, ended: tuple[str, ...] = ()) -> Any:
    """Of a cluster to which these jobs were submitted in this order."""
    from ray.job_submission import JobDetails, JobStatus, JobType

    def job(name: str, start_time: int) -> JobDetails:
        status = JobStatus.SUCCEEDED if name in ended else JobStatus.RUNNING
        submission = JobType.SUBMISSION
        return JobDetails(type=submission, status=status, entrypoint="", submission_id=name, start_time=start_time)

    submitted = [job(name, number) for number, name in enumerate(names)]
    return SimpleNamespace(list_jobs=lambda: submitted)


def test_the_last_job_is_not_one_of_the_doctors():
    names = ("train-00000a", "doctor-eval-00000b", "doctor-00000c", "doctor-00000d")
    assert jobs.found(client_of(*names), None) == "doctor-eval-00000b"
    assert jobs.found(client_of(*names), "doctor-00000c") == "doctor-00000c", "it has a log too"
    with pytest.raises(UserError, match="no job was submitted"):
        jobs.found(client_of("doctor-00000c"), None)


def test_the_job_to_stop_is_one_that_runs():
    names = ("tune-00000a", "train-00000b", "eval-00000c")
    ray = client_of(*names, ended=names[2:])
    assert jobs.found(ray, None, prefer_running=True) == "train-00000b"
    assert jobs.found(ray, None) == "eval-00000c", "its log is still of interest"
    assert jobs.found(client_of(*names, ended=names), None, prefer_running=True) == "eval-00000c"


@pytest.mark.parametrize(
    ("status", "code", "expected", "says"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 7, 7, "failed with exit code 7"),
        ("FAILED", -9, 137, "failed with exit code 137"),
        ("FAILED", None, 1, "failed: no node has room"),
        ("STOPPED", None, 130, "was stopped"),
    ],
)
def test_exit_code_of_a_job(status, code, expected, says, capsys):
    from ray.job_submission import JobDetails, JobStatus, JobType

    told = {"status": JobStatus(status), "message": "no node has room", "driver_exit_code": code}
    job = JobDetails(type=JobType.SUBMISSION, entrypoint="", **told)
    assert jobs.ended("tell", job) == expected
    assert says in capsys.readouterr().err


def test_an_error_of_this_machine_is_not_told_as_the_dashboards(home, monkeypatch):
    """The files are looked at before the dashboard is asked, with the cluster's settings of Ray."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "of the user")
    monkeypatch.chdir(home)
    (home / "job.py").touch()

    def packed(project: Path) -> int:
        raise RuntimeError(f"{project} cannot be packed, {os.environ['RAY_AUTH_MODE']}")

    monkeypatch.setattr(submit, "checked_size", packed)
    silent = Cluster("local", {"dashboard": "http://127.0.0.1:9"}, {"RAY_AUTH_MODE": "of the cluster"})
    with pytest.raises(RuntimeError, match="cannot be packed, of the cluster"):
        submit.submit(silent, "job.py")


@pytest.mark.parametrize(
    ("error", "told"),
    [(RuntimeError(), "RuntimeError"), (RuntimeError("Traceback:\n  line 7\nno such job\n"), "no such job")],
)
def test_an_error_of_the_dashboard_is_told_also_without_a_text(place, error, told, monkeypatch):
    monkeypatch.setattr(jobs, "check_answers", lambda url: None)
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda url: SimpleNamespace())
    handler = logging.NullHandler()
    before = dict(os.environ)
    logging.getLogger("ray").addHandler(handler)
    with pytest.raises(UserError, match=f"the dashboard at http://127.0.0.1:9 cannot do that: {told}$"):
        with jobs.client(Cluster("gcp", {}, {"RAY_AUTH_MODE": "of the cluster"})):
            assert os.environ["RAY_AUTH_MODE"] == "of the cluster" and handler.level == logging.ERROR
            raise error
    logging.getLogger("ray").removeHandler(handler)
    assert dict(os.environ) == before and handler.level == logging.NOTSET
