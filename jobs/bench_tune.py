"""Benchmark: 96 ASL configurations x 3 seeds of a linear head, as banks of heads and as peers train them.

    python jobs/bench_tune.py --out bench_tune.json
    python jobs/bench_tune.py --part memory
    python jobs/bench_tune.py --blocks 2 --steps 20 --ray-trials 1        # does it work?

1. hsg, full-batch, minibatch: against a plain script that trains head after head with torch.optim.AdamW
   (bench_peers/plain_heads.py, which imports nothing from raymed), in this process, in turns; start-up apart. Of the
   288 heads the script trains a part in each turn, drawn anew, and its time is scaled up. The bank scores the
   validation split at its ten evaluations, the script never does. Each side has the number of threads, one or all,
   that suits it best.
2. ray: against a Ray Train run with one worker for each training (bench_peers/ray_train_heads.py), start-up of both
   included. A few are run and scaled up, as if all processors had one at work all the time.
3. memory: peak of a process that trains 32, 96 and 288 trials in generations of 32.

Nothing is timed before the weights of the same heads, after the last step, are equal to 1e-5. Heads with gamma_neg < 1
are timed but not compared: the slope of their loss jumps where a probability passes `clip`, so that the last bit of a
sum decides, and the script itself does not find the same weights (to 1e-4) when its rows are in another order. Features
and labels are drawn at random.
Figures are for a machine with nothing else to do.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from bench_peers.machine import environment
from bench_peers.plain_heads import Problem, train_head

from raymed.config import UserError, replace, to_json
from raymed.data.dataset import DataSet, load
from raymed.data.manifest import DataConfig
from raymed.models.encoder import EncoderConfig
from raymed.tasks.classifier import ClassifierRecipe
from raymed.train.compute import Compute
from raymed.train.engines.optim import schedule
from raymed.train.heads.bank import HeadBank, Replica
from raymed.train.loop import sampler_of
from raymed.train.nets import Networks

SEEDS = (1, 2, 3)
ASL = ("gamma_neg", "gamma_pos", "clip")
EQUAL = 1e-5
CHECKED = 8  # heads
GROWTH = 1.05  # of peak memory that counts as none
PARTS = ("hsg", "full-batch", "minibatch", "ray", "memory")


@dataclass(frozen=True)
class Size:
    """Of a problem."""

    num_train: int
    backbone: str
    features: int
    batch_size: int
    target: float
    """At least so many times faster than the script."""


SIZES = {
    "hsg": Size(328, "efficientnet_b0", 1280, 328, 15.0),
    "full-batch": Size(4708, "resnet_small", 128, 4708, 4.0),
    "minibatch": Size(4708, "resnet_small", 128, 256, 30.0),
}
RAY_TARGET = 20.0


@dataclass(frozen=True)
class BenchTune:
    """What to measure, and for how long."""

    part: Literal["all", "hsg", "full-batch", "minibatch", "ray", "memory"] = "all"
    blocks: int = 15
    """Turns of each side."""
    steps: int = 300
    """Of a head."""
    trials: int = 96
    generation: int = 32
    """Configurations in a bank."""
    share: int = 12
    """Heads that the script trains in a turn."""
    ray_trials: int = 9
    """Ray Train runs that are measured."""
    out: Path | None = None
    """Where the figures are written as JSON too."""
    child: Literal["", "sweep", "peak"] = ""
    """Used by the benchmark itself: what to do in a process of its own."""


class Sweep:
    """The same trainings for both sides: random features and configurations, a seed's own features for each seed."""

    def __init__(self, config: BenchTune, size: Size, folder: Path):
        rng = np.random.default_rng(0)
        self.config = config
        self.recipe = make_recipe(config, size, write_archive(folder, size.num_train, rng))
        self.data = load(self.recipe.data, folder / "cache")
        shift = self.data.labels[:, None] * rng.normal(0, 0.2, size.features)
        shape = len(SEEDS), len(self.data), size.features
        self.features = (rng.standard_normal(shape) + shift).astype(np.float32)
        self.replicas = [Replica(self.data, *each) for each in zip(self.features, SEEDS, strict=True)]
        draw = rng.uniform(0, 5, config.trials), rng.choice([0, 0.5, 1, 2], config.trials)
        self.asl = dict(zip(ASL, (*draw, rng.uniform(0.005, 0.2, config.trials)), strict=True))
        self.recipes = [
            replace(self.recipe, {f"losses.asl.{name}": float(values[k]) for name, values in self.asl.items()})
            for k in range(config.trials)
        ]

    def banks(self) -> Iterator[HeadBank]:
        """One bank a generation, trained to its end."""
        for first in range(0, len(self.recipes), self.config.generation):
            bank = HeadBank(self.recipes[first : first + self.config.generation], self.replicas, torch.device("cpu"))
            while not bank.finished:
                bank.advance()
            yield bank

    def train(self) -> None:
        """All heads."""
        for _ in self.banks():
            pass

    def weights(self) -> np.ndarray:
        """(S, K, D + 1) of all heads after their last step."""
        return np.concatenate([bank.optimizer.weights.numpy() for bank in self.banks()], axis=1)

    def export(self, path: Path) -> Problem:
        """What the peers read (see plain_heads.py): first weights and order are made here without a bank."""
        optim, steps = self.recipe.head.optim, self.config.steps
        rows = self.data.splits["train"]
        np.savez(
            path,
            features=self.features[:, rows],
            targets=self.data.labels[rows].astype(np.float32),
            order=np.stack([order_of(self.recipe, self.data, seed) for seed in SEEDS]),
            first=np.stack([first_weights(self.recipe, self.data, seed) for seed in SEEDS]),
            schedule=np.array([schedule(optim, step, steps) for step in range(steps)]),
            weight_decay=optim.weight_decay,
            max_norm=np.float64(optim.clip or np.inf),
            **self.asl,
        )
        return Problem(path)


def make_recipe(config: BenchTune, size: Size, manifest: Path) -> ClassifierRecipe:
    """A head as tune_asl trains it, but for these sizes."""
    changes: dict[str, Any] = {"head.steps": config.steps, "head.batch_size": size.batch_size}
    data = DataConfig(manifest=str(manifest), positive="positive", classes=("other", "positive"), deidentified=True)
    recipe = ClassifierRecipe(data=data, model=EncoderConfig(backbone=size.backbone))
    return replace(recipe, changes | {"head.evaluations": min(10, config.steps)})


def write_archive(folder: Path, num_train: int, rng: np.random.Generator) -> Path:
    """Noise images, a quarter of them positive, with a ninth as many for validation as for training."""
    arrays = {}
    for split, num in (("train", num_train), ("val", num_train // 9), ("test", 20)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (num, 8, 8), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(num) % 4 == 0).astype(np.uint8)[:, None]
    np.savez(folder / "noise.npz", **arrays)
    return folder / "noise.npz"


def order_of(recipe: ClassifierRecipe, data: DataSet, seed: int) -> np.ndarray:
    """(steps, B) places among the training rows; (steps, 0) where every batch is all of them."""
    phase = recipe.phases(data)[-1]
    if phase.batch_size == len(data.splits["train"]):
        return np.empty((phase.steps, 0), np.int64)
    sampler = sampler_of(phase, data, seed)
    drawn = np.stack([sampler.indices(step) for step in range(phase.steps)])
    return np.searchsorted(data.splits["train"], drawn)


def first_weights(recipe: ClassifierRecipe, data: DataSet, seed: int) -> np.ndarray:
    """(D + 1,) of the head that a unit would start from."""
    linear: Any = Networks(recipe.phases(data)[-1], seed, Compute(device="cpu")).module("head").linear
    return np.append(linear.weight.detach().numpy()[0], linear.bias.detach().numpy())


def main(config: BenchTune) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="bench-tune-") as scratch:
        if config.child:
            print(json.dumps(child(config, Path(scratch))))
            return
        figures: dict[str, Any] = {"environment": environment(), "config": dataclasses.asdict(config)}
        for part in PARTS if config.part == "all" else (config.part,):
            folder = Path(scratch, part)
            folder.mkdir()
            figures[part] = {"ray": against_ray, "memory": memory}.get(part, against_script)(config, part, folder)
            print(line(part, figures[part]), flush=True)
    if config.out:
        config.out.write_text(to_json(figures))


def against_script(config: BenchTune, part: str, folder: Path) -> dict[str, Any]:
    """The whole sweep as banks, and a part of it by the plain script, in turns."""
    sweep = Sweep(config, SIZES[part], folder)
    problem = sweep.export(folder / "problem.npz")
    heads = [(s, k) for s in range(len(SEEDS)) for k in range(config.trials)]
    rng = np.random.default_rng(1)

    def some(count: int) -> list[tuple[int, int]]:
        return [heads[i] for i in rng.permutation(len(heads))[:count]]

    smooth = [(s, k) for s, k in some(len(heads)) if sweep.asl["gamma_neg"][k] >= 1]
    difference = check_equal(sweep.weights(), smooth[:CHECKED], problem)
    sample = some(2)
    threads = {
        "bank": best_threads(lambda: next(sweep.banks())),
        "script": best_threads(lambda: script(problem, sample)),
    }
    seconds: dict[str, list[float]] = {"bank": [], "script": []}
    share = min(config.share, len(heads))
    for block in range(config.blocks):
        work = {"bank": sweep.train, "script": functools.partial(script, problem, some(share))}
        for name in ("bank", "script") if block % 2 else ("script", "bank"):
            with torch_threads(threads[name]):
                seconds[name].append(timed(work[name]) * (len(heads) / share if name == "script" else 1))
    ratio = summary(np.array(seconds["script"]) / np.array(seconds["bank"]), SIZES[part].target)
    return {"ratio": ratio, "seconds": seconds, "threads": threads, "largest difference": difference} | {
        "note": f"the script trained {share} of {len(heads)} heads in a turn, scaled up"
    }


def script(problem: Problem, heads: Sequence[tuple[int, int]]) -> None:
    """The plain script on these (seed, configuration)."""
    for seed, configuration in heads:
        train_head(problem, seed, configuration)


def check_equal(weights: np.ndarray, heads: Sequence[tuple[int, int]], problem: Problem) -> float:
    """Largest difference of the heads' weights, relative to the largest weight. Raises UserError above EQUAL."""
    differences = []
    for seed, configuration in heads:
        wanted = train_head(problem, seed, configuration).numpy()
        differences.append(float(np.abs(weights[seed, configuration] - wanted).max() / np.abs(wanted).max()))
    if not max(differences) <= EQUAL:
        raise UserError(f"the weights of both sides differ by {max(differences):.1e} after the last step")
    return max(differences)


def best_threads(work: Callable[[], Any]) -> int:
    """All processors, or one, whichever is faster."""
    seconds = {}
    for threads in {1, os.cpu_count() or 1}:
        with torch_threads(threads):
            work()
            seconds[threads] = min(timed(work) for _ in range(2))
    return min(seconds, key=lambda threads: seconds[threads])


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Within: torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def against_ray(config: BenchTune, part: str, folder: Path) -> dict[str, Any]:
    """Whole processes: one that trains all heads as banks; Ray Train runs for some of them, scaled up."""
    sweep = Sweep(config, SIZES["hsg"], folder)
    problem = sweep.export(folder / "problem.npz")
    num_heads, cpus = len(SEEDS) * config.trials, os.cpu_count() or 1
    command = [sys.executable, Path(__file__).parent / "bench_peers" / "ray_train_heads.py"]
    command += [folder / "problem.npz", folder]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    peer = subprocess.Popen(list(map(str, command)), stdin=pipe, stdout=pipe, stderr=null, text=True)
    try:
        start = answer(peer)["start_seconds"]
        runs, ours = [], []
        for number in range(config.ray_trials):
            seed, configuration = number % len(SEEDS), number * 7 % config.trials
            reply = answer(peer, f"{seed} {configuration}")
            if sweep.asl["gamma_neg"][configuration] >= 1:
                expected = train_head(problem, seed, configuration).numpy()
                if not np.allclose(reply["weights"], expected, atol=EQUAL * np.abs(expected).max()):
                    raise UserError("a head trained by Ray Train differs from that of the script")
            runs.append(reply["seconds"])
            ours.append(timed(lambda: run_child(config, "sweep", config.trials)))
    finally:
        peer.communicate(timeout=120)
    scaled = start + np.array(runs) * num_heads / cpus
    return {
        "ratio": summary(scaled / np.array(ours), RAY_TARGET),
        "seconds": {"bank": ours, "Ray Train run": runs, "start of Ray": start},
        "note": f"{len(runs)} of {num_heads} Ray Train runs measured, scaled up as if {cpus} were at work all the time",
    }


def answer(peer: subprocess.Popen, question: str | None = None) -> dict[str, Any]:
    """The peer's next line of JSON."""
    assert peer.stdin is not None and peer.stdout is not None
    if question is not None:
        peer.stdin.write(question + "\n")
        peer.stdin.flush()
    reply = peer.stdout.readline()
    if not reply:
        raise UserError(f"the peer ended with exit code {peer.wait()}")
    return json.loads(reply)


def memory(config: BenchTune, part: str, folder: Path) -> dict[str, Any]:
    """Peak memory of processes that train more and more trials."""
    counts = [config.generation * n for n in (1, 3, 9)]
    peaks = {str(trials): run_child(config, "peak", trials)["peak_mib"] for trials in counts}
    growth = peaks[str(counts[-1])] / peaks[str(counts[0])]
    return {
        "peak MiB by number of trials": peaks,
        "growth": growth,
        "target": f"at most {GROWTH:g}",
        "verdict": "met" if growth <= GROWTH else "not met",
    }


def run_child(config: BenchTune, what: str, trials: int) -> dict[str, Any]:
    """The same file in a new process."""
    options = {"child": what, "trials": trials, "steps": config.steps, "generation": config.generation}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(config: BenchTune, folder: Path) -> dict[str, Any]:
    """Train all trials; the peak of this process's resident memory."""
    import resource

    Sweep(config, SIZES["hsg"], folder).train()
    return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def summary(ratios: np.ndarray, target: float) -> dict[str, Any]:
    """Median with the half-width of its 95 % interval (bootstrap over blocks), and whether the target is met: resolved
    where the median is farther from it than the half-width."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    median, half_width = float(np.median(ratios)), float(high - low) / 2
    resolved = half_width < abs(median - target)
    return {
        "median": median,
        "half_width_95": half_width,
        "values": ratios.tolist(),
        "target": f"at least {target:g}",
        "verdict": ("met" if median >= target else "not met") if resolved else "not resolved",
    }


def line(part: str, figures: dict[str, Any]) -> str:
    """What people read."""
    if part == "memory":
        peaks = ", ".join(
            f"{trials} trials {mib:.0f} MiB" for trials, mib in figures["peak MiB by number of trials"].items()
        )
        return f"memory: {peaks}; growth {figures['growth']:.3f}, target {figures['target']}: {figures['verdict']}"
    ratio, seconds = figures["ratio"], figures["seconds"]
    times = ", ".join(f"{name} {np.median(value):.2f} s" for name, value in seconds.items())
    return (
        f"{part}: {ratio['median']:.1f} x faster (+- {ratio['half_width_95']:.1f}), target {ratio['target']}: "
        f"{ratio['verdict']}\n  {times}; {figures['note']}"
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(BenchTune, description=__doc__))
