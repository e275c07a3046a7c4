"""A sweep that is killed in its search and in its finals, and started again, goes on, and repeats nothing that is
finished. Kills in every phase: test_tune_asl_killed.py."""

import json
from collections import Counter
from pathlib import Path

import pytest
from home import Home
from sweeps import COMMAND, NUM_TRIALS, check_nothing_repeated, events, killed_sweep, run_folder

pytestmark = pytest.mark.ray


def _rungs(home: Home, name: str) -> dict[tuple[int, int], float]:
    return {(e["trial"], e["rung"]): e["value"] for e in events(home, name) if "rung" in e}


@pytest.fixture(scope="module")
def sweep(home):
    """What stood there after each kill, and what the last command printed."""
    return killed_sweep(home, ("heads", "finals"))


def test_the_kills_came_where_they_should(home, sweep):
    killed, _ = sweep
    assert 1 <= len([e for e in killed["heads"]["events"] if "status" in e])
    finals = [path for path in killed["finals"]["finished"] if "finals" in path.parts]
    assert 1 <= len(finals) < 4


def test_nothing_that_was_finished_is_repeated(home, sweep):
    check_nothing_repeated(home, sweep[0])


def test_every_trial_reports_every_rung_up_to_its_end(home, sweep):
    journal = events(home)
    reached = {n: [e["rung"] for e in journal if e["trial"] == n and "rung" in e] for n in range(NUM_TRIALS)}
    status = {e["trial"]: e["status"] for e in journal if "status" in e}
    for number, rungs in reached.items():
        assert rungs == list(range(1, len(rungs) + 1))
        assert (len(rungs) == 8) == (status[number] == "finished")
    assert status[0] == "finished" and Counter(status.values())["stopped"] >= 4


def test_mlflow_shows_one_sweep_with_its_trials_and_finals_all_finished(home, sweep):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home.storage}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("raymed")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    names = Counter(run.info.run_name for run in runs.values())
    encoders = [f"encoder/seed-{seed}" for seed in (1, 2, 11, 12)]
    summary = json.loads((run_folder(home) / "summary.json").read_text())
    methods = [method.replace(" ", "-") for method in summary["figures"]]
    finals = [f"finals/{method}-seed-{seed}" for method in methods for seed in (11, 12)]
    trials = [f"trial-{number:04d}" for number in range(NUM_TRIALS)]
    assert names == dict.fromkeys(["sweep", *encoders, *trials, *finals], 1)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    (sweep_id,) = (run_id for run_id, run in runs.items() if run.info.run_name == "sweep")
    parents = {run.data.tags.get("mlflow.parentRunId") for run_id, run in runs.items() if run_id != sweep_id}
    assert parents == {sweep_id}
    for run in runs.values():
        for metric in run.data.metrics:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
            assert len(steps) == len(set(steps)), (run.info.run_name, metric)


def test_trials_do_not_see_the_test_split(home, sweep):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home.storage}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("raymed")
    trials = client.search_runs([experiment.experiment_id], "attributes.run_name LIKE 'trial-%'")
    assert len(trials) == NUM_TRIALS
    assert not [name for run in trials for name in run.data.metrics if "test" in name]
    assert all("seed-1/val/auprc" in run.data.metrics and "val/auprc" in run.data.metrics for run in trials)


def test_the_report_is_complete(home, sweep):
    last = sweep[1].strip().splitlines()[-1]
    summary = json.loads(Path(last.removeprefix("summary: ")).read_text())

    assert summary["job"] == "tune_asl"
    assert summary["sweep"]["num_trials"] == NUM_TRIALS
    best = {e["trial"]: e["value"] for e in events(home) if e.get("status") == "finished"}
    rivals = {number: value for number, value in best.items() if number}
    finalist = f"trial {max(rivals, key=rivals.__getitem__)}"
    assert set(summary["figures"]) == {"default", finalist}
    means = {name: figure["val"]["auprc"]["mean"] for name, figure in summary["figures"].items()}
    assert summary["best"] == max(means, key=means.__getitem__)
    assert "cannot tell" in summary["sentence"]  # two seeds
    assert f"{NUM_TRIALS} configurations were tried" in summary["sentence"] and summary["test_openings"] == 1
    assert summary["inside"][finalist]["box_alignment"]["num_patients"] > 5
    page = (run_folder(home) / "report.html").read_text()
    assert summary["sentence"].split(";")[0][:60] in page and "2 generations of 6" in page
    figures = Path(summary["paths"]["figures"])
    for name in ("pr_roc", "calibration", "training", "grad_cam"):
        assert (figures / f"{name}.png").stat().st_size > 5000


def test_rays_own_tools_read_the_trials(home, sweep):
    ray_tune = pytest.importorskip("ray.tune")
    analysis = ray_tune.ExperimentAnalysis(str(run_folder(home) / "tune"))
    values = {e["trial"]: e["value"] for e in events(home) if "status" in e}
    assert len(analysis.trials) == NUM_TRIALS
    for trial in analysis.trials:
        assert trial.last_result["auprc"] <= values[int(trial.trial_id.removeprefix("trial-"))] + 1e-12


def test_the_winner_is_registered_once_and_gives_its_own_probabilities(home, sweep):
    import numpy as np
    from mlflow import MlflowClient

    from raymed.bundle import Bundle
    from raymed.tasks.predictor import Predictor

    summary = json.loads((run_folder(home) / "summary.json").read_text())
    client = MlflowClient(f"sqlite:///{home.storage}/mlflow/mlflow.db")
    (model,) = client.search_registered_models()
    assert model.name == summary["registered"]["name"]
    assert set(model.aliases) == {"candidate"}  # nobody has said what it is for
    assert len(client.search_model_versions(f"name='{model.name}'")) == 1
    bundle = Bundle.load(Path(summary["paths"]["model"]))
    method, seed = summary["best"].replace(" ", "-"), bundle.provenance["seed"]
    kept = np.load(run_folder(home) / "finals" / method / f"seed-{seed}" / "predictions.npz")
    from PIL import Image

    folder = home.storage / "phantoms" / "hsg-64"
    manifest = (folder / "manifest.csv").read_text().splitlines()
    column = manifest[0].split(",").index("image")
    paths = [folder / manifest[row].split(",")[column] for row in kept["test_rows"]]
    found = Predictor.from_bundle(bundle)([np.asarray(Image.open(path)) for path in paths])
    assert [p.raw_probability for p in found] == pytest.approx(kept["test_scores"].tolist(), abs=1e-6)


@pytest.mark.slow
def test_ordinary_tune_trials_reach_the_same_rungs(home, sweep):
    """The same configurations through Ray Tune, one trial an actor, cut by Ray's own scheduler."""
    replay = home.storage / "runs" / "replay"
    replay.mkdir()
    chosen = [event for event in events(home) if "params" in event]
    (replay / "sweep.jsonl").write_text("".join(json.dumps(event) + "\n" for event in chosen))
    options = ("--sweep.no-batched", "--sweep.at-once=2", "--finals.seeds", "11", "--register.no-register")
    home.run("tune_asl", *COMMAND[: COMMAND.index("--finals.seeds")], *options, "--name=replay")
    banked, alone = (_rungs(home, name) for name in ("sweep", "replay"))
    both = sorted(banked.keys() & alone.keys())
    assert len(both) >= 2 * NUM_TRIALS and {(n, r) for n, r in both if n == 0} == {(0, r) for r in range(1, 9)}
    assert [banked[key] for key in both] == pytest.approx([alone[key] for key in both], abs=1e-6)


def test_a_budget_that_is_used_up_ends_with_a_report(home, sweep):
    output = home.run("tune_asl", *COMMAND[:-1], "--name=short", "--time-budget=1s")

    assert "is not there any more" not in output, "a file that there is none of was to be uploaded"
    summary = json.loads(Path(output.strip().splitlines()[-1].removeprefix("summary: ")).read_text())
    assert summary["ended_early"] == "the time budget of 1s is used up (--time-budget)"
    assert summary["figures"] == {} and "cannot tell" in summary["sentence"]
    assert "used up" in (home.storage / "runs" / "short" / "report.html").read_text()
