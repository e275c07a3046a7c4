"""Benchmark: the training loop against a plain PyTorch one, and a sweep's trials against bare trainings.

    python jobs/bench_train.py --out bench_train.json

1. Steady-state throughput of one worker, by the torch engine and by DeepSpeed stage 0, over that of the peer
   (bench_peers/plain_training.py, which imports nothing from raymed): same model and first weights, images, batches,
   optimiser, schedule, clipping and average of weights; augmentation off. Both train in this process in turns of a few
   steps. Nothing is timed before losses, gradient-moved weights and averages of the first 20 steps are equal to 1e-5.
2. What a trial of a one-stage sweep takes beyond its bare training: Ray Tune trials in a reused actor, from the end of
   one to the end of the next, less the median time of the same unit trained alone here.

Figures are for a machine with nothing else to do.
"""

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_peers.machine import environment
from bench_peers.plain_training import PlainTraining
from torch import Tensor

from raymed.config import UserError, to_json
from raymed.data.augment import Augment
from raymed.data.dataset import DataSet, load
from raymed.data.manifest import DataConfig
from raymed.data.phantoms import write_hsg
from raymed.data.preprocess import Preprocess
from raymed.distributed import leave_group, world_size
from raymed.tasks.classifier import ClassifierRecipe, Stage
from raymed.tasks.task import Phase
from raymed.tracking.outbox import Outbox
from raymed.train.checkpoints.checkpoint import load_weights
from raymed.train.compute import Compute
from raymed.train.loop import Fit, sampler_of, take_step
from raymed.train.nets import Networks
from raymed.train.runs.job import RunConfig, open_job
from raymed.train.unit import Unit, train_unit
from raymed.tune.config import SweepConfig

SEED = 7
EQUAL_STEPS = 20
WARM_UP = 20
TARGET_RATIO = 0.97
TARGET_SECONDS = 0.5
ENGINES = {"torch": Compute(engine="torch"), "deepspeed stage 0": Compute(engine="deepspeed")}


@dataclass(frozen=True)
class BenchTrain:
    """How long to measure."""

    blocks: int = 15
    """Turns of each side."""
    steps: int = 20
    """Of a turn."""
    batch_size: int = 64
    size: int = 28
    """Side of an image in pixels."""
    trials: int = 12
    """Of the sweep; the first does not count."""
    trial_steps: int = 60
    threads: int = os.cpu_count() or 1
    """Of torch, in part 1. Trials and bare trainings have one."""
    out: Path | None = None
    """Where the figures are written as JSON too."""


@dataclass(frozen=True)
class BenchSweep:
    """The config of part 2's run."""

    recipe: ClassifierRecipe
    sweep: SweepConfig
    compute: Compute
    run: RunConfig


def main(config: BenchTrain) -> None:
    """Measure and print."""
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as scratch:
        folder = Path(scratch)
        recipe = make_recipe(config, write_hsg(folder / "hsg", num_patients=200, size=48))
        data = load(recipe.data, folder / "cache")
        figures: dict = {"environment": environment(), "config": dataclasses.asdict(config)}
        export(folder, data, phase_of(recipe, data, num_steps(config)))
        for name, compute in ENGINES.items():
            check_equal(folder, phase_of(recipe, data, EQUAL_STEPS), data, compute)
            figures[f"throughput, {name}"] = throughput(config, folder / name, folder, recipe, data, compute)
        leave_group()  # DeepSpeed's
        figures["overhead of a trial"] = overhead(config, folder, recipe)
    text = to_json(figures)
    print(text)
    if config.out:
        config.out.write_text(text)


def make_recipe(config: BenchTrain, manifest: Path) -> ClassifierRecipe:
    """Cross-entropy in one stage, no augmentation; everything else as a job has it."""
    preprocess = Preprocess(size=config.size)
    return ClassifierRecipe(
        data=DataConfig(manifest=str(manifest), positive="occluded", deidentified=True, preprocess=preprocess),
        method="ce",
        augment=Augment.none(),
        single=Stage(steps=config.trial_steps, batch_size=config.batch_size, evaluations=3),
    )


def phase_of(recipe: ClassifierRecipe, data: DataSet, steps: int) -> Phase:
    """The recipe's only phase, of so many steps and evaluated at its end."""
    (phase,) = recipe.phases(data)
    return dataclasses.replace(phase, steps=steps, evaluations=1)


def export(folder: Path, data: DataSet, phase: Phase) -> None:
    """What the peer reads."""
    batch = data.batch(np.arange(len(data)))
    assert batch.image is not None
    np.save(folder / "images.npy", batch.image.numpy())
    np.save(folder / "labels.npy", data.labels)
    sampler = sampler_of(phase, data, SEED)
    np.save(folder / "order.npy", np.stack([sampler.indices(step) for step in range(phase.steps)]))
    module = Networks(phase, SEED, Compute(device="cpu")).module("classifier")
    torch.save({peer_name(name): value for name, value in module.state_dict().items()}, folder / "weights.pt")
    network = phase.task.networks()["classifier"]
    assert network.optim is not None and network.ema is not None
    config = dataclasses.asdict(network.optim) | {"ema_decay": network.ema.decay}
    norm = "group" if any(isinstance(layer, torch.nn.GroupNorm) for layer in module.modules()) else "batch"
    config |= {"mean": data.preprocess.mean, "std": data.preprocess.std, "norm": norm}
    (folder / "config.json").write_text(json.dumps(config))


def peer_name(name: str) -> str:
    """The peer's name of one of our weights."""
    return name.removeprefix("encoder.net.").removeprefix("head.")


def check_equal(folder: Path, phase: Phase, data: DataSet, compute: Compute) -> None:
    """Losses of every step, and weights and averages after the last, to 1e-5 relative. Raises UserError otherwise."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        fit = Fit([phase], data, Path(place), SEED, compute, Outbox(Path(place, "outbox.jsonl")))
        list(fit.run())
        records = [r["values"] for r in fit.outbox.records() if r["op"] == "metrics"]  # type: ignore[union-attr]
        last = fit.checkpoints(phase.name).find("last")
        assert last is not None
        own, averages = (load_weights(last, averaged=averaged) for averaged in (False, True))
    peer = PlainTraining(folder, phase.steps)
    peer.train(phase.steps)
    losses = [r[f"{phase.name}/loss"] for r in records if f"{phase.name}/loss" in r]
    same("losses", [torch.tensor(losses)], [torch.tensor(peer.losses)])
    names = [name for name, _ in peer.model.named_parameters()]
    for what, weights, wanted in (("weights", own, peer.parameters), ("averages", averages, peer.ema)):
        found = {peer_name(name.removeprefix("classifier.")): value for name, value in weights.items()}
        same(what, [found[name] for name in names], wanted)


def same(what: str, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Raise UserError unless all numbers together are equal to 1e-5 relative."""
    a, b = (torch.cat([tensor.detach().flatten() for tensor in tensors]) for tensors in (found, wanted))
    difference = ((a - b).norm() / b.norm()).item()
    if not difference < 1e-5:
        raise UserError(f"the {what} of both loops differ by {difference:.1e}: no timing would mean anything")


class Turns:
    """In the place of the loop's `take_step`: every few steps each peer takes as many, and all are timed.

    All processes of a group begin every turn together.
    """

    def __init__(self, peers: Mapping[str, PlainTraining], steps: int):
        self.peers, self.steps, self.done = peers, steps, 0
        self.seconds: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        self.began = 0.0

    def __call__(self, *step: Any) -> dict[str, Tensor]:
        if self.done >= WARM_UP and (self.done - WARM_UP) % self.steps == 0:
            self._turn()
        self.done += 1
        return take_step(*step)

    def _turn(self) -> None:
        counts = self.done > WARM_UP
        if counts:
            self.seconds["ours"].append(self._now() - self.began)
        for name, peer in self.peers.items():
            began = self._now()
            peer.train(self.steps if counts else WARM_UP)
            if counts:
                self.seconds[name].append(self._now() - began)
        self.began = self._now()

    def _now(self) -> float:
        """The time when all that was asked for is done, everywhere."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if world_size() > 1:
            torch.distributed.barrier()
        return time.perf_counter()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within: fits of this process train in turns with the peers."""
        with mock.patch("raymed.train.loop.take_step", self):
            yield

    def speeds(self, images: int) -> dict[str, Any]:
        """Images a second of each side, at so many a turn."""
        return {f"{who}, images a second": images / statistics.median(s) for who, s in self.seconds.items()}

    def ratio(self, peer: str) -> np.ndarray:
        """Our speed over a peer's, turn by turn."""
        return np.array(self.seconds[peer]) / np.array(self.seconds["ours"])


def num_steps(config: Any) -> int:
    """Of a training with all its turns; the last turn ends before the last step."""
    return WARM_UP + config.blocks * config.steps + 1


def throughput(
    config: BenchTrain, folder: Path, exported: Path, recipe: ClassifierRecipe, data: DataSet, compute: Compute
) -> dict:
    """Images a second of both, and the ratio with its uncertainty."""
    phase = phase_of(recipe, data, num_steps(config))
    turns = Turns({"peer": PlainTraining(exported, phase.steps)}, config.steps)
    with turns.taken():
        list(Fit([phase], data, folder, SEED, compute, Outbox(folder / "outbox.jsonl")).run())
    speeds = turns.speeds(config.steps * config.batch_size)
    return speeds | {"ratio": summary(turns.ratio("peer"), TARGET_RATIO, "at least")}


def overhead(config: BenchTrain, folder: Path, recipe: ClassifierRecipe) -> dict:
    """Seconds of each trial beyond the same training alone."""
    from raymed.train.places.cluster import connected
    from raymed.tune.config import default_params, search_space
    from raymed.tune.journal import Journal
    from raymed.tune.sweep import template
    from raymed.tune.trials import Replicate, Trials, run_trials

    grace = recipe.single.evaluations + 1  # no trial is stopped early
    sweep = SweepConfig(num_trials=config.trials, grace=grace, space=("single.optim.lr=1e-3..4e-3",))
    space = search_space(recipe, sweep)
    compute = Compute(threads=1, engine="torch", device="cpu")
    run = RunConfig(name="bench", storage=str(folder / "storage"))
    torch.set_num_threads(1)
    with open_job("bench_train", BenchSweep(recipe, sweep, compute, run)) as job, connected(num_cpus=2):
        trials = Trials(template(job), (Replicate(f"seed-{SEED}", SEED),), sweep.metric)
        journal = Journal(job.folder / "sweep.jsonl")
        resources = {"cpu": 1.0, "gpu": 0.0}
        run_trials(job, sweep, space, default_params(recipe, space), journal, trials, 1, resources)
        units = [trials.units(number, journal.trials[number].params)[0] for number in range(config.trials)]
        ends = [(unit.folder / "result.json").stat().st_mtime for unit in units]
        alone = [timed_alone(dataclasses.replace(u, folder=folder / "alone" / str(k))) for k, u in enumerate(units)][1:]
        job.outbox.close("FINISHED")
    beyond = np.diff(ends) - statistics.median(alone)
    return {
        "bare training, seconds": statistics.median(alone),
        "trial, seconds": float(np.median(np.diff(ends))),
        "overhead, seconds": summary(beyond, TARGET_SECONDS, "at most"),
    }


def timed_alone(unit: Unit) -> float:
    """Seconds of a unit trained in this process."""
    began = time.perf_counter()
    train_unit(unit)
    return time.perf_counter() - began


def summary(values: np.ndarray, target: float, direction: str) -> dict:
    """Median with the half-width of its 95 % interval (bootstrap), and whether the target is met."""
    low, high = interval(values)
    met, missed = (low >= target, high < target) if direction == "at least" else (high <= target, low > target)
    verdict = "met" if met else "not met" if missed else "not resolved"
    return spread(values) | {"target": f"{direction} {target:g}", "verdict": verdict}


def spread(values: np.ndarray) -> dict:
    """Median with the half-width of its 95 % interval (bootstrap)."""
    low, high = interval(values)
    return {"median": float(np.median(values)), "half_width_95": (high - low) / 2, "values": values.tolist()}


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the median, by the bootstrap."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(BenchTrain, description=__doc__))
