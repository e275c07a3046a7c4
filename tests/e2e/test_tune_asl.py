"""A sweep that is killed half-way and started again, with another comment in its source, goes on."""

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from home import TINY, wait_for

pytestmark = pytest.mark.ray
NUM_TRIALS = 8
COMMAND = (*TINY, f"--sweep.num-trials={NUM_TRIALS}", "--sweep.at-once=2", "--name=sweep")


def _events(home) -> list[dict]:
    path = home.storage / "runs" / "sweep" / "sweep.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _ended(home) -> list[int]:
    return [event["trial"] for event in _events(home) if "status" in event]


def _results(home) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (home.storage / "runs" / "sweep").glob("**/result.json")}


@pytest.fixture(scope="module")
def sweep(home):
    """The sweep, killed after two trials and finished by the second command: what stood there at the kill."""
    first = home.start("tune_asl", *COMMAND)
    wait_for(lambda: len(_ended(home)) >= 2 or first.poll() is not None, 180, "two ended trials")
    first.send_signal(signal.SIGKILL)
    output, _ = first.communicate(timeout=30)
    assert first.returncode == -signal.SIGKILL, output
    wait_for(lambda: not home.processes(), 30, "end of Ray's processes after that of their driver")
    killed = {"ended": _ended(home), "results": _results(home), "events": _events(home)}
    home.edit_source()
    killed["output"] = home.run("tune_asl", *COMMAND)
    return killed


def test_the_kill_came_half_way(sweep):
    assert 2 <= len(sweep["ended"]) < NUM_TRIALS
    assert any("/encoder/" in str(path) for path in sweep["results"])


def test_every_trial_ends_once_and_no_finished_one_is_repeated(home, sweep):
    assert Counter(_ended(home)) == dict.fromkeys(range(NUM_TRIALS), 1)
    assert _events(home)[: len(sweep["events"])] == sweep["events"]
    now = _results(home)
    done = {path: time for path, time in sweep["results"].items() if _is_done(path, sweep["ended"])}
    assert done
    assert {path: now[path] for path in done} == done


def _is_done(path: Path, ended: list[int]) -> bool:
    return "encoder" in path.parts or any(f"trial-{number:04d}" in path.parts for number in ended)


def test_every_trial_reports_every_rung_up_to_its_end(home, sweep):
    events = _events(home)
    for number in range(NUM_TRIALS):
        rungs = [event["rung"] for event in events if event["trial"] == number and "rung" in event]
        assert rungs == list(range(1, len(rungs) + 1)) and rungs


def test_mlflow_shows_one_sweep_with_nested_trials_and_seeds_all_finished(home, sweep):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home.storage}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("raymed")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    names = Counter(run.info.run_name for run in runs.values())
    trials = [f"trial-{number:04d}" for number in range(NUM_TRIALS)]
    expected = dict.fromkeys(["encoder/seed-2023", *trials], "sweep") | {f"{t}-seed-2023": t for t in trials}
    assert names == dict.fromkeys(["sweep", *expected], 1)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    tags = {run.info.run_name: run.data.tags for run in runs.values() if run.info.run_name != "sweep"}
    assert {name: runs[tag["mlflow.parentRunId"]].info.run_name for name, tag in tags.items()} == expected
    for run in runs.values():
        for metric in run.data.metrics:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
            assert len(steps) == len(set(steps)), (run.info.run_name, metric)


def test_the_report_is_complete(home, sweep):
    last = sweep["output"].strip().splitlines()[-1]
    summary = json.loads(Path(last.removeprefix("summary: ")).read_text())

    assert summary["job"] == "tune_asl"
    assert summary["sweep"]["num_trials"] == NUM_TRIALS
    finished = {e["trial"]: e["value"] for e in _events(home) if e.get("status") == "finished"}
    assert summary["sweep"]["best_trial"] == max(finished, key=finished.__getitem__)
    assert summary["best"] == f"trial {summary['sweep']['best_trial']}"
    assert set(summary["sweep"]["best_params"]) >= {"losses.asl.gamma_neg", "losses.asl.clip"}
    assert 0 <= summary["figures"][summary["best"]]["test"]["auroc"]["mean"] <= 1
    assert (Path(summary["paths"]["model"]) / "model.safetensors").is_file()
    figures = Path(summary["paths"]["figures"])
    for name in ("sweep", "pr_roc", "calibration", "training", "grad_cam"):
        assert (figures / f"{name}.png").stat().st_size > 5000
