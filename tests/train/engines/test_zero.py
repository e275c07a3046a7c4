"""Every ZeRO stage, in fp32 and bf16, on two gloo processes with unequal data, against one plain process.

SGD with clipping that always bites shows a gradient of the wrong size, which Adam hides; AdamW shows a state that was
not restored. The network has sizes that two workers cannot share evenly, a parameter without axes, a frozen layer and a
branch that some micro-batches do not use.
"""

import gc
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import join_group
from torch import Tensor, nn

from raymed.config import UserError, replace
from raymed.distributed import leave_group, rank, world_size
from raymed.tasks.task import Ema, Network, Optim, Phase, Task
from raymed.train.compute import Compute
from raymed.train.engines import deepspeed
from raymed.train.engines.engine import Engine, build_engine

STEPS, MICRO, SHARE = 8, 2, 3  # micro-batches a step, samples of a micro-batch a worker
SGD = Optim("sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="cosine", warmup=0.5, clip=0.1)
ADAMW = Optim(lr=3e-2, weight_decay=0.1, clip=0.1)
STAGES = {f"zero{stage}": {"zero_stage": stage} for stage in range(4)}
OFFLOADED = {f"zero{stage}-offload": {"zero_stage": stage, "offload": True} for stage in (2, 3)}
COMPUTES = {"torch": {"engine": "torch"}} | STAGES | OFFLOADED | {"zero3-whole": {"zero_stage": 3}}
"""At zero3 all parameters are in pieces; at zero3-whole all are small enough to stay whole between steps."""
BF16 = ["torch", *STAGES]
CHAIN = ["zero2", "zero3", "zero1", "zero3-offload", "zero2-offload", "zero0", "zero3-whole", "torch"]
"""What one run with AdamW goes through, a step each, after two steps of one plain process and before two more."""
TWICE = ["torch", "zero0", "zero1", "zero2", "zero2-offload"]
"""What may differentiate twice."""


def engine_of(name: str, network: Network, steps: int, precision: str = "fp32") -> Engine:
    """The engine of a case."""
    compute = Compute(**{"engine": "deepspeed", "device": "cpu"} | COMPUTES[name], precision=precision)
    deepspeed.KEPT_WHOLE = 100_000 if name.endswith("whole") else 0
    return build_engine("net", network, steps, compute)


class Seen(nn.Linear):
    """Remembers what its products were computed in."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.dtypes = set()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.dtypes.add(y.dtype)
        return y


class Net(nn.Module):
    """Images (B, 1, 5, 5) to logits (B,). `branch` takes part only where it is asked for."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.wide = Seen(27, 7)
        self.still = nn.Linear(7, 7).requires_grad_(False)
        self.branch = nn.Linear(7, 7)
        self.last = nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("shift", torch.tensor([0.25]))
        self.branches = False

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.wide(torch.tanh(self.conv(x)).flatten(1)))
        y = y + torch.tanh(self.still(y))
        if self.branches:
            y = y + torch.tanh(self.branch(y))
        return (self.scale * self.last(y).squeeze(1)).float() + self.shift


@dataclass
class Record:
    """What a run shows, step by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    """Of a fixed batch in evaluation, with the averages and then without."""
    dtypes: set = field(default_factory=set)
    averages: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    updates: int = 0


def batch(step: int, micro: int) -> tuple[Tensor, Tensor]:
    """This process's share of a global micro-batch of 2 x SHARE samples: all of it in a plain process."""
    draw = torch.Generator().manual_seed(100 * step + micro)
    x = torch.randn(2 * SHARE, 1, 5, 5, generator=draw) * torch.linspace(0.2, 2, 2 * SHARE)[:, None, None, None]
    y = torch.randn(2 * SHARE, generator=draw)
    return x.chunk(world_size())[rank()], y.chunk(world_size())[rank()]


def network(optim: Optim, begun: Record | None = None) -> Network:
    torch.manual_seed(5)
    made = Network(Net(), optim, Ema(0.9))
    if begun is not None:
        made.module.load_state_dict(begun.weights[-1])
    return made


def train(engine: Engine, steps: range, record: Record, begun: Record | None = None, rarely: bool = False) -> Record:
    """Some steps, with an evaluation after each; `rarely` uses the branch in one micro-batch of two steps."""
    average = engine.average(Ema(0.9))
    if begun is not None:
        engine.load_optimizer_state(begun.optimizer)
        average.load(begun.averages, begun.updates)
    for step in steps:
        record.losses.append(0.0)
        for micro in range(MICRO):
            x, y = batch(step, micro)
            engine.module.branches = not rarely or (step % 2 == 0 and micro == step // 2 % 2)
            loss = (engine(x) - y).square().mean() / MICRO
            engine.backward(loss, last=micro == MICRO - 1)
            record.losses[-1] += mean(loss)
        record.norms.append(engine.step(step).item())
        average.update()
        look(engine, average, record)
    record.optimizer, record.updates = engine.optimizer_state(), average.updates
    record.dtypes = engine.module.wide.dtypes
    return record


def look(engine: Engine, average, record: Record) -> None:
    x = torch.linspace(-1, 1, 100).view(4, 1, 5, 5)
    engine.module.eval()
    with torch.no_grad():
        with average.swapped_in():
            record.outputs.append(engine.raw(x))
            record.averages = engine.full_state()
        record.outputs.append(engine.raw(x))
    engine.module.train()
    record.weights.append(engine.full_state())


def mean(value: Tensor) -> float:
    """Of what the workers have."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value.item() / world_size()


def table(name: str, precision: str) -> Record:
    """A case of the table, from the beginning."""
    engine = engine_of(name, network(SGD), STEPS, precision)
    return train(engine, range(STEPS), Record(), rarely=True)


def chain(folder: Path, begun: Record) -> Record:
    """One run through all engines: each continues what the one before it left on disk."""
    seen = Record()
    for step, name in enumerate(CHAIN, start=2):
        engine = engine_of(name, network(ADAMW, begun), 2 + len(CHAIN) + 2)
        part = train(engine, range(step, step + 1), Record(), begun)
        if rank() == 0:
            torch.save(part, folder / f"chain-{name}-{step}.pt")
        dist.barrier()
        begun = torch.load(folder / f"chain-{name}-{step}.pt", weights_only=False)
        for values, more in zip((seen.losses, seen.norms, seen.weights, seen.outputs),
                                (part.losses, part.norms, part.weights, part.outputs), strict=True):  # fmt: skip
            values.extend(more)
    seen.averages, seen.optimizer, seen.updates = begun.averages, begun.optimizer, begun.updates
    return seen


def twice(name: str) -> Record:
    """Two micro-batches a step of a loss with a gradient penalty, through `raw`."""
    engine = engine_of(name, network(SGD), 4)
    record = Record()
    for step in range(4):
        record.losses.append(0.0)
        for micro in range(MICRO):
            x = batch(step, micro)[0].requires_grad_()
            logits = engine.raw(x)
            (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
            loss = (torch.nn.functional.softplus(-logits) + 2 * slope.square().flatten(1).sum(1)).mean() / MICRO
            engine.backward(loss, last=micro == MICRO - 1)
            record.losses[-1] += mean(loss)
        record.norms.append(engine.step(step).item())
        record.weights.append(engine.full_state())
    return record


def ahead(name: str) -> Record:
    """Both micro-batches of a step go forward before the first goes back."""
    engine = engine_of(name, network(SGD), 4)
    record = Record()
    for step in range(4):
        batches = [batch(step, micro) for micro in range(MICRO)]
        losses = [(engine(x) - y).square().mean() / MICRO for x, y in batches]
        for micro, loss in enumerate(losses):
            engine.backward(loss, last=micro == MICRO - 1)
        record.losses.append(sum(map(mean, losses)))
        record.norms.append(engine.step(step).item())
        record.weights.append(engine.full_state())
    return record


def average_of_halves(name: str) -> float:
    """How far a weight moves whose gradients are 1 and 1 + 2^-7, both exact in bf16; their mean is not."""
    module = nn.Linear(1, 1, bias=False)
    optim = Optim("sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0, clip=None)
    engine = engine_of(name, Network(module, optim), 1, "bf16")
    before = engine.full_state()
    engine.backward(engine(torch.full((1, 1), 1 + rank() * 2**-7)).sum().float(), last=True)
    engine.step(0)
    after = engine.full_state()
    return (before["weight"] - after["weight"]).item() if rank() == 0 else 0.0


def freed(name: str) -> bool:
    """Whether nothing is left of a network and its optimiser once its engine is gone."""
    engine = engine_of(name, network(ADAMW), STEPS)
    train(engine, range(3), Record())
    left = [weakref.ref(engine.module), weakref.ref(engine.module.wide), weakref.ref(engine.engine.optimizer)]
    del engine
    gc.collect()
    return all(reference() is None for reference in left)


def worker(number: int, folder: Path) -> None:
    """One of two processes: all cases."""
    join_group(number, 2, folder)
    results: dict = {(name, "fp32"): table(name, "fp32") for name in COMPUTES}
    results |= {(name, "bf16"): table(name, "bf16") for name in BF16}
    results["chain"] = chain(folder, torch.load(folder / "begun.pt", weights_only=False))
    results["twice"] = {name: twice(name) for name in TWICE}
    results["ahead"] = {name: ahead(name) for name in COMPUTES}
    results["halves"] = {name: average_of_halves(name) for name in COMPUTES}
    results["freed"] = {name: freed(name) for name in COMPUTES if name != "torch"}
    torch.save(results, folder / f"{number}.pt")
    leave_group()


@pytest.fixture(scope="module")
def plain():
    """The same on one process: tables by precision, AdamW with what it had after two steps, and the penalty."""
    torch.manual_seed(0)
    steps = 2 + len(CHAIN) + 2
    begun = train(engine_of("torch", network(ADAMW), steps), range(2), Record())
    whole = train(engine_of("torch", network(ADAMW), steps), range(steps), Record())
    tables = {precision: table("torch", precision) for precision in ("fp32", "bf16")}
    return {"tables": tables, "begun": begun, "whole": whole, "twice": twice("torch"), "ahead": ahead("torch")}


@pytest.fixture(scope="module")
def workers(plain, tmp_path_factory):
    """What the two processes saw: (rank 0's results, rank 1's)."""
    folder = tmp_path_factory.mktemp("zero")
    torch.save(plain["begun"], folder / "begun.pt")
    torch.multiprocessing.spawn(worker, args=(folder,), nprocs=2)
    return tuple(torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2))


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest over all tensors of the norm of the difference, relative to the norm."""
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape and one[name].is_contiguous() for name in one)
    return max(((one[n] - other[n]).double().norm() / other[n].double().norm()).item() for n in one)


def check_close(ours: Record, expected: Record, tolerance: float) -> None:
    """Losses, norms of the gradient, weights after every step, and what evaluations saw."""
    assert ours.losses == pytest.approx(expected.losses, rel=tolerance)
    assert ours.norms == pytest.approx(expected.norms, rel=tolerance)
    for mine, theirs in zip(ours.weights, expected.weights, strict=True):
        assert distance(mine, theirs) < tolerance
    for mine, theirs in zip(ours.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_the_run_is_worth_comparing(plain):
    """Clipping bites at every step, everything that is trained moves far, and the branch is reached now and then."""
    record = plain["tables"]["fp32"]
    start, end = network(SGD).module.state_dict(), record.weights[-1]
    assert min(record.norms) > 1.5 * SGD.clip
    for name, value in start.items():
        moved = ((end[name] - value).norm() / value.norm()).item()
        assert moved == 0 if name.startswith(("still", "shift")) else moved > 0.005, (name, moved)
    assert end["scale"].shape == () and end["last.bias"].shape == (1,)
    before, after = record.weights[0]["branch.weight"], record.weights[1]["branch.weight"]
    assert torch.equal(before, after) and not torch.equal(after, record.weights[2]["branch.weight"])


@pytest.mark.parametrize("name", COMPUTES)
def test_fp32_is_the_plain_run(workers, plain, name):
    check_close(workers[0][name, "fp32"], plain["tables"]["fp32"], 1e-5)
    assert workers[0][name, "fp32"].dtypes == {torch.float32}
    assert workers[1][name, "fp32"].weights == [{}] * STEPS and workers[1][name, "fp32"].optimizer == {}


@pytest.mark.parametrize("name", BF16)
def test_bf16_is_autocast_over_fp32_weights(workers, plain, name):
    ours, single, exact = workers[0][name, "bf16"], plain["tables"]["bf16"], plain["tables"]["fp32"]
    assert ours.dtypes == {torch.bfloat16}
    assert ours.losses == pytest.approx(exact.losses, rel=2e-2)
    assert ours.losses != pytest.approx(exact.losses, rel=1e-4), "autocast is off"
    assert all(value.dtype == torch.float32 for value in ours.weights[-1].values())
    check_close(ours, single, 1e-2)


@pytest.mark.parametrize("name", COMPUTES)
def test_gradients_are_averaged_in_fp32(workers, name):
    assert workers[0]["halves"][name] == pytest.approx(1 + 2**-8, abs=1e-6)


@pytest.mark.parametrize("name", TWICE)
def test_two_micro_batches_that_are_differentiated_twice(workers, plain, name):
    check_close(workers[0]["twice"][name], plain["twice"], 1e-5)


@pytest.mark.parametrize("name", COMPUTES)
def test_two_micro_batches_that_go_forward_first(workers, plain, name):
    check_close(workers[0]["ahead"][name], plain["ahead"], 1e-5)


def test_a_run_goes_on_under_every_engine(workers, plain):
    """From one process to two and back, through all stages: the next step is always that of the undisturbed run."""
    whole, found = plain["whole"], workers[0]["chain"]
    steps = slice(2, 2 + len(CHAIN))
    expected = Record(whole.losses[steps], whole.norms[steps], whole.weights[steps], whole.outputs[4 : 2 * steps.stop])
    check_close(found, expected, 1e-5)
    engine = engine_of("torch", network(ADAMW, found), len(whole.losses))
    last = train(engine, range(steps.stop, len(whole.losses)), Record(), found)
    rest = slice(steps.stop, None)
    expected = Record(whole.losses[rest], whole.norms[rest], whole.weights[rest], whole.outputs[2 * steps.stop :])
    check_close(last, expected, 1e-5)
    assert distance(last.averages, whole.averages) < 1e-5 and last.updates == whole.updates
    for parameter, values in whole.optimizer.items():
        assert distance(last.optimizer[parameter], values) < 1e-4, parameter


def test_a_network_whose_engine_is_gone_takes_no_memory(workers):
    for results in workers:
        assert all(results["freed"].values()), results["freed"]


class Penalised(Task):
    """A task that says that its critic is differentiated twice."""

    double_backward = frozenset({"critic"})


def test_stage_3_is_refused_for_what_is_differentiated_twice():
    phase = Phase("gan", Penalised(), steps=1, batch_size=1)
    refused = Compute(workers=2, zero_stage=3)
    with pytest.raises(UserError, match="phase gan: Penalised differentiates critic twice, which ZeRO stage 3 cannot"):
        refused.check_phase(phase)
    replace(refused, {"network_stages": ("critic=2",)}).check_phase(phase)
    replace(refused, {"zero_stage": 2}).check_phase(phase)
    with pytest.raises(UserError, match="--compute.network-stages critic=2"):
        replace(refused, {"zero_stage": 0, "network_stages": ("critic=3",)}).check_phase(phase)


@pytest.mark.parametrize(
    "useless", [{"zero_stage": 2}, {"network_stages": ("critic=1",)}, {"zero_stage": 2, "offload": True}]
)
def test_options_without_effect_under_plain_torch_warn(useless):
    with pytest.warns(UserWarning) as warned:
        Compute(engine="torch", workers=2, **useless)
    said = [str(warning.message) for warning in warned]
    assert said == [f"compute.{name} has no effect with the torch engine" for name in useless]
