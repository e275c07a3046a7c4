"""Ctrl-C, as a terminal sends it to a job and all its processes, while Ray is at work."""

import json
import os
import signal
from pathlib import Path

import pytest
from home import ONE_BY_ONE, TINY, wait_for

from raymed.tracking.outbox import Outbox

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def _interrupt(home, job: str, command: tuple[str, ...], when) -> str:
    """Start a job and press Ctrl-C when the condition holds; its output."""
    process = home.start(job, *command)
    wait_for(lambda: when() or process.poll() is not None, 200, "start of the work")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130, output
    assert "stopped; the same command continues" in output
    assert "Traceback" not in output
    wait_for(lambda: not home.processes(), 30, "end of Ray's processes")
    return output


def _losses(run: Path) -> list[tuple[int, float]]:
    records = [r for r in Outbox(run / "seed-2023" / "tracking.jsonl").records() if r["op"] == "metrics"]
    return [(r["step"], r["values"]["single/loss"]) for r in records if "single/loss" in r["values"]]


def test_a_sweep_stops_and_goes_on(home):
    command = (*TINY, *ONE_BY_ONE, "--sweep.num-trials=8", "--sweep.at-once=2", "--name=sweep")
    journal = home.storage / "runs" / "sweep" / "sweep.jsonl"

    def ended() -> list[int]:
        lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
        return [e["trial"] for line in lines if line.endswith("\n") and "status" in (e := json.loads(line))]

    _interrupt(home, "tune_asl", command, lambda: len(ended()) >= 2)
    before = ended()
    assert 2 <= len(before) < 8

    home.run("tune_asl", *command)

    assert ended()[: len(before)] == before
    assert sorted(ended()) == list(range(8))


def test_several_workers_stop_and_go_on_as_if_they_had_not(home):
    steps = ("--method=asl", "--single.steps=60", "--single.evaluations=6", "--compute.workers=2")
    run = home.storage / "runs" / "workers"
    command = (*TINY, *steps, "--name=workers")

    saved = "seed-2023/checkpoints/single/step-*/state.json"

    _interrupt(home, "train_classifier", command, lambda: list(run.glob(saved)))
    assert not (run / "seed-2023" / "result.json").exists()
    home.run("train_classifier", *command)
    home.run("train_classifier", *TINY, *steps, "--name=whole")

    assert len(_losses(run)) == 60
    assert _losses(run) == _losses(home.storage / "runs" / "whole")
