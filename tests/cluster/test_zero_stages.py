"""Every ZeRO stage, in fp32 and bf16, in one fit of two Ray Train workers against one plain process; and one run that
goes from a plain process through ZeRO-2 and ZeRO-3 back to a plain process, by its checkpoints."""

import shutil
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from raymed.config import replace
from raymed.data.dataset import load
from raymed.data.manifest import DataConfig
from raymed.data.phantoms import write_hsg
from raymed.data.preprocess import Preprocess
from raymed.models.encoder import EncoderConfig
from raymed.tasks.classifier import ClassifierRecipe, Stage
from raymed.tasks.task import Optim
from raymed.tracking.outbox import Outbox
from raymed.train.checkpoints.checkpoint import Checkpoints, load_weights
from raymed.train.compute import Compute
from raymed.train.loop import Fit

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CLIP, STEPS, EVERY = 0.02, 12, 3  # checkpoints lie EVERY steps
SGD = Optim("sgd", lr=3e-2, schedule="one_cycle", clip=CLIP)  # a wrong scale of the gradient would show
ADAMW = Optim("adamw", lr=1e-4, clip=CLIP)  # a state that was not restored would show
PRECISIONS = ("fp32", "bf16")
STAGES = {f"zero{stage}": {"zero_stage": stage} for stage in range(4)}
CASES = STAGES | {f"zero{stage}-offload": {"zero_stage": stage, "offload": True} for stage in (2, 3)}
RUNS = [(case, precision) for case in CASES for precision in PRECISIONS if case in STAGES or precision == "fp32"]
MOVES = {"torch": EVERY, "zero2": 2 * EVERY, "zero3": 3 * EVERY, "torch again": STEPS}
"""Where a run moves, and the step up to which it stays."""


def _recipe(manifest: Path, optim: Optim) -> ClassifierRecipe:
    """A binary classifier, whose head has a bias of 1: accumulation 2, clipping, augmentation on by default."""
    return ClassifierRecipe(
        data=DataConfig(manifest=str(manifest), positive="occluded", deidentified=True, preprocess=Preprocess(size=32)),
        model=EncoderConfig(norm="group"),
        method="asl",
        single=Stage(steps=STEPS, batch_size=16, accumulate=2, evaluations=STEPS // EVERY, optim=optim, ema_decay=0.9),
    )


def _compute(case: str, precision: str = "fp32") -> Compute:
    plain = Compute(threads=1, precision=precision)
    return replace(plain, {"workers": 2, "engine": "deepspeed"} | CASES[case]) if case in CASES else plain


def _train(root: Path, name: str, optim: Optim, compute: Compute, until: int = STEPS) -> None:
    """A run of that name, new or begun, up to a step."""
    recipe = _recipe(root / "hsg" / "manifest.csv", optim)
    data = load(recipe.data, root / "cache")
    fit = Fit(recipe.phases(data), data, root / name, 3, compute, Outbox(root / name / "outbox.jsonl"))
    with closing(fit.run()) as evaluations:
        next((evaluation for evaluation in evaluations if evaluation.step == until), None)


def _train_all(config: dict) -> None:
    """What the two workers do."""
    torch.set_num_threads(1)
    root = config["root"]
    for case, precision in RUNS:
        _train(root, f"{case} {precision}", SGD, _compute(case, precision))
    for case in ("zero2", "zero3"):
        _train(root, "moving", ADAMW, _compute(case), MOVES[case])
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            shutil.copytree(root / "moving", root / f"moved {case}")


@pytest.fixture(scope="module")
def root(ray_cluster, tmp_path_factory) -> Path:
    """The folder of all runs."""
    from ray import cloudpickle
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    root = tmp_path_factory.mktemp("stages")
    write_hsg(root / "hsg", num_patients=32, size=48)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for precision in PRECISIONS:
        _train(root, f"plain {precision}", SGD, _compute("plain", precision))
    _train(root, "still", ADAMW, _compute("plain"))
    _train(root, "moving", ADAMW, _compute("plain"), MOVES["torch"])
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    TorchTrainer(
        _train_all,
        train_loop_config={"root": root},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(root / "ray")),
    ).fit()
    _train(root, "moving", ADAMW, _compute("plain"))
    torch.set_num_threads(threads)
    return root


def _curve(folder: Path, name: str) -> np.ndarray:
    """Every step's value of "loss" or "grad_norm"."""
    records = [r for r in Outbox(folder / "outbox.jsonl").records() if r["op"] == "metrics"]
    values = {r["step"]: r["values"][f"single/{name}"] for r in records if f"single/{name}" in r["values"]}
    return np.array([values[step] for step in sorted(values)])


def _apart(ours: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative difference."""
    assert len(ours) == len(expected) == STEPS
    return float((np.abs(ours - expected) / np.abs(expected)).max())


def _distance(ours: Path, expected: Path, averaged: bool) -> float:
    """The largest over all tensors of the norm of the difference, relative to the norm, at the end."""
    folders = [Checkpoints(folder / "checkpoints" / "single").find("last") for folder in (ours, expected)]
    one, other = (load_weights(folder, averaged=averaged) for folder in folders if folder)
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}
    return max(((one[n] - other[n]).double().norm() / (other[n].double().norm() + 1e-6)).item() for n in one)


@pytest.mark.parametrize("case", CASES)
def test_fp32_is_the_plain_run(root, case):
    ours, plain = root / f"{case} fp32", root / "plain fp32"
    assert (_curve(plain, "grad_norm") > CLIP).all(), "clipping was not active"
    assert _apart(_curve(ours, "loss"), _curve(plain, "loss")) < 1e-5
    assert _apart(_curve(ours, "grad_norm"), _curve(plain, "grad_norm")) < 1e-5
    assert _distance(ours, plain, averaged=False) < 1e-5
    assert _distance(ours, plain, averaged=True) < 1e-5


@pytest.mark.parametrize("case", STAGES)
def test_bf16_is_autocast_over_fp32_weights(root, case):
    ours, plain, exact = root / f"{case} bf16", root / "plain bf16", root / "plain fp32"
    assert _apart(_curve(ours, "loss"), _curve(exact, "loss")) < 2e-2
    assert _apart(_curve(ours, "loss"), _curve(exact, "loss")) > 5e-5, "autocast is off"
    assert _distance(ours, plain, averaged=False) < 1e-2


def test_a_run_moves_between_engines_and_stages(root):
    moving, still = root / "moving", root / "still"
    for case in ("zero2", "zero3"):  # they stopped where they were to
        assert len(_curve(root / f"moved {case}", "loss")) == MOVES[case]
    assert _apart(_curve(moving, "loss"), _curve(still, "loss")) < 1e-5
    assert _apart(_curve(moving, "grad_norm"), _curve(still, "grad_norm")) < 1e-5
    for averaged in (False, True):
        assert _distance(moving, still, averaged) < 1e-5
