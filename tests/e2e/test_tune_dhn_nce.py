"""A contest of losses as a user runs it: killed in its middle and started again, it goes on and repeats nothing."""

import functools
import json
import signal
from pathlib import Path

import pytest
from home import Home, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_TRIALS = 3
SMALL = "--stage.steps=8 --stage.batch-size=16 --stage.evaluations=4 --sweep.grace=1".split()
SMALL += ["--losses.dhn-nce.temperature=0.2", "--compared", "info_nce", "dhn_nce"]
COMMAND = (*SMALL, f"--sweep.num-trials={NUM_TRIALS}", "--finals.seeds", "11", "12", "--name=contest")


def _run(home: Home, name: str = "contest") -> Path:
    return home.storage / "runs" / name


def _events(home: Home, loss: str, name: str = "contest") -> list[dict]:
    path = _run(home, name) / loss / "sweep.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _results(home: Home) -> dict[Path, int]:
    """What is written once and for all -> when."""
    return {path: path.stat().st_mtime_ns for path in _run(home).glob("**/result.json") if "tune" not in path.parts}


def _fields(config: dict, names) -> list:
    return [functools.reduce(lambda inner, part: inner[part], name.split("."), config) for name in names]


@pytest.fixture(scope="module")
def contest(home):
    """What stood there when the second search was killed, and the summary of the command that went on."""
    process = home.start("tune_dhn_nce", *COMMAND)
    ended = lambda: [event for event in _events(home, "dhn_nce") if "status" in event]  # noqa: E731
    wait_for(lambda: ended() or process.poll() is not None, 200, "end of a trial of the second search")
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, output
    home.end_all()
    wait_for(lambda: not home.processes(), 30, "end of Ray's processes")
    left = {"results": _results(home), "events": {loss: _events(home, loss) for loss in ("info_nce", "dhn_nce")}}
    output = home.run("tune_dhn_nce", *COMMAND)
    return left, json.loads(Path(output.strip().splitlines()[-1].removeprefix("summary: ")).read_text())


def test_nothing_that_was_finished_is_repeated(home, contest):
    left, _ = contest
    assert left["results"] and _results(home).items() >= left["results"].items()
    assert _events(home, "info_nce") == left["events"]["info_nce"]
    before = left["events"]["dhn_nce"]
    assert _events(home, "dhn_nce")[: len(before)] == before


def test_every_loss_is_searched_alike_from_the_recipe_as_it_stands(home, contest):
    summary = contest[1]
    assert {loss: found["num_trials"] for loss, found in summary["searches"].items()} == dict.fromkeys(
        ("info_nce", "dhn_nce"), NUM_TRIALS
    )
    for loss in ("info_nce", "dhn_nce"):
        chosen = {e["trial"]: e["params"] for e in _events(home, loss) if "params" in e}
        ended = {e["trial"]: e for e in _events(home, loss) if "status" in e}
        assert sorted(ended) == list(range(NUM_TRIALS)) and ended[0]["status"] == "finished"
        assert all(name.startswith((f"losses.{loss}.", "stage.optim.lr")) for name in chosen[0])
        assert list(chosen[0].values()) == _fields(summary["config"]["recipe"], chosen[0])
        best = max((e for e in ended.values() if e["status"] == "finished"), key=lambda e: (e["value"], -e["trial"]))
        assert summary["searches"][loss]["best_params"] == chosen[best["trial"]]
    paper = {"losses.dhn_nce.beta1", "losses.dhn_nce.beta2", "losses.dhn_nce.temperature"}
    assert paper < {name for e in _events(home, "dhn_nce") if "params" in e for name in e["params"]}


def test_finals_are_judged_against_the_first(home, contest):
    summary = contest[1]
    assert set(summary["figures"]) == {"info_nce", "dhn_nce", "dhn_nce as published"}
    assert set(summary["verdicts"]["test"]) == {"dhn_nce", "dhn_nce as published"}
    assert "it cannot be told which exceed noise" in summary["sentence"]  # two seeds
    for method, figures in summary["figures"].items():
        found = [
            json.loads((_run(home) / "finals" / method.replace(" ", "-") / f"seed-{seed}" / "result.json").read_text())
            for seed in (11, 12)
        ]
        mean = sum(result["test"]["mean_recall"] for result in found) / 2
        assert figures["test"]["mean_recall"]["mean"] == pytest.approx(mean, abs=1e-9)
    means = {method: figures["val"]["mean_recall"]["mean"] for method, figures in summary["figures"].items()}
    assert summary["best"] == max(means, key=means.__getitem__)
    page = (_run(home) / "report.html").read_text()
    assert "The search of dhn_nce" in page and "dhn_nce as published" in page


def test_trials_never_look_at_the_test_split(home, contest):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home.storage}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("raymed")
    trials = client.search_runs([experiment.experiment_id], "attributes.run_name LIKE 'trial-%'", max_results=100)
    assert len([run for run in trials if "seed" not in run.info.run_name]) == 2 * NUM_TRIALS
    assert not [name for run in trials for name in run.data.metrics if "test" in name]
    assert {run.info.status for run in trials} == {"FINISHED"}


def test_the_winner_is_registered_and_is_the_median_seed(home, contest):
    from mlflow import MlflowClient

    from raymed.bundle import Bundle

    summary = contest[1]
    client = MlflowClient(f"sqlite:///{home.storage}/mlflow/mlflow.db")
    (model,) = client.search_registered_models()
    assert model.name == summary["registered"]["name"]
    bundle = Bundle.load(Path(summary["paths"]["model"]))
    folder = _run(home) / "finals" / summary["best"].replace(" ", "-")
    values = {seed: json.loads((folder / f"seed-{seed}" / "result.json").read_text())["val"] for seed in (11, 12)}
    assert bundle.kind == "clip"
    assert bundle.provenance["seed"] == min(values, key=lambda seed: values[seed]["mean_recall"])
    own = json.loads((folder / f"seed-{bundle.provenance['seed']}" / "result.json").read_text())
    assert bundle.metrics["test"]["mean_recall"]["mean"] == pytest.approx(own["test"]["mean_recall"], abs=1e-9)


def test_on_two_workers_a_trial_reaches_what_it_reaches_on_one(home, contest):
    options = "--sweep.num-trials=1 --compute.workers=2 --finals.seeds 11 --register.no-register --name=workers".split()
    process = home.start("tune_dhn_nce", *SMALL[:-2], "info_nce", "dcl", *options)
    output, _ = process.communicate(timeout=540)
    assert process.returncode == 0, output

    alone, together = (
        {e["rung"]: e["value"] for e in _events(home, "info_nce", name) if "rung" in e and e["trial"] == 0}
        for name in ("contest", "workers")
    )
    assert together == pytest.approx(alone, abs=0.02) and len(together) == 4
    summary = json.loads((_run(home, "workers") / "summary.json").read_text())
    assert set(summary["figures"]) == {"info_nce", "dcl"} and set(summary["verdicts"]["test"]) == {"dcl"}
