"""Two Ray Train workers under DeepSpeed against one plain process: the same curve, the same weights."""

import dataclasses
import json
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from raymed.data.manifest import DataConfig
from raymed.data.phantoms import write_hsg
from raymed.data.preprocess import Preprocess
from raymed.models.encoder import EncoderConfig
from raymed.tasks.classifier import ClassifierRecipe, ContrastiveStage, Stage
from raymed.tasks.task import Optim
from raymed.train.checkpoints.checkpoint import Checkpoints, load_weights
from raymed.train.compute import Compute
from raymed.train.unit import SPLITS, Unit, UnitRun, predictions, train_unit

pytestmark = pytest.mark.ray
REPO = Path(__file__).resolve().parents[2]
CLIP = 0.02
OPTIMS = {
    "asl": Optim("sgd", lr=2e-2, schedule="one_cycle", clip=CLIP),  # a wrong scale of the gradient would show
    "supcon_asl": Optim("adamw", lr=1e-4, clip=CLIP),
}
NORMS = {"asl": "batch", "supcon_asl": "group"}
PHASES = {"asl": ("single",), "supcon_asl": ("supcon", "head")}


def _recipe(manifest: Path, method: str) -> ClassifierRecipe:
    """50 steps in all, accumulation 2, clipping; augmentation is on by default.

    The learning rates are gentle: with high ones the last bit of a sum, which depends on the shape of the batch, grows
    a hundredfold in ten steps, in one process too.
    """
    stage = Stage(steps=50, batch_size=16, accumulate=2, evaluations=2, optim=OPTIMS[method])
    preprocess = Preprocess(size=32)
    return ClassifierRecipe(
        data=DataConfig(manifest=str(manifest), positive="occluded", deidentified=True, preprocess=preprocess),
        model=EncoderConfig(norm=NORMS[method]),
        method=method,
        supcon=ContrastiveStage(steps=30, batch_size=16, accumulate=2, evaluations=2, optim=OPTIMS[method]),
        single=stage,
        head=dataclasses.replace(stage, steps=20),
    )


def _unit(folder: Path, cache: Path, recipe: ClassifierRecipe, compute: Compute) -> Unit:
    return Unit(recipe, 2023, folder, folder.name, folder.name, None, cache, compute)


@pytest.fixture(scope="module")
def units(ray_cluster, tmp_path_factory):
    """(method, "plain" | "stage 2") -> finished unit. All Ray Train ones come from a single `fit`. The other stages are
    compared in tests/train/engines/test_workers.py, where the processes are not Ray's."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    root = tmp_path_factory.mktemp("parity")
    manifest = write_hsg(root / "hsg", num_patients=60, size=48)
    sharded = Compute(workers=2, engine="deepspeed", zero_stage=2, threads=1)
    computes = {"plain": Compute(threads=1), "stage 2": sharded}
    units = {
        (method, where): _unit(root / f"{method} {where}", root / "cache", _recipe(manifest, method), compute)
        for method in ("asl", "supcon_asl")
        for where, compute in computes.items()
    }
    threads = torch.get_num_threads()
    for (_, where), unit in units.items():
        if where == "plain":
            train_unit(unit)
    torch.set_num_threads(threads)

    def train(config: dict) -> None:
        for unit in config["units"]:
            run = UnitRun(unit)
            list(run.evaluations())
            run.finish()

    TorchTrainer(
        train,
        train_loop_config={"units": [unit for (_, where), unit in units.items() if where != "plain"]},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(root / "ray")),
    ).fit()
    return units


def _curve(unit: Unit, name: str) -> np.ndarray:
    """Every step's value of "loss" or "grad_norm", over all phases."""
    records = [r for r in unit.outbox.records() if r["op"] == "metrics"]
    values = {r["step"]: r["values"][key] for r in records for key in r["values"] if key.endswith(f"/{name}")}
    return np.array([values[step] for step in sorted(values)])


@pytest.mark.parametrize("method", ["asl", "supcon_asl"])
def test_two_workers_give_the_curve_and_the_weights_of_one_process(units, method):
    plain, ours = units[method, "plain"], units[method, "stage 2"]

    loss, expected = _curve(ours, "loss"), _curve(plain, "loss")

    assert len(expected) == 50
    assert (_curve(ours, "grad_norm") > CLIP).all(), "clipping was not active"
    assert (np.abs(loss - expected) / np.abs(expected)).max() < 1e-5
    for phase in PHASES[method]:
        assert _distance(plain, ours, phase) < 1e-5
    for split in SPLITS:
        np.testing.assert_allclose(predictions(ours, split)["scores"], predictions(plain, split)["scores"], atol=1e-6)
        ranked = [{m: u.result()[split][m] for m in ("auroc", "auprc", "accuracy", "f1")} for u in (plain, ours)]
        assert ranked[0] == ranked[1]


def _distance(one: Unit, other: Unit, phase: str) -> float:
    """Norm of the difference of all weights at the end of a phase, relative to the norm of the weights."""
    folders = [Checkpoints(unit.folder / "checkpoints" / phase).find("last") for unit in (one, other)]
    a, b = (load_weights(folder, averaged=False) for folder in folders)
    a, b = (torch.cat([weights[name].double().flatten() for name in sorted(weights)]) for weights in (a, b))
    return ((a - b).norm() / a.norm()).item()


def test_a_job_on_two_workers(ray_cluster, monkeypatch, capsys, tmp_path):
    """What `python jobs/train_classifier.py --compute.workers 2` does, in a cluster that is there already."""
    from mlflow import MlflowClient

    small = "--data.preprocess.size=32 --single.batch-size=32 --single.steps=12 --single.evaluations=3"
    arguments = ["--method=asl", f"--storage={tmp_path}", "--name=two", "--compute.workers=2", "--compute.zero-stage=1"]
    monkeypatch.setattr(sys, "argv", ["train_classifier.py", *small.split(), *arguments])

    runpy.run_path(str(REPO / "jobs" / "train_classifier.py"), run_name="__main__")

    said = capsys.readouterr().out
    assert said.strip().splitlines()[-1] == f"summary: {tmp_path}/runs/two/summary.json"
    figures = json.loads((tmp_path / "runs" / "two" / "summary.json").read_text())["figures"]["asl"]
    result = json.loads((tmp_path / "runs" / "two" / "seed-2023" / "result.json").read_text())
    assert figures["test"]["auroc"]["mean"] == pytest.approx(result["test"]["auroc"])
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("raymed").experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {"two": "FINISHED", "seed-2023": "FINISHED"}
    losses = client.get_metric_history(runs["seed-2023"].info.run_id, "single/loss")
    assert [point.step for point in losses] == list(range(1, 13))
    assert runs["seed-2023"].data.metrics["final/test/auroc"] == result["test"]["auroc"]
    assert runs["seed-2023"].data.params["compute.workers"] == "2"


@pytest.mark.parametrize(
    ("job", "arguments", "expected"),
    [
        ("tune_asl", ["--compute.cpus-per-worker=64"], "this needs 1 x 64 CPUs, 0 GPUs at a time, and the cluster"),
        ("compare_losses", ["--compute.cpus-per-worker=64"], "this needs 1 x 64 CPUs"),
        ("train_classifier", ["--compute.workers=64"], "this needs 64 x 1 CPUs"),
        ("train_classifier", ["--compute.cpus-per-worker=64"], "this needs 1 x 64 CPUs"),
        ("tune_asl", ["--compute.workers=2"], "tune_asl trains many models side by side, each on one worker"),
        ("tune_asl", ["--compute.workers=2", "--method=asl"], "leave --compute.workers at 1"),
        ("compare_losses", ["--compute.workers=2"], "compare_losses trains many models side by side"),
    ],
)
def test_what_the_cluster_cannot_do_is_said_at_once(
    ray_cluster, monkeypatch, capsys, tmp_path_factory, job, arguments, expected
):
    storage = tmp_path_factory.getbasetemp() / "preflight"  # one for all: the images are decoded once
    monkeypatch.setenv("RAY_ADDRESS", "here")  # as `ray job submit` does; Ray is up already
    monkeypatch.setattr(sys, "argv", [f"{job}.py", f"--storage={storage}", "--data.preprocess.size=32", *arguments])

    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO / "jobs" / f"{job}.py"), run_name="__main__")

    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert expected in said and "Traceback" not in said
    assert time.monotonic() - began < 60, "it waited for what cannot come"
    assert not list((storage / "runs").glob("**/result.json"))
