"""Jobs whose storage is a bucket, as a user runs them: a sweep that goes on on another machine, a bundle and a repeat
from where nothing but the bucket is known, and a server that is gone when the job ends."""

import json
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from home import TINY, wait_for

from raymed.storage import working_copy

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_TRIALS = 9
SWEEP = (*TINY, *f"--sweep.num-trials {NUM_TRIALS} --sweep.generation 3 --seeds 1 --finals.finalists 1".split())
SWEEP += ("--finals.seeds", "11", "--register.no-register", "--name=sweep")
TRAIN = (*TINY, "--method=asl", "--name=one")


def _summary(output: str) -> dict:
    return json.loads(Path(output.strip().splitlines()[-1].removeprefix("summary: ")).read_text())


def _json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _told(text: str) -> Counter:
    """(metric, step) -> how often an outbox has it: twice where a step was trained twice."""
    records = [record for record in _json_lines(text) if record.get("op") == "metrics"]
    return Counter((name, r["step"]) for r in records for name in r["values"] if name.endswith("/loss"))


# A sweep


def test_a_sweep_goes_on_on_another_machine(home, s3):
    """It is stopped in its search, and what it had on this machine is gone when it goes on."""
    alone = _summary(home.run("tune_asl", *SWEEP))
    command = (*SWEEP, f"--storage={s3.url}/sweeps")
    journal = working_copy(f"{s3.url}/sweeps/runs/sweep/sweep.jsonl")

    def ended(text: str) -> list[dict]:
        return [event for event in _json_lines(text) if "status" in event]

    process = home.start("tune_asl", *command, **s3.env)
    wait_for(lambda: (journal.exists() and ended(journal.read_text())) or process.poll() is not None, 120, "trials")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in output, output
    before = {key: s3.get(f"sweeps/runs/sweep/{key}") for key in ("sweep.jsonl", "encoder/seed-1/result.json")}
    told = s3.get("sweeps/runs/sweep/encoder/seed-1/tracking.jsonl")
    assert 1 <= len(ended(before["sweep.jsonl"].decode())) < NUM_TRIALS
    shutil.rmtree(s3.local)

    summary = _summary(home.run("tune_asl", *command, **s3.env))

    for name in ("figures", "verdicts", "sentence", "best", "sweep", "inside", "test_openings", "command"):
        assert summary[name] == alone[name], name
    keys = set(s3.keys())
    run = "sweeps/runs/sweep"
    assert {f"{run}/{name}" for name in ("report.html", "trials.csv", "summary.json", "model/bundle.json")} <= keys
    assert f"{run}/model/model.safetensors" in keys and f"{run}/figures/pr_roc.png" in keys
    assert s3.get(f"{run}/sweep.jsonl").startswith(before["sweep.jsonl"])
    assert s3.get(f"{run}/encoder/seed-1/result.json") == before["encoder/seed-1/result.json"]
    assert s3.get(f"{run}/encoder/seed-1/tracking.jsonl") == told
    finished = Counter(event["trial"] for event in ended(s3.get(f"{run}/sweep.jsonl").decode()))
    assert finished == dict.fromkeys(range(NUM_TRIALS), 1)
    for key in keys:
        if key.endswith("/tracking.jsonl"):
            assert set(_told(s3.get(key).decode()).values()) <= {1}, key


# A classifier


def test_a_bundle_and_a_repeat_on_another_machine(home, s3, tmp_path):
    """Nothing is named but the bucket, by RAYMED_HOME."""
    import onnxruntime

    first = s3.env | {"RAYMED_HOME": f"{s3.url}/home"}
    other = first | {"RAYMED_LOCAL": str(tmp_path / "other")}
    home.run("train_classifier", *TRAIN, **first)
    shutil.rmtree(s3.local)

    bundle = f"{s3.url}/home/runs/one/seed-2023/bundle"
    output = home.run("export_model", f"--bundle={bundle}", f"--to={tmp_path}/model.onnx", **other)
    repeat = home.run("train_classifier", "--from-run=one", **other)

    assert "largest difference of a probability" in output
    assert onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()[0].name == "pixels"
    assert "repeat of one: equal (to the bit)" in repeat, repeat
    assert "home/runs/one-repeat/summary.json" in s3.keys()
    assert not list(home.storage.glob("runs/one*"))


def test_the_server_is_gone_when_the_job_ends(home, s3):
    """What was trained is kept here; the same command brings it up when the server is back."""
    steps = ("--method=asl", "--single.steps=200", "--single.evaluations=2", "--name=gone")
    command = (*TINY, *steps, f"--storage={s3.url}/gone")
    environment = s3.env | {"RAYMED_S3_PATIENCE": "6"}
    run, unit = "gone/runs/gone", working_copy(f"{s3.url}/gone/runs/gone/seed-2023")

    def told() -> Counter:
        return _told((unit / "tracking.jsonl").read_text())

    process = home.start("train_classifier", *command, **environment)
    # Of two checkpoints the first is there, so that the second is what waits.
    half = f"{run}/seed-2023/checkpoints/single/index.json"
    wait_for(lambda: half in s3.keys() or process.poll() is not None, 120, "a checkpoint in the bucket")
    s3.kill()
    began = time.monotonic()
    output, _ = process.communicate(timeout=120)
    ended = time.monotonic() - began

    assert process.returncode == 2, output
    [message] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "the same command brings" in message and str(unit.parent) in message and "Traceback" not in output, output
    assert ended < 40, output  # the patience counts once, not for everything that is still to be put
    assert told() == dict.fromkeys((("single/loss", step) for step in range(1, 201)), 1)

    s3.restart()
    home.run("train_classifier", *command, **environment)

    assert sum(told().values()) == 200
    assert s3.get(f"{run}/seed-2023/result.json") == (unit / "result.json").read_bytes()
    assert s3.get(f"{run}/seed-2023/tracking.jsonl") == (unit / "tracking.jsonl").read_bytes()
    assert {f"{run}/summary.json", f"{run}/seed-2023/bundle/model.safetensors"} <= set(s3.keys())
