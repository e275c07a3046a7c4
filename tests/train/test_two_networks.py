"""Two networks that train in turn (a small GAN), with a second derivative and a memory, on one process and on two gloo
processes under every engine, against a loop in plain torch that shares nothing with `raymed.train`.

What the task does in one step: twice the discriminator, the first time with R1 (Mescheder et al., "Which training
methods for GANs do actually converge?", 2018), once the generator, each over two micro-batches. The discriminator is
shown fakes of a pool (Shrivastava et al., 2017) in place of half of the new ones.
"""

import copy
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small import join_group, load_data, make_fit, recipe, write_images
from torch import Tensor, nn

from raymed.config import UserError
from raymed.data.dataset import Batch, DataSet
from raymed.distributed import all_gather, leave_group
from raymed.models.norm import GlobalBatchNorm2d
from raymed.random import derive, normal, uniform
from raymed.tasks.task import Ema, Loss, Network, Optim, Phase, Task
from raymed.train.checkpoints.checkpoint import load_weights
from raymed.train.compute import Compute
from raymed.train.loop import Fit, sampler_of

STEPS, SEED = 6, 3
GAMMA, DECAY = 2.0, 0.7
CLIP = {"generator": 0.12, "discriminator": 0.2}
"""Clips some of the steps: a gradient of the wrong size moves the weights wrongly in the others."""
OPTIMS = {
    "sgd": Optim("sgd", lr=0.1, weight_decay=0.02, momentum=0.8, schedule="constant", warmup=0.0),
    "adamw": Optim("adamw", lr=3e-3, weight_decay=0.1, schedule="one_cycle"),
}
COMPUTES = {
    "torch": Compute(engine="torch"),
    "zero0": Compute(engine="deepspeed", zero_stage=0),
    "zero1": Compute(engine="deepspeed", zero_stage=1),
    "zero2": Compute(engine="deepspeed", zero_stage=2),
    "mixed": Compute(engine="deepspeed", zero_stage=2, network_stages=("generator=3",)),
}
RUNS = [*(f"{engine}-sgd" for engine in COMPUTES), "zero2-adamw"]
STOPPED = ["zero2-sgd", "mixed-sgd"]
"""What two workers begin and one process in plain torch continues."""
CHECKPOINTED = [Compute(engine="torch")] + [Compute(engine="deepspeed", zero_stage=stage) for stage in range(4)]


class Generator(nn.Module):
    """(B, 6) latent -> (B, 64) pixels."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 3 * 4 * 4)
        self.norm = GlobalBatchNorm2d(3)
        self.last = nn.ConvTranspose2d(3, 1, 4, stride=2, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.last(F.silu(self.norm(self.first(z).unflatten(1, (3, 4, 4)))))).flatten(1)


def discriminator() -> nn.Module:
    """(B, 64) -> (B, 1): odd sizes, a bias of one."""
    return nn.Sequential(nn.Linear(64, 17), nn.SiLU(), nn.Linear(17, 1))


def real_images(batch: Batch) -> Tensor:
    """(B, 64) in [-1, 1]."""
    return F.avg_pool2d(batch.unit_image(), 2).flatten(1) * 2 - 1


def penalty(score: Tensor, real: Tensor) -> Tensor:
    """R1."""
    (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
    return GAMMA / 2 * slope.square().sum(1).mean()


def mixed(fake: Tensor, pool: Tensor, draw: Tensor) -> Tensor:
    """Each fake with probability 1/2, else one of the pool."""
    old = pool[(draw[:, 1] * len(pool)).long()]
    return torch.where(draw[:, :1] < 0.5, fake, old)


@dataclass(frozen=True)
class Gan(Task):
    """See the module."""

    optim: Optim
    double_backward = frozenset({"discriminator"})

    def networks(self):
        return {
            "generator": Network(Generator(), replace(self.optim, clip=CLIP["generator"]), Ema(DECAY)),
            "discriminator": Network(discriminator(), replace(self.optim, clip=CLIP["discriminator"])),
        }

    def memory(self):
        return {"pool": torch.zeros(10, 64), "seen": torch.zeros((), dtype=torch.int64)}

    def losses(self, step, nets):
        for turn in range(2):
            with nets.training("discriminator"):
                for k, batch in step.batches():
                    yield self._discriminate(step, nets, batch, turn, last=k == len(step.micro) - 1)
        with nets.training("generator"):
            for k, batch in step.batches():
                fake = nets["generator"](normal(step.seed, step.number, batch.index, "z", (6,)))
                value = F.softplus(-nets["discriminator"](fake)).mean() / len(step.micro)
                yield Loss("generator", value, {"generator": value.detach()}, step=k == len(step.micro) - 1)

    def _discriminate(self, step, nets, batch, turn, last):
        with torch.no_grad():
            fake = nets["generator"](normal(step.seed, step.number, batch.index, f"z{turn}", (6,)))
        shown = mixed(fake, nets.memory["pool"], uniform(step.seed, step.number, batch.index, f"pool{turn}", (2,)))
        new = all_gather(fake)
        nets.memory["pool"] = torch.cat([new, nets.memory["pool"]])[:10]
        nets.memory["seen"] += len(new)
        real = real_images(batch).requires_grad_(turn == 0)
        score = nets["discriminator"](real)
        value = F.softplus(-score).mean() + F.softplus(nets["discriminator"](shown)).mean()
        value = (value + (penalty(score, real) if turn == 0 else 0)) / len(step.micro)
        return Loss("discriminator", value, {"loss": value.detach()}, step=last)

    def predict(self, batch, nets):
        return {"score": nets["discriminator"](real_images(batch))}


def gan_phase(optim: str) -> Phase:
    return Phase("gan", Gan(OPTIMS[optim]), steps=STEPS, batch_size=16, accumulate=2, evaluations=2)


def train(data: DataSet, folder: Path, run: str, evaluations: int = 2) -> None:
    """A run ENGINE-OPTIM in a folder, new or begun, left after so many evaluations: one is half of it."""
    engine, optim = run.split("-")
    fit = Fit([gan_phase(optim)], data, folder, SEED, COMPUTES[engine])
    training = fit.run()
    for _ in itertools.islice(training, evaluations):
        pass
    training.close()


def state(folder: Path) -> dict[str, Tensor]:
    """Weights, averages and memory at the end, by name."""
    (last,) = (folder / "checkpoints" / "gan").glob(f"step-{STEPS:06d}")
    kinds = {
        "own": load_weights(last, averaged=False),
        "average": load_weights(last),
        "memory": load_file(last / "memory.safetensors"),
    }
    return {f"{kind}.{name}": value for kind, values in kinds.items() for name, value in values.items()}


def in_plain_torch(data: DataSet, optim: str) -> dict[str, Tensor]:
    """The same training written out, with torch's own layers and optimisers: SGD, or AdamW at OneCycleLR's rates."""
    phase, config = gan_phase(optim), OPTIMS[optim]
    torch.manual_seed(derive(SEED, "weights", "gan"))
    made, sampler, seed = phase.task.networks(), sampler_of(phase, data, SEED), derive(SEED, "phase", "gan")
    g, d = (network.module for network in made.values())
    clip = {g: CLIP["generator"], d: CLIP["discriminator"]}
    norm = nn.BatchNorm2d(3)
    norm.load_state_dict(g.norm.state_dict())
    g.norm = norm
    average, updates = copy.deepcopy(g), 0
    pool, seen = torch.zeros(10, 64), 0
    optimisers, norms = {}, {g: [], d: []}
    for module in (g, d):
        groups = [{"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
                  {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
        optimisers[module] = (
            torch.optim.SGD(groups, config.lr, config.momentum, nesterov=True)
            if optim == "sgd"
            else torch.optim.AdamW(groups, config.lr)
        )
    rates = {
        m: torch.optim.lr_scheduler.OneCycleLR(o, config.lr, STEPS, pct_start=0.25, max_momentum=0.9)
        for m, o in optimisers.items()
        if optim == "adamw"
    }
    for number in range(STEPS):
        micro = [data.batch(rows) for rows in sampler.indices(number).reshape(2, 8)]
        for turn in range(3):
            module = (d, d, g)[turn]
            optimisers[module].zero_grad()
            g.train(turn == 2)
            for batch in micro:
                z = normal(seed, number, batch.index, "z" if turn == 2 else f"z{turn}", (6,))
                if turn == 2:
                    (F.softplus(-d(g(z))).mean() / 2).backward()
                    continue
                fake = g(z).detach()
                shown = mixed(fake, pool, uniform(seed, number, batch.index, f"pool{turn}", (2,)))
                pool, seen = torch.cat([fake, pool])[:10], seen + len(fake)
                real = real_images(batch).requires_grad_()
                value = F.softplus(-d(real)).mean() + F.softplus(d(shown)).mean()
                ((value + (penalty(d(real), real) if turn == 0 else 0)) / 2).backward()
            norms[module].append(nn.utils.clip_grad_norm_(module.parameters(), clip[module]).item())
            optimisers[module].step()
        for schedule in rates.values():
            schedule.step() if number < STEPS - 1 else None
        decay, updates = min(DECAY, (1 + updates) / (10 + updates)), updates + 1
        for mean, p in zip(average.parameters(), g.parameters(), strict=True):
            mean.data = decay * mean.data + (1 - decay) * p.data
    if optim == "sgd":
        assert all(min(values) < 0.95 * clip[m] < 1.05 * clip[m] < max(values) for m, values in norms.items())
    average.norm.load_state_dict(g.norm.state_dict() | dict(average.norm.named_parameters()))
    kinds = {"own.generator": g, "average.generator": average, "own.discriminator": d, "average.discriminator": d}
    found = {f"{kind}.{name}": value for kind, m in kinds.items() for name, value in m.state_dict().items()}
    return found | {"memory.pool": pool, "memory.seen": torch.tensor(seen)}


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
        error, norm = (found[name].double() - value.double()).norm(), value.double().norm()
        assert error <= 1e-5 * norm, f"{name} of norm {norm:.1e} differs by {error:.1e}"


def worker(rank: int, base: Path, manifest: Path) -> None:
    """One of two processes: all runs."""
    join_group(rank, 2, base)
    data = load_data(recipe(manifest))
    for run in RUNS:
        train(data, base / run, run)
    for run in STOPPED:
        train(data, base / f"stopped-{run}", run, evaluations=1)
    for compute in CHECKPOINTED:
        classify(manifest, base / f"again-{compute.engine}{compute.zero_stage}", compute, again=True)
    leave_group()


def classify(manifest: Path, folder: Path, compute: Compute, again: bool) -> None:
    """Two steps of a classifier, whose blocks are computed again in the backward pass if so asked."""
    sgd = Optim("sgd", lr=0.05, clip=0.5, schedule="constant", warmup=0.0)
    config = recipe(manifest, method="ce", single__evaluations=1, single__steps=2, single__optim=sgd)
    compute = replace(compute, activation_checkpointing=again)
    list(make_fit(config, folder, compute).run())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, data) after all runs on one process and on two."""
    base = tmp_path_factory.mktemp("two")
    manifest = write_images(base)
    data = load_data(recipe(manifest))
    for optim in OPTIMS:
        train(data, base / f"plain-{optim}", f"torch-{optim}")
    classify(manifest, base / "again-plain", Compute(engine="torch"), again=False)
    torch.multiprocessing.spawn(worker, (base, manifest), nprocs=2)
    return base, data


@pytest.mark.parametrize("optim", OPTIMS)
def test_one_process_is_the_loop_in_plain_torch(optim, base):
    check_same(state(base[0] / f"plain-{optim}"), in_plain_torch(base[1], optim))


@pytest.mark.parametrize("run", RUNS)
def test_two_workers_are_one(run, base):
    check_same(state(base[0] / run), state(base[0] / f"plain-{run.split('-')[1]}"))


def test_weights_average_and_pool_are_of_different_things(base):
    """What is compared above has moved, and is not the same thing thrice."""
    found = state(base[0] / "plain-sgd")
    assert (found["own.generator.first.weight"] - found["average.generator.first.weight"]).norm() > 1e-3
    assert found["memory.seen"] == STEPS * 2 * 16
    assert found["memory.pool"].std() > 0.05 and (found["memory.pool"][0] - found["memory.pool"][9]).norm() > 0.1
    assert (found["own.generator.norm.running_mean"] - found["average.generator.norm.running_mean"]).norm() == 0


@pytest.mark.parametrize("run", STOPPED)
def test_one_process_continues_what_two_began(run, base):
    """With the pool and the counter as they were left."""
    folder, data = base
    (stopped,) = (folder / f"stopped-{run}" / "checkpoints" / "gan").glob(f"step-{STEPS // 2:06d}")
    assert load_file(stopped / "memory.safetensors")["seen"] == STEPS // 2 * 2 * 16
    train(data, folder / f"stopped-{run}", "torch-sgd")
    check_same(state(folder / f"stopped-{run}"), state(folder / "plain-sgd"))


def test_stage_three_is_refused_for_what_is_differentiated_twice(base, tmp_path):
    compute = Compute(engine="deepspeed", zero_stage=3, network_stages=("generator=1",))
    with pytest.raises(UserError, match="phase gan: Gan differentiates discriminator twice, which ZeRO stage 3 cannot"):
        list(Fit([gan_phase("sgd")], base[1], tmp_path, SEED, compute).run())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["torch0", "deepspeed0", "deepspeed1", "deepspeed2", "deepspeed3"])
def test_activations_computed_again_under_every_engine(engine, base):
    """Weights and running statistics are those of one process that keeps them all."""
    found, expected = (
        load_weights(next((base[0] / f"again-{name}" / "checkpoints" / "single").glob("step-000002")), averaged=False)
        for name in (engine, "plain")
    )
    check_same(found, expected)
