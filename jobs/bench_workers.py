"""Benchmark: two workers under each ZeRO stage against plain torch DDP, and what they say to each other.

    python jobs/bench_workers.py --out bench_workers.json

Two processes train in turns of a few steps: our loop on the engine measured, torch's DistributedDataParallel
(bench_peers/plain_ddp.py) and, for a ZeRO stage, DeepSpeed driven by hand at the same stage
(bench_peers/plain_deepspeed.py). The peers import nothing from raymed. Same model and first weights, images, global
batches, optimiser, schedule, clipping and average of weights; group normalisation, since DDP has no global batch
normalisation on a CPU. Nothing is timed before losses and weights of the first 20 steps are equal to 1e-5.

The ratio to DDP says what ZeRO costs (its memory is what it buys: `--plan` of any job), that to DeepSpeed what our loop
adds. Bytes sent and seconds in collectives are those of some steps more; with them and the links of
`raymed.train.plans.scaling` follows how 16 and 128 GPUs would do, each with the share of the batch that was measured.

On a machine with two GPUs the workers have one each (NCCL), otherwise they are on the CPU (gloo). Figures are for a
machine with nothing else to do.
"""

import dataclasses
import json
import os
import socket
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from bench_peers.machine import environment
from bench_peers.plain_ddp import PlainDDP
from bench_peers.plain_deepspeed import PlainDeepSpeed
from bench_train import (
    EQUAL_STEPS,
    SEED,
    TARGET_RATIO,
    BenchTrain,
    Turns,
    export,
    make_recipe,
    num_steps,
    peer_name,
    phase_of,
    same,
    spread,
    summary,
)

from raymed.config import replace, to_json
from raymed.data.dataset import DataSet, load
from raymed.data.phantoms import write_hsg
from raymed.distributed import leave_group
from raymed.ledger import COMMUNICATION, Ledger
from raymed.random import derive
from raymed.tasks.classifier import ClassifierRecipe
from raymed.tasks.task import Phase, Step
from raymed.tracking.outbox import Outbox
from raymed.train.checkpoints.checkpoint import load_weights
from raymed.train.communication import measured_communication
from raymed.train.compute import Compute
from raymed.train.evaluate import Feed, shard
from raymed.train.loop import Fit, sampler_of, take_step
from raymed.train.nets import Networks
from raymed.train.plans.scaling import projections, ring

WORKERS = 2
LISTENED_STEPS = 20


@dataclass(frozen=True)
class BenchWorkers:
    """How long to measure."""

    engines: tuple[Literal["torch", "0", "1", "2", "3"], ...] = ("torch", "0", "1", "2", "3")
    """Plain torch, and the stages of ZeRO."""
    blocks: int = 15
    """Turns of each side."""
    steps: int = 10
    """Of a turn."""
    equal_steps: int = EQUAL_STEPS
    """In which all must agree before anything is timed."""
    batch_size: int = 64
    """Global."""
    size: int = 28
    """Side of an image in pixels."""
    threads: int = max(1, (os.cpu_count() or 1) // WORKERS)
    """Of torch, for each worker."""
    out: Path | None = None
    """Where the figures are written as JSON too."""


def main(config: BenchWorkers) -> None:
    """Measure and print."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < WORKERS:
        print(f"{gpus} GPU for {WORKERS} workers, and NCCL wants one for each: measured on the CPU", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-workers-") as scratch:
        folder = Path(scratch)
        recipe, data = _recipe_and_data(config, folder)
        export(folder, data, phase_of(recipe, data, num_steps(config)))
        figures: dict[str, Any] = {"environment": environment(), "config": dataclasses.asdict(config)}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(work, (config, folder, port, gpus >= WORKERS), nprocs=WORKERS)
        figures |= json.loads((folder / "figures.json").read_text())
    text = to_json(figures)
    print(text)
    if config.out:
        config.out.write_text(text)


def _recipe_and_data(config: BenchWorkers, folder: Path) -> tuple[ClassifierRecipe, DataSet]:
    manifest = write_hsg(folder / "hsg", num_patients=200, size=48)
    recipe = make_recipe(BenchTrain(size=config.size, batch_size=config.batch_size), manifest)
    recipe = replace(recipe, {"model.norm": "group"})
    return recipe, load(recipe.data, folder / "cache")


def work(rank: int, config: BenchWorkers, folder: Path, port: int, on_gpus: bool) -> None:
    """One worker: all engines, one after the other."""
    torch.set_num_threads(config.threads)
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)  # DeepSpeed's calls of torch
    os.environ["LOCAL_RANK"] = str(rank)
    if on_gpus:
        torch.cuda.set_device(rank)
    import deepspeed  # noqa: F401 # before there is a group, see raymed.distributed

    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=where, rank=rank, world_size=WORKERS)
    recipe, data = _recipe_and_data(config, folder)
    figures = {}
    for name in config.engines:
        bench = Bench(config, folder, recipe, data, name, "cuda" if on_gpus else "cpu")
        bench.check_equal()
        figures[bench.title] = bench.throughput() | bench.communication()
    if rank == 0:
        (folder / "figures.json").write_text(to_json(figures))
    leave_group()


@dataclass
class Bench:
    """One engine on this worker."""

    config: BenchWorkers
    folder: Path
    recipe: ClassifierRecipe
    data: DataSet
    engine: str
    device: Literal["cpu", "cuda"]

    @property
    def title(self) -> str:
        """What figures stand under."""
        return "plain torch" if self.engine == "torch" else f"ZeRO stage {self.engine}"

    @property
    def compute(self) -> Compute:
        """Ours."""
        stage = 0 if self.engine == "torch" else int(self.engine)
        engine = "torch" if self.engine == "torch" else "deepspeed"
        return Compute(workers=WORKERS, engine=engine, zero_stage=stage, device=self.device)

    def peers(self, steps: int) -> dict[str, PlainDDP | PlainDeepSpeed]:
        """Fresh ones, for a schedule of so many steps."""
        peers: dict[str, PlainDDP | PlainDeepSpeed] = {"DDP": PlainDDP(self.folder, steps, self.device)}
        if self.engine != "torch":
            peers["DeepSpeed by hand"] = PlainDeepSpeed(self.folder, steps, int(self.engine), self.device)
        return peers

    def fit(self, phase: Phase, what: str) -> Fit:
        """Ours, in a folder of its own."""
        folder = self.folder / f"{what}-{self.engine}"
        return Fit([phase], self.data, folder, SEED, self.compute, Outbox(folder / "outbox.jsonl"))

    def check_equal(self) -> None:
        """Losses of every step and weights after the last, to 1e-5 relative. Raises UserError otherwise."""
        phase = phase_of(self.recipe, self.data, self.config.equal_steps)
        fit = self.fit(phase, "equal")
        list(fit.run())
        for name, peer in self.peers(phase.steps).items():
            peer.train(phase.steps)
            weights = peer.whole()
            if dist.get_rank() == 0:
                _compare(f"with {name}", fit, phase, peer, weights)
        dist.barrier()

    def throughput(self) -> dict[str, Any]:
        """Images a second of all sides, and our ratio to each peer."""
        phase = phase_of(self.recipe, self.data, num_steps(self.config))
        turns = Turns(self.peers(phase.steps), self.config.steps)
        with turns.taken():
            list(self.fit(phase, "timed").run())
        figures = turns.speeds(self.config.steps * self.config.batch_size)
        figures["ratio to DDP"] = spread(turns.ratio("DDP"))
        if self.engine != "torch":
            figures["ratio to DeepSpeed by hand"] = summary(turns.ratio("DeepSpeed by hand"), TARGET_RATIO, "at least")
        return figures

    def communication(self) -> dict[str, Any]:
        """Bytes sent and seconds of a step in collectives, and the projection to many GPUs."""
        phase = phase_of(self.recipe, self.data, 2 * LISTENED_STEPS)
        networks = Networks(phase, SEED, self.compute)
        networks.build_engines(phase.steps)
        feed = Feed(self.data, self.compute.resolved_device())
        sampler, seed = sampler_of(phase, self.data, SEED), derive(SEED, "phase", phase.name)
        ledger = Ledger(self.compute.resolved_device())
        sent, seconds = 0.0, {}
        with ledger.active(), measured_communication() as traffic:
            for number in range(phase.steps):
                if number == LISTENED_STEPS:  # of those before, kernels were chosen and buffers made
                    ledger.take()
                    sent = traffic.bytes
                rows = shard(sampler.indices(number), phase.accumulate)
                batches = tuple(feed.batch(part) for part in rows)
                take_step(phase, networks, Step(number, seed, dist.get_rank(), batches))
            seconds = {name: value / LISTENED_STEPS for name, value in ledger.take().items()}
        sent = (traffic.bytes - sent) / LISTENED_STEPS
        alone = sum(seconds.values()) - seconds.get(COMMUNICATION, 0.0)
        projected = {f"{p.workers} GPUs, {p.link.name}": p.efficiency for p in projections(alone, ring(sent))}
        return {
            "bytes sent a step": sent,
            "seconds of a step": seconds,
            "projected efficiency": projected,
        }


def _compare(what: str, fit: Fit, phase: Phase, peer: PlainDDP | PlainDeepSpeed, weights: list[torch.Tensor]) -> None:
    assert fit.outbox
    records = [r["values"] for r in fit.outbox.records() if r["op"] == "metrics"]
    losses = [r[f"{phase.name}/loss"] for r in records if f"{phase.name}/loss" in r]
    same(f"losses {what}", [torch.tensor(losses)], [torch.tensor(peer.losses)])
    last = fit.checkpoints(phase.name).find("last")
    assert last
    own = load_weights(last, averaged=False)
    found = {peer_name(name.removeprefix("classifier.")): value for name, value in own.items()}
    names = [name for name, _ in peer.model.named_parameters()]
    same(f"weights {what}", [found[name] for name in names], [weight.cpu() for weight in weights])


if __name__ == "__main__":
    import tyro

    main(tyro.cli(BenchWorkers, description=__doc__))
