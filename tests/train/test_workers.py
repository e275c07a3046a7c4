"""The same recipe on 2 and 3 real gloo processes, under every engine, against one plain process.

All checks of one number of workers share its processes; what they leave on disk is compared here. Float rounding alone
(another memory order in one plain process) moves these weights by up to 5e-6: ReLUs switch, and the gradients of biases
in front of a normalisation cancel. A wrong scale, order or restored state shows at 1e-3 and above.
"""

import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small import curve, load_data, make_fit, recipe, write_images

from raymed.config import replace
from raymed.tasks.classifier import ClassifierRecipe
from raymed.tasks.task import Optim
from raymed.train import evaluate as evaluation
from raymed.train.checkpoint import load_weights
from raymed.train.compute import Compute
from raymed.train.loop import Interrupted

STEPS, STOP = 25, 20  # steps of each of the two phases; where an interrupted run stops in the first
COMPUTES = {
    "torch": Compute(engine="torch"),
    "zero0": Compute(engine="deepspeed", zero_stage=0),
    "zero1": Compute(engine="deepspeed", zero_stage=1),
    "zero2": Compute(engine="deepspeed", zero_stage=2),
}
RECIPES = {
    "adamw": {"supcon.optim": Optim(lr=3e-4, clip=0.5), "head.optim": Optim(lr=5e-3, clip=0.05)},
    "sgd": {
        "model.norm": "group",
        "supcon.optim": Optim("sgd", lr=2e-2, weight_decay=1e-2, clip=0.4),
        "head.optim": Optim("sgd", lr=5e-2, weight_decay=1e-2, clip=0.05),
    },
}
"""adamw: batch normalisation over all workers. sgd: what shows a gradient of the wrong size, that Adam hides."""
RUNS = {
    2: ["torch-adamw", "zero0-adamw", "zero1-adamw", "zero2-adamw", "zero0-sgd", "zero2-sgd"],
    3: ["torch-sgd", "zero1-sgd", "zero2-adamw"],
}
RESUMED = {2: ["zero2-adamw", "zero1-sgd"], 3: ["zero0-adamw"]}
STOPPED = {2: ["zero2-adamw", "zero1-sgd"], 3: ["torch-sgd"]}


def parity_recipe(manifest: Path, name: str) -> ClassifierRecipe:
    """50 steps in two phases, augmentation on, two micro-batches a step, clipping that bites."""
    short = recipe(manifest, supcon__evaluations=1, supcon__steps=STEPS, head__evaluations=1, head__steps=STEPS)
    return replace(short, RECIPES[name])


def train(manifest: Path, folder: Path, run: str, stop: int | None = None) -> None:
    """A run ENGINE-RECIPE in a folder, new or begun; at most `stop` steps."""
    engine, name = run.split("-")
    asked = iter(range(1, 1000))
    fit = make_fit(parity_recipe(manifest, name), folder, COMPUTES[engine], interrupted=lambda: next(asked) == stop)
    with suppress(Interrupted):
        list(fit.run())


def scores(manifest: Path, folder: Path) -> dict:
    """Split -> metrics, scores and rows of a finished run's best checkpoint."""
    fit = make_fit(parity_recipe(manifest, "adamw"), folder)
    networks, feed = fit.best()
    meters = {split: evaluation.evaluate(fit.phases[-1], networks, feed, split)["binary"] for split in ("train", "val")}
    return {split: (meter.compute(), meter.scores, meter.index) for split, meter in meters.items()}


def worker(rank: int, world: int, base: Path, manifest: Path) -> None:
    """One process: all runs of this number of workers."""
    torch.set_num_threads(1)
    folder = base / str(world)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for run in RUNS[world]:
        train(manifest, folder / run, run)
    for run in RESUMED[world]:
        train(manifest, folder / f"resumed-{run}", run)
    for run in STOPPED[world]:
        train(manifest, folder / f"stopped-{run}", run, STOP)
    evaluation._BATCH = 8
    torch.save(scores(manifest, base / "torch-adamw"), folder / f"scores-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(folder, manifest): every recipe trained by one plain process, whole and stopped."""
    base = tmp_path_factory.mktemp("plain")
    manifest = write_images(base)
    load_data(recipe(manifest))
    for name in RECIPES:
        train(manifest, base / f"torch-{name}", f"torch-{name}")
        train(manifest, base / f"stopped-torch-{name}", f"torch-{name}", STOP)
    return base, manifest


@pytest.fixture(scope="module", params=[2, 3], ids=lambda world: f"{world} workers")
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
    """Losses of all steps, gradient norms, and weights and averages at the end of both phases."""
    for (step, values), (plain_step, expected) in zip(curve(ours), curve(plain), strict=True):
        assert (step, values.keys()) == (plain_step, expected.keys())
        for name in expected:
            if name.endswith(("loss", "grad_norm")):
                tolerance = 1e-5 if name.endswith("loss") else 1e-3
                assert values[name] == pytest.approx(expected[name], rel=tolerance), (step, name)
    for phase in ("supcon", "head"):
        for averaged in (False, True):
            found, wanted = (load_weights(last(folder, phase), averaged=averaged) for folder in (ours, plain))
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            a, b = (torch.cat([w[k].flatten().double() for k in sorted(w)]) for w in (found, wanted))
            assert (a - b).norm() < 1e-5 * b.norm()


def last(folder: Path, phase: str) -> Path:
    """The last checkpoint of a phase."""
    (found,) = [f for f in (folder / "checkpoints" / phase).glob("step-*") if f.name.endswith(f"{STEPS:06d}")]
    return found


def test_clipping_bites_and_the_run_learns(plain):
    for name in RECIPES:
        values = [v for _, v in curve(plain[0] / f"torch-{name}")]
        clipped = {"supcon": RECIPES[name]["supcon.optim"].clip, "head": RECIPES[name]["head.optim"].clip}
        for phase, clip in clipped.items():
            assert np.mean([v[f"{phase}/grad_norm"] > clip for v in values if f"{phase}/loss" in v]) > 0.9
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
    expected = scores(manifest, base / "torch-adamw")
    assert len(expected["train"][1]) > 8 * world  # several batches for each worker
    for rank in range(world):
        found = torch.load(folder / f"scores-{rank}.pt", weights_only=False)
        for split, (metrics, values, index) in expected.items():
            assert found[split][0] == metrics
            assert np.array_equal(found[split][1], values) and np.array_equal(found[split][2], index)
