"""The same recipe on 2 and 3 real gloo processes, under every engine, against one plain process.

All checks of one number of workers share its processes; what they leave on disk is compared here.

The built-in network is smooth, which is what lets runs agree to 1e-5: a ReLU switches where rounding differs (another
memory order in one plain process is enough), and from there two runs part, weights by 1e-4 after 16 steps.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from small import curve, join_group, load_data, make_fit, make_unit, recipe, write_images

from raymed.bundle import Bundle
from raymed.config import UserError, replace
from raymed.distributed import leave_group, world_size
from raymed.tasks.classifier import ClassifierRecipe, load_classifier
from raymed.tasks.task import Optim
from raymed.train import evaluate as evaluation
from raymed.train import pulse
from raymed.train.checkpoints.checkpoint import load_weights
from raymed.train.compute import Compute
from raymed.train.loop import Interrupted
from raymed.train.unit import UnitRun

STEPS = {"supcon": 16, "head": 34}
STOP = 11  # where an interrupted run stops: one process is asked after every step, several after 1, 11, 21, ...
COMPUTES = {
    "torch": Compute(engine="torch"),
    "zero0": Compute(engine="deepspeed", zero_stage=0),
    "zero1": Compute(engine="deepspeed", zero_stage=1, compile=True),
    "zero2": Compute(engine="deepspeed", zero_stage=2),
    "zero3": Compute(engine="deepspeed", zero_stage=3),
}
_SGD, _HEAD_SGD = Optim("sgd", lr=2e-2, weight_decay=1e-2, clip=0.1), Optim("sgd", lr=5e-2, clip=0.02)
RECIPES = {
    "adamw": {"model.norm": "group", "supcon.optim": Optim(lr=1e-3, clip=0.1), "head.optim": Optim(lr=5e-3, clip=0.02)},
    "sgd": {"model.norm": "group", "supcon.optim": _SGD, "head.optim": _HEAD_SGD},
    "batchnorm": {"supcon.optim": Optim(lr=3e-4, clip=0.1), "head.optim": Optim(lr=5e-3, clip=0.02)},
}
"""sgd shows a gradient of the wrong size, which Adam hides; its norm before clipping is compared too."""
RUNS = {
    2: ["torch-sgd", "zero0-adamw", "zero1-adamw", "zero2-adamw", "zero2-sgd", "zero2-batchnorm", "zero3-sgd"],
    3: ["torch-batchnorm", "zero2-sgd", "zero3-batchnorm"],
}
RESUMED = {2: ["zero3-adamw", "zero1-sgd"], 3: []}
"""What workers continue that one process began."""
STOPPED = {2: ["zero2-adamw", "zero1-sgd", "zero3-adamw"], 3: []}
"""What one process continues that workers began."""


def parity_recipe(manifest: Path, name: str) -> ClassifierRecipe:
    """50 steps in two phases, augmentation on, two micro-batches a step, clipping that bites."""
    short = {f"{phase}.evaluations": 1 for phase in STEPS} | {f"{phase}.steps": steps for phase, steps in STEPS.items()}
    return replace(recipe(manifest), short | RECIPES[name])


def train(manifest: Path, folder: Path, run: str, stops: bool = False) -> None:
    """A run ENGINE-RECIPE in a folder, new or begun, to its end or to STOP."""
    engine, name = run.split("-")
    asked, answer = iter(range(1, 1000)), 2 if world_size() > 1 else STOP
    fit = make_fit(
        parity_recipe(manifest, name), folder, COMPUTES[engine], interrupted=lambda: stops and next(asked) == answer
    )
    with suppress(Interrupted):
        list(fit.run())
    if stops:
        assert curve(folder)[-1][0] == STOP


def scores(manifest: Path, folder: Path) -> dict:
    """Split -> metrics, scores and rows of a finished run's best checkpoint."""
    fit = make_fit(parity_recipe(manifest, "batchnorm"), folder)
    networks, feed = fit.best()
    meters = {split: evaluation.evaluate(fit.phases[-1], networks, feed, split)["binary"] for split in ("train", "val")}
    return {split: (meter.compute(), meter.scores, meter.index) for split, meter in meters.items()}


def worker(rank: int, world: int, base: Path, manifest: Path) -> None:
    """One process: all runs of this number of workers."""
    folder = base / str(world)
    join_group(rank, world, folder)
    pulse._SECONDS = 1e9  # however slow the steps are
    for run in RUNS[world]:
        train(manifest, folder / run, run)
    for run in RESUMED[world]:
        train(manifest, folder / f"resumed-{run}", run)
    for run in STOPPED[world]:
        train(manifest, folder / f"stopped-{run}", run, stops=True)
    unit = UnitRun(make_unit(brief_recipe(manifest), folder / "unit"))
    list(unit.evaluations())
    record = {"result": unit.finish(), "refused": refusal(manifest, folder)}
    evaluation._BATCH = 8
    torch.save(record | {"scores": scores(manifest, base / "torch-batchnorm")}, folder / f"{rank}.pt")
    leave_group()


def brief_recipe(manifest: Path) -> ClassifierRecipe:
    """Two steps a phase."""
    changes = {f"{phase}.{name}": k for phase in STEPS for name, k in (("evaluations", 1), ("steps", 2))}
    return replace(recipe(manifest), changes)


def refusal(manifest: Path, folder: Path) -> str:
    """What is said of a batch that cannot be shared."""
    fit = make_fit(replace(parity_recipe(manifest, "adamw"), {"supcon.batch_size": 14}), folder / "odd")
    with pytest.raises(UserError) as error:
        list(fit.run())
    return str(error.value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(folder, manifest): every recipe trained by one plain process, whole and stopped."""
    base = tmp_path_factory.mktemp("plain")
    manifest = write_images(base)
    load_data(recipe(manifest))
    for name in RECIPES:
        train(manifest, base / f"torch-{name}", f"torch-{name}")
        if name != "batchnorm":
            train(manifest, base / f"stopped-torch-{name}", f"torch-{name}", stops=True)
    return base, manifest


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=lambda n: f"{n} workers")
def workers(request, plain):
    """(number of workers, their folder) after all their runs."""
    (base, manifest), world = plain, request.param
    folder = base / str(world)
    folder.mkdir()
    for run in RESUMED[world]:
        shutil.copytree(base / f"stopped-torch-{run.split('-')[1]}", folder / f"resumed-{run}")
    torch.multiprocessing.spawn(worker, args=(world, base, manifest), nprocs=world)
    return world, folder


def check_same(ours: Path, plain: Path) -> None:
    """Losses and gradient norms of all steps, weights and averages at the end of both phases: 1e-5 relative.

    Biases start at 0 and some stay there, since the next normalisation takes them away: 1e-6 absolute.
    """
    for (step, values), (plain_step, expected) in zip(curve(ours), curve(plain), strict=True):
        assert (step, values.keys()) == (plain_step, expected.keys())
        for name in expected:
            if name.endswith(("loss", "grad_norm")):
                assert values[name] == pytest.approx(expected[name], rel=1e-5), (step, name)
    for phase in STEPS:
        for averaged in (False, True):
            found, wanted = (load_weights(last(folder, phase), averaged=averaged) for folder in (ours, plain))
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                error, norm = (found[name] - tensor).double().norm(), tensor.double().norm()
                assert error < 1e-5 * norm + 1e-6, f"{phase}: {name} of norm {norm:.1e} differs by {error:.1e}"


def last(folder: Path, phase: str) -> Path:
    """The last checkpoint of a phase."""
    (found,) = [f for f in (folder / "checkpoints" / phase).glob("step-*") if f.name.endswith(f"{STEPS[phase]:06d}")]
    return found


def test_clipping_bites_and_the_run_learns(plain):
    for name in RECIPES:
        values = [v for _, v in curve(plain[0] / f"torch-{name}")]
        clipped = {"supcon": RECIPES[name]["supcon.optim"].clip, "head": RECIPES[name]["head.optim"].clip}
        for phase, clip in clipped.items():
            assert all(v[f"{phase}/grad_norm"] > clip for v in values if f"{phase}/loss" in v)
        losses = [v["supcon/loss"] for v in values if "supcon/loss" in v]
        assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.parametrize("run", sorted({run for runs in RUNS.values() for run in runs}))
def test_same_training_for_any_number_of_workers(run, workers, plain):
    world, folder = workers
    if run not in RUNS[world]:
        pytest.skip(f"left to another number of workers than {world}")
    check_same(folder / run, plain[0] / f"torch-{run.split('-')[1]}")


def test_workers_continue_what_one_process_began(workers, plain):
    world, folder = workers
    for run in RESUMED[world]:
        check_same(folder / f"resumed-{run}", plain[0] / f"torch-{run.split('-')[1]}")


def test_one_process_continues_what_workers_began(workers, plain):
    (world, folder), (base, manifest) = workers, plain
    for run in STOPPED[world]:
        name = run.split("-")[1]
        train(manifest, folder / f"stopped-{run}", f"torch-{name}")
        check_same(folder / f"stopped-{run}", base / f"torch-{name}")


def test_evaluation_has_the_same_bits(workers, plain, monkeypatch):
    (world, folder), (base, manifest) = workers, plain
    monkeypatch.setattr(evaluation, "_BATCH", 8)
    expected = scores(manifest, base / "torch-batchnorm")
    assert len(expected["train"][1]) > 8 * world  # several batches for each worker
    for rank in range(world):
        found = torch.load(folder / f"{rank}.pt", weights_only=False)["scores"]
        for split, (metrics, values, index) in expected.items():
            assert found[split][0] == metrics
            assert np.array_equal(found[split][1], values) and np.array_equal(found[split][2], index)


def test_workers_finish_a_unit(workers, plain):
    """Every worker gets the result; one of them writes the files."""
    (world, folder), (_, manifest) = workers, plain
    unit = make_unit(brief_recipe(manifest), folder / "unit")
    results = [torch.load(folder / f"{rank}.pt", weights_only=False)["result"] for rank in range(world)]
    assert all(json.dumps(result) == json.dumps(unit.result()) for result in results)  # NaN is not equal to itself
    assert unit.outbox.status() == "FINISHED" and load_classifier(Bundle.load(unit.folder / "bundle"))
    assert sum(r["op"] == "open" for r in unit.outbox.records()) == 1


def test_a_batch_that_cannot_be_shared_is_refused(workers):
    world, folder = workers
    message = f"supcon.batch_size (14) must be a multiple of accumulate x workers (2 x {world})"
    assert torch.load(folder / "0.pt", weights_only=False)["refused"] == message
