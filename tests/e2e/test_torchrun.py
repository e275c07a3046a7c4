"""A job started as several processes by torchrun, or by srun as far as its variables go.

srun itself needs a SLURM cluster: here two processes get the variables that it sets, and everything after is real.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from home import TINY, wait_for

from raymed.tracking.outbox import Outbox

pytestmark = pytest.mark.slow
TRAIN = (*TINY, "--method=asl", "--single.steps=120", "--single.optim.lr=2e-4", "--model.norm=group", "--name=one")
TWO = ("--compute.zero-stage=2",)


@pytest.fixture(scope="module")
def alone(home):
    """The run of a single process."""
    home.run("train_classifier", *TRAIN)
    return home.storage / "runs" / "one"


@pytest.fixture(scope="module")
def by_torchrun(home, tmp_path_factory):
    """(run, output) of two processes that torchrun started."""
    storage = tmp_path_factory.mktemp("torchrun")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d")
    command = (*launcher, "--rdzv-endpoint=127.0.0.1:0", "jobs/train_classifier.py", *TRAIN, *TWO)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ended = subprocess.run((*command, f"--storage={storage}"), cwd=home.code, env=home.env, timeout=600, **pipes)
    assert ended.returncode == 0, ended.stdout
    return storage / "runs" / "one", ended.stdout


@pytest.fixture
def start(home, tmp_path):
    """start(job, *arguments) -> two processes of a job, as srun starts them, with a storage of this test."""
    started: list[subprocess.Popen] = []

    def two(job: str, *arguments: str) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("", 0))
            port = str(free.getsockname()[1])
        common = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port}
        common |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
        for rank in "01":
            of_rank = common | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            started.append(home.start(job, *arguments, f"--storage={tmp_path}", **of_rank))
        return started[-2:]

    yield two
    for process in started:
        process.kill()
        process.communicate()


def _end(processes: list[subprocess.Popen], seconds: float = 120) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def _curve(run: Path) -> list[tuple[int, dict]]:
    records = Outbox(run / "seed-2023" / "tracking.jsonl").records()
    return [(r["step"], r["values"]) for r in records if r["op"] == "metrics"]


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(step, values["single/loss"]) for step, values in _curve(run) if "single/loss" in values]


def _trains(run: Path) -> bool:
    losses = run / "seed-2023" / "tracking.jsonl"
    return losses.exists() and "single/loss" in losses.read_text()


def test_torchrun_gives_the_run_of_one_process(by_torchrun, alone):
    """Losses to 1e-5; gradients are small differences of large numbers, their norms follow to 1e-4."""
    run, output = by_torchrun
    found, wanted = _curve(run), _curve(alone)
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert sum("single/loss" in values for _, values in found) == 120
    for (step, values), (_, expected) in zip(found, wanted, strict=True):
        if "single/loss" in expected:
            assert values["single/loss"] == pytest.approx(expected["single/loss"], rel=1e-5), step
            assert values["single/grad_norm"] == pytest.approx(expected["single/grad_norm"], rel=1e-4), step
    assert sum(line.startswith("summary: ") for line in output.splitlines()) == 1
    assert sum(r["op"] == "open" for r in Outbox(run / "seed-2023" / "tracking.jsonl").records()) == 1
    assert json.loads((run / "summary.json").read_text())["config"]["compute"]["workers"] == 2


def test_a_signal_to_one_stops_all_and_the_same_command_continues(start, by_torchrun, tmp_path):
    whole, _ = by_torchrun
    run = tmp_path / "runs" / "one"
    processes = start("train_classifier", *TRAIN, *TWO)
    wait_for(lambda: _trains(run) or processes[0].poll() is not None, 120, "first loss")
    processes[1].send_signal(signal.SIGUSR1)  # as `--signal=USR1@60` asks of srun
    (code, output), (other_code, other) = _end(processes)

    assert (code, other_code) == (130, 130), output + other
    assert "stopped; the same command continues" in output
    assert "Traceback" not in output + other
    (state,) = (run / "seed-2023" / "checkpoints" / "single").glob("step-*/state.json")
    assert 0 < json.loads(state.read_text())["step"] < 120
    begun = len(_curve(run))

    ended = _end(start("train_classifier", *TRAIN, *TWO, "--compute.workers=3"))

    assert [code for code, _ in ended] == [0, 0], ended
    assert "compute.workers is 2, not 3" in ended[0][1]
    assert begun < len(_curve(run))
    assert _losses(run) == _losses(whole)
    weights = "seed-2023/bundle/model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()


def test_without_rank_0_the_others_end(start, tmp_path):
    processes = start("train_classifier", *TRAIN)
    wait_for(lambda: _trains(tmp_path / "runs" / "one"), 120, "first loss")
    processes[0].kill()
    ((killed, _), (code, output)) = _end(processes, seconds=20)
    assert killed == -signal.SIGKILL
    assert code == 1 and "rank 1: rank 0 is gone" in output


def test_without_another_rank_0_says_so(start, tmp_path):
    processes = start("train_classifier", *TRAIN)
    wait_for(lambda: _trains(tmp_path / "runs" / "one"), 120, "first loss")
    os.kill(processes[1].pid, signal.SIGKILL)
    (code, output), _ = _end(processes, seconds=30)
    assert code == 2, output
    assert "error: another process of this job has ended while seed-2023 trained" in output


def test_what_is_refused_is_said_once(start):
    side_by_side = start("compare_losses", *TINY, "--compared", "ce", "asl")
    misspelt = start("train_classifier", "--single.optim.rl=1")
    for processes, said in ((side_by_side, "trains many models side by side"), (misspelt, "Unrecognized options")):
        (code, output), (other_code, other) = _end(processes)
        assert (code, other_code) == (2, 2), output + other
        assert said in output and "Traceback" not in output
        assert other == ""
