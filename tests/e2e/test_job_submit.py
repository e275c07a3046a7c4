"""A sweep submitted to a cluster with token authentication, its driver killed, and submitted again."""

import json
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest
from home import ONE_BY_ONE, TINY, Home, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
RAY = str(Path(sys.executable).with_name("ray"))
NUM_TRIALS = 8
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """`ray start --head` on a user's machine, and `ray job submit` to it."""

    def __init__(self, home: Home):
        self.home = home
        ports = dict(zip((*PORTS, "ray-client-server-port"), _free_ports(len(PORTS) + 1), strict=True))
        del home.env["PYTHONPATH"]  # the job's own copy of the source is what counts
        home.env["PATH"] = f"{Path(RAY).parent}:{home.env['PATH']}"  # where the entrypoint finds `python`
        options = [f"--{name}={port}" for name, port in ports.items()]
        options += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=2"]
        options += [f"--temp-dir={home.temporary}/r", "--object-store-memory=200000000", "--disable-usage-stats"]
        self.call("get-auth-token", "--generate")  # `ray start` turns authentication on where there is a token
        self.call("start", "--head", *options)
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"

    def call(self, *command: str, expect: int = 0, **env: str) -> str:
        done = subprocess.run(
            [RAY, *command], env=self.home.env | env, cwd=self.home.code, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *arguments: str, **options) -> str:
        """Run a sweep as a job to its end."""
        return self.call(*self.job(*arguments), RAY_AUTH_MODE="token", **options)

    def job(self, *arguments: str) -> tuple[str, ...]:
        """The command that submits a sweep."""
        entrypoint = ("python", "jobs/tune_asl.py", *arguments)
        return ("job", "submit", f"--address={self.address}", "--working-dir=.", "--", *entrypoint)

    def driver(self) -> psutil.Process | None:
        """The process of the job's entrypoint."""
        found = [p for p in self.home.processes() if p.cmdline()[1:2] == ["jobs/tune_asl.py"]]
        return found[0] if found else None


@pytest.fixture(scope="module")
def cluster(home):
    (home.code / ".venv").mkdir()
    (home.code / ".venv" / "big").write_bytes(bytes(3_000_000))
    return Cluster(home)


def _events(home: Home) -> list[dict]:
    path = home.storage / "runs" / "submitted" / "sweep.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _ended(home: Home) -> list[int]:
    return [event["trial"] for event in _events(home) if "status" in event]


def test_a_submitted_sweep_survives_the_kill_of_its_driver(home, cluster):
    command = (*TINY, *ONE_BY_ONE, f"--sweep.num-trials={NUM_TRIALS}", "--name=submitted")
    env = home.env | {"RAY_AUTH_MODE": "token"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    client = subprocess.Popen([RAY, *cluster.job(*command)], cwd=home.code, env=env, **pipes)
    wait_for(lambda: len(_ended(home)) >= 2 or client.poll() is not None, 240, "two ended trials")
    if client.poll() is None:
        cluster.driver().send_signal(signal.SIGKILL)
    output, _ = client.communicate(timeout=60)
    assert client.returncode != 0, output
    before = _events(home)
    assert 2 <= len(_ended(home)) < NUM_TRIALS, output

    with (home.code / "raymed" / "tune" / "trials.py").open("a") as source:
        source.write('print("source:", __file__)  # changed\n')
    output = cluster.submit(*command)

    assert Counter(_ended(home)) == dict.fromkeys(range(NUM_TRIALS), 1)
    assert _events(home)[: len(before)] == before
    assert f"summary: {home.storage}/runs/submitted/summary.json" in output
    sources = [line for line in output.splitlines() if "source: " in line]
    assert any("(pid=" in line or "(run_trial" in line for line in sources), "no worker said where its source is"
    assert any("pid=" not in line for line in sources), "the driver did not say where its source is"
    assert all("/working_dir_files/_ray_pkg_" in line for line in sources), sources
    assert not list(home.temporary.glob("r/**/working_dir_files/*/.venv"))

    from mlflow import MlflowClient

    store = MlflowClient(f"sqlite:///{home.storage}/mlflow/mlflow.db")
    runs = store.search_runs([store.get_experiment_by_name("raymed").experiment_id])
    assert Counter(run.info.run_name for run in runs)["submitted"] == 1
    finals = len(json.loads((home.storage / "runs" / "submitted" / "summary.json").read_text())["figures"])
    assert len(runs) == 1 + 2 + 2 * NUM_TRIALS + finals  # the sweep, two encoders, trials and their seeds, finals
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_without_a_token_nothing_is_accepted(home, cluster):
    job = ("job", "submit", f"--address={cluster.address}", "--", "python", "-c", "1")
    assert "uthenticat" in cluster.call(*job, RAY_AUTH_MODE="disabled", expect=1)


def test_a_relative_storage_in_a_submitted_job_is_refused(home, cluster):
    output = cluster.submit(*TINY, "--storage=here", expect=1)
    assert "error: --storage must be an absolute path in a submitted job, got here" in output
