"""Counted bytes against DeepSpeed's real tensors and collectives at every stage, on several gloo processes; and the
time that a ledger sees it spend on communication."""

import gc
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import join_group
from torch import nn

from raymed.distributed import leave_group
from raymed.ledger import Ledger, span
from raymed.tasks.task import Ema, Network, Optim, Phase, Task
from raymed.train.communication import measured_communication
from raymed.train.compute import Compute
from raymed.train.engines.engine import build_engine
from raymed.train.plans.sizes import Sizes, copied_bytes, memory_of, sent_of, shard, sizes_of

ENGINES = {"torch": ("torch", 0)} | {f"zero{stage}": ("deepspeed", stage) for stage in range(4)}
STEPS = (1, 1, 2)
"""Micro-batches of each step; stage 3 learns in the first what it needs in which order."""


class Odd(Task):
    """One network with sizes that nothing divides, small ones and a large one."""

    def networks(self):
        layers = (nn.Linear(401, 777), nn.ReLU(), nn.Linear(777, 101), nn.ReLU(), nn.Linear(101, 1))
        return {"net": Network(nn.Sequential(*layers), Optim("adamw"))}


PHASE = Phase("p", Odd(), 10, 8)


def tensors() -> list[torch.Tensor]:
    """All that Python knows of."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
    return found + [x.grad for x in found if x.grad is not None]


def held(before: list[torch.Tensor]) -> int:
    """Bytes of all tensors but those that were there before."""
    known = {t.untyped_storage()._cdata for t in before}
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors()}
    return sum(size for storage, size in found.items() if storage not in known)


def train(engine: str, stage: int) -> dict:
    """Some steps: bytes held after them; for each, bytes sent, seconds by name, and times around it."""
    before = tensors()
    torch.manual_seed(0)
    network = PHASE.task.networks()["net"]
    compute = Compute(workers=dist.get_world_size(), engine=engine, zero_stage=stage, device="cpu")  # type: ignore[arg-type]
    moved, records, ledger = build_engine("net", network, 10, compute), [], Ledger()
    for number, accumulate in enumerate(STEPS):
        with ledger.active(), measured_communication() as traffic:
            times = [time.perf_counter()]
            ledger.take()
            times.append(time.perf_counter())
            for k in range(accumulate):
                with span("forward"):
                    loss = moved(torch.ones(16, 401)).square().mean()
                with span("backward"):
                    moved.backward(loss, last=k == accumulate - 1)
            del loss
            moved.step(number)
            times.append(time.perf_counter())
            seconds = ledger.take()
            times.append(time.perf_counter())
        records.append({"sent": traffic.bytes, "seconds": seconds, "times": times})
    in_memory = held(before)
    copies = [*moved.full_state().values(), *(v for state in moved.optimizer_state().values() for v in state.values())]
    if engine == "deepspeed":
        moved.engine.destroy()  # type: ignore[attr-defined]
    return {"held": in_memory, "steps": records, "copied": sum(tensor.nbytes for tensor in copies)}


def worker(rank: int, world: int, folder: Path) -> None:
    """One process: all engines."""
    join_group(rank, world, folder)
    collective = dist.all_reduce
    records = {name: train(*engine) for name, engine in ENGINES.items()}
    assert dist.all_reduce is collective  # what was wrapped is as it was
    torch.save(records, folder / f"{rank}.pt")
    leave_group()


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=lambda world: f"{world} workers"
)
def workers(request, tmp_path_factory):
    """(number of workers, what each of them saw)."""
    world, folder = request.param, tmp_path_factory.mktemp("sizes")
    torch.multiprocessing.spawn(worker, args=(world, folder), nprocs=world)
    return world, [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("name", ENGINES)
def test_states_are_what_is_held_after_steps(name, workers):
    """Gradients are gone then (but for stage 3, which keeps their place), and a bucket stays."""
    (world, seen), stage, sizes = workers, ENGINES[name][1], sizes_of(PHASE)["net"]
    memory = memory_of(sizes, stage, world)
    expected = memory.states - (memory.gradients if stage < 3 else 0) + (4 * sizes.trained if stage else 0)
    for rank in range(world):
        assert seen[rank][name]["held"] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", ENGINES)
def test_rank_0_copies_a_checkpoint_whole_at_every_stage(name, workers):
    world, seen = workers
    wanted = copied_bytes(PHASE, sizes_of(PHASE))
    assert [seen[rank][name]["copied"] for rank in range(world)] == [wanted] + [0] * (world - 1)


@pytest.mark.parametrize("name", ENGINES)
def test_bytes_are_those_that_are_sent(name, workers):
    (world, seen), stage, sizes = workers, ENGINES[name][1], sizes_of(PHASE)["net"]
    for rank in range(world):
        for accumulate, record in list(zip(STEPS, seen[rank][name]["steps"], strict=True))[1:]:
            assert record["sent"] == pytest.approx(sent_of(sizes, stage, world, accumulate), rel=2e-3)


@pytest.mark.parametrize("name", ENGINES)
def test_the_ledger_sees_communication_and_loses_nothing(name, workers):
    world, seen = workers
    for rank in range(world):
        for record in seen[rank][name]["steps"]:
            seconds = record["seconds"]
            assert set(seconds) == {"forward", "backward", "communication", "optimizer", "other"}
            assert all(seconds[part] > 0 for part in ("forward", "backward", "communication", "optimizer"))
            began, first, last, ended = record["times"]
            assert last - first < sum(seconds.values()) < ended - began


SIZES = Sizes(groups=((1000, 500), (10, 1)), fixed_bytes=77, moments=2, averaged=True)


def test_shards_are_padded():
    """Of groups laid end to end at stages 1 and 2, of every parameter at stage 3; 4 workers."""
    assert shard(SIZES, 1, 4) == shard(SIZES, 2, 4) == 375 + 3
    assert shard(SIZES, 3, 4) == 250 + 125 + 3 + 1
    assert shard(SIZES, 2, 1) == shard(SIZES, 3, 1) == SIZES.trained == 1511


def test_memory_by_hand():
    zero, one, three = (memory_of(SIZES, stage, 4) for stage in (0, 1, 3))
    assert (zero.weights, zero.fixed, zero.gradients, zero.optimizer, zero.master) == (6044, 77, 6044, 12088, 0)
    assert (zero.average, zero.buffers, zero.host) == (6044, 6044, 0)
    assert zero.states == 6044 * 5 + 77 and zero.total == 6044 * 6 + 77
    assert (one.weights, one.gradients, one.optimizer, one.master) == (6044, 1512, 3024, 1512)
    assert memory_of(SIZES, 1, 4, accumulate=2).gradients == 6044
    assert (three.weights, three.average, three.fixed) == (1516 + 6044, 1516, 77)  # small ones stay whole, too
    assert three.buffers == 6044
    offloaded = memory_of(SIZES, 2, 4, offload=True)
    assert offloaded.host == 4 * 1512 and offloaded.states == 2 * 6044 + 77
    assert memory_of(SIZES, 1, 4, offload=True) == one
    assert zero + three == three + zero and (zero + three).weights == 6044 + 7560


def test_large_networks_are_gathered_twice():
    large = Sizes(groups=((2_000_000_000,),), fixed_bytes=0)
    assert sent_of(large, 3, 2, 1) == 3 * 0.5 * 8e9
    assert memory_of(large, 3, 2).buffers == 4 * (2_000_000_000 + 2_000_000_000)  # one layer is not cut
    assert sent_of(large, 3, 1, 1) == 0


def test_a_network_is_counted_without_being_built(monkeypatch):
    class Twice(Task):
        def networks(self):
            trained = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 1))
            trained[2].requires_grad_(False)
            return {
                "g": Network(trained, Optim("sgd", momentum=0.0), Ema()),
                "d": Network(nn.Linear(4, 4), Optim("sgd")),
                "fixed": Network(nn.Linear(9, 9)),
            }

    before = torch.get_rng_state()
    found = sizes_of(Phase("p", Twice(), 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    fixed_bytes = 4 * 8 + 4 * (5 + 5) + 8  # the last layer, and the normalisation's statistics and counter
    assert found["g"] == Sizes(((135,), (5, 5, 5)), fixed_bytes, moments=0, averaged=True)
    assert found["d"] == Sizes(((16,), (4,)), 0, moments=1)
    assert found["fixed"] == Sizes((), 4 * 90)


def test_networks_that_meta_cannot_build_are_built():
    class Computes(Task):
        def networks(self):
            layer = nn.Linear(int(torch.ones(3).sum()), 2)  # a value is read
            return {"net": Network(layer, Optim())}

    assert sizes_of(Phase("p", Computes(), 1, 2))["net"].trained == 8
