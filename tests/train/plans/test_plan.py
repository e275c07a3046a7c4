"""Plans: figures are those of the run, advice follows from the size of a memory, and what cannot fit is refused."""

import dataclasses
import json
import time
from contextlib import nullcontext

import psutil
import pytest
import torch
from safetensors.torch import load_file
from small import make_fit, recipe
from torch import nn

from raymed.config import UserError
from raymed.tasks.task import Ema, Network, Optim, Phase, Task
from raymed.train.checkpoints.checkpoint import _copies
from raymed.train.compute import Compute
from raymed.train.nets import Networks
from raymed.train.plans import plan as planning
from raymed.train.plans.estimate import StepCost, measure
from raymed.train.plans.plan import (
    CONTEXT,
    PhasePlan,
    Place,
    PlanReport,
    check_fits,
    check_group_fits,
    measurable,
    plan,
)
from raymed.train.plans.sizes import Sizes, sizes_of

GB = 10**9


@dataclasses.dataclass(frozen=True)
class OnGpus(Compute):
    """GPUs that nobody has to have: a plan by counting asks for no more than this."""

    def resolved_device(self) -> torch.device:
        return torch.device("cuda", 0)


COMPUTE = Compute(threads=1, device="cpu")
GPUS = OnGpus(threads=1)


@dataclasses.dataclass
class Wide(Task):
    """Square layers."""

    width: int
    depth: int = 1
    double_backward: frozenset[str] = frozenset()
    networks_named: tuple[str, ...] = ("net",)

    def networks(self):
        return {
            name: Network(nn.Sequential(*map(self.layer, range(self.depth))), Optim()) for name in self.networks_named
        }

    def layer(self, number: int) -> nn.Module:
        return nn.Linear(self.width, self.width, bias=False)


class Copied(Task):
    """All that a checkpoint may hold: one network with an average and buffers, one with SGD, one that is not trained,
    and a memory."""

    def networks(self):
        normed = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7))
        return {
            "averaged": Network(normed, Optim("adamw"), Ema()),
            "plain": Network(nn.Conv2d(3, 2, 3), Optim("sgd")),
            "fixed": Network(nn.Linear(11, 3)),
        }

    def memory(self):
        return {"queue": torch.zeros(13, 5), "seen": torch.tensor(0)}


def report(elements: float, gigabytes: float, activations: float = 0, batch: int = 32, **compute) -> PlanReport:
    """A network of so many elements on GPUs of so much memory, with so many GB of activations a worker."""
    compute = dataclasses.replace(GPUS, **({"workers": 4} | compute))
    cost = StepCost(1.0, 2.0, 3.0, 0, 0, "cuda", compute.workers, round(activations * GB), 1e12, 1e14)
    phase = Phase("p", Wide(1), 100, batch, evaluations=5)
    sizes = {"net": Sizes(((int(elements),),), 0, moments=2)}
    planned, memory = PhasePlan(phase, sizes, compute, cost), round(gigabytes * GB)
    return PlanReport((planned,), compute, "a GPU", memory, memory)


def test_needs_by_hand():
    """A billion elements on 4 workers: 16 GB of states whole and 4 GB for the all-reduce; sharded 4 + 1 + 2 + 1 GB and
    the bucket of 0.2 GB or the flat shard of 1 GB."""
    r = report(1e9, 80, activations=5)
    assert r.needed(Place(0)) == 16 * GB + 4 * GB + 5 * GB + CONTEXT
    assert r.needed(Place(1)) == r.needed(Place(2)) == (4 + 1 + 2 + 1 + 1 + 5) * GB + CONTEXT
    assert r.needed(Place(3)) == (1 + 1 + 2 + 1 + 5) * GB + 4 * GB + 4 * GB + CONTEXT  # its one layer is gathered whole
    assert r.needed(Place(2, True)) == (4 + 1 + 5) * GB + CONTEXT
    assert r.phases[0].seconds == 3 + 100 + 5 * 2
    assert r.phases[0].mfu == pytest.approx(1e12 * 8 / 1.0 / 1e14)  # 8 of 32 images on each worker


@pytest.mark.parametrize(
    ("gigabytes", "place", "words"),
    [
        (40, Place(0), "ZeRO 0: needs 25.6 GB of 40.0 GB a worker. It fits, and sharding would cost speed"),
        (28, Place(1), "(--compute.zero-stage 1): needs 14.6 GB of 28.0 GB a worker, with 10 % to spare; ZeRO 0 needs"),
        (15, Place(2, True), "(--compute.zero-stage 2 --compute.offload): needs 10.6 GB"),
    ],
)  # fmt: skip
def test_advice_is_the_first_place_that_fits(gigabytes, place, words):
    r = report(1e9, gigabytes, activations=5)
    assert r.advised == place and words in r.advice
    assert not r.fits(r.places[max(0, r.places.index(place) - 1)]) or place == r.places[0]


def test_advice_of_small_and_single_runs():
    assert report(5e8, 80).advice.endswith("Below a billion parameters sharding only costs speed")
    assert report(2e9, 80, workers=1).advice.endswith("With one worker there is nothing to shard")
    alone = report(2e9, 30, workers=1)
    assert alone.advised == Place(2, True) and "--compute.offload --compute.engine deepspeed" in alone.advice


def test_what_would_help_when_nothing_fits():
    """40 GB of activations for 8 images at a time: at stage 1 one at a time fits, and on 16 workers two do."""
    r = report(1e9, 20, activations=40)
    assert r.advised is None and r.advice.startswith("nothing fits here as it is. What would help: ")
    assert (
        "help: --p.accumulate 8 --compute.zero-stage 1; --compute.workers 16 --compute.zero-stage 1, each" in r.advice
    )
    assert "--compute.activation-checkpointing (activations are 8" in r.advice
    asked = report(1e9, 20, activations=40, activation_checkpointing=True)
    assert "activation-checkpointing" not in asked.advice
    hopeless = report(1e12, 20, activations=0)
    assert hopeless.advice == "nothing fits here as it is. A smaller model is needed, or more memory"
    assert "cannot fit: its 1e+03 billion trained parameters take 16000 GB" in str(hopeless.refusal)


def test_more_workers_have_fewer_images_each():
    r = report(1e9, 20, activations=16, batch=8)
    assert r.phases[0].needed(Place(2), workers=8) == (4 + 4 * 0.5 + 0.5) * GB + 8 * GB + CONTEXT
    assert r.phases[0].needed(Place(2), accumulate=2) == r.needed(Place(2)) - 8 * GB


def test_a_network_differentiated_twice_stays_at_stage_2():
    compute = dataclasses.replace(COMPUTE, workers=4, network_stages=("b=1",))
    phase = Phase("p", Wide(1000, 1, frozenset({"a"}), ("a", "b", "c")), 10, 8)
    planned = PhasePlan(phase, sizes_of(phase), compute, None)
    assert [planned.stage_of(name, Place(3)) for name in "abc"] == [2, 1, 3]
    assert planned.memory("a", Place(3)) == planned.memory("a", Place(2))
    assert planned.sent(Place(3), 4) == 3 / 4 * 4e6 * (3 + 3 + 2)


def test_thirty_billion_parameters_are_refused_at_once(monkeypatch):
    """Nothing of their 120 GB is allocated. More workers would help where those 120 GB fit, and nothing where not."""
    phase = Phase("giant", Wide(10_000, 300), 10, 8)
    process = psutil.Process()
    monkeypatch.setattr(planning, "_memory", lambda compute: (memory * GB, "a device"))
    memory = 150
    before, began = process.memory_info().rss, time.perf_counter()
    with pytest.raises(UserError) as refused:
        check_fits([phase], dataclasses.replace(COMPUTE, workers=2))
    assert not measurable([phase], COMPUTE)
    assert time.perf_counter() - began < 5 and process.memory_info().rss - before < 200e6
    assert "phase giant cannot fit: its 30 billion trained parameters take 480 GB on every worker" in str(refused.value)
    # The 360 GB of a checkpoint's copy are in the same memory, 11 GB for each of 32.
    assert "What would help: --compute.workers 32 --compute.zero-stage 3, each" in str(refused.value)
    memory = 100
    sharded = dataclasses.replace(COMPUTE, workers=64, zero_stage=3)
    with pytest.raises(
        UserError, match=r"120 GB on every worker at ZeRO 3, as they are built, before they are cut, and"
    ):
        check_fits([phase], sharded)
    memory = 130
    assert check_fits([phase], sharded)[0].startswith("warning: phase giant needs 12")


@pytest.mark.parametrize(
    ("workers", "gigabytes", "message"),
    [
        (4, 9.7, None),  # by hand, as above
        (4, 9.4, "compute.min_workers is 4, but with so many phase p needs 9.6 GB .* at ZeRO 2, without activations"),
        (2, 13, "compute.min_workers is 2, but with so many phase p needs 14.6 GB of every worker's device at ZeRO 2"),
        (1, 16, "compute.min_workers is 1, but with so many phase p needs 16.6 GB of every worker's device at ZeRO 0"),
        (1, 17, None),
    ],
)
def test_a_group_may_shrink_to_what_fits(workers, gigabytes, message, monkeypatch):
    """A billion elements at stage 2; a single worker has plain torch, which shards nothing."""
    compute = dataclasses.replace(GPUS, workers=8, min_workers=1, zero_stage=2)
    monkeypatch.setattr(planning, "_memory", lambda compute: (round(gigabytes * GB), "a device"))
    monkeypatch.setattr(planning, "sizes_of", lambda phase: {"net": Sizes(((10**9,),), 0, moments=2)})
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_group_fits([Phase("p", Wide(1), 100, 32)], compute, workers)


def test_a_plan_of_what_cannot_fit_refuses_without_measuring(data, monkeypatch):
    monkeypatch.setattr(planning, "measure", lambda *args: pytest.fail("it is not to be built"))
    phase = Phase("giant", Wide(10_000, 300), 10, 8)
    r = plan([phase], data, 0, COMPUTE, workers=2)
    assert r.refusal and "30 billion" in r.refusal
    assert "  not measured: an unsharded copy does not fit" in "\n".join(r.lines())
    assert json.loads(json.dumps(r.as_dict(), allow_nan=False))["refusal"]


def test_what_leaves_no_room_is_warned_of(monkeypatch):
    phase = Phase("p", Wide(1000), 10, 8)  # 16 MB of states
    for megabytes, warned in ((20, True), (800, False)):
        monkeypatch.setattr(planning, "_memory", lambda compute, m=megabytes: (m * 10**6, "a device"))
        warnings = check_fits([phase], COMPUTE)
        assert bool(warnings) == warned
    monkeypatch.setattr(planning, "_memory", lambda compute: (15 * 10**6, "a device"))
    with pytest.raises(UserError, match="take 16 MB on every worker at ZeRO 0, .* a device has 15 MB"):
        check_fits([phase], COMPUTE)


def test_a_checkpoints_copy_is_what_is_copied():
    """To the byte: of three networks, an average and a memory, after a step."""
    phase = Phase("p", Copied(), 10, 8)
    networks = Networks(phase, 0, COMPUTE)
    networks.build_engines(10)
    for name in networks.engines:
        with networks.training(name):
            networks.engines[name].backward(networks[name](torch.ones(4, 3, 5, 5)).sum(), last=True)
            networks.engines[name].step(0)
    files = _copies(networks)
    assert len(files) == 4
    copied = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    assert PhasePlan(phase, sizes_of(phase), COMPUTE, None).copied == copied > 0


def test_workers_on_a_cpu_share_a_checkpoints_copy():
    """A billion elements with AdamW: 12 GB on rank 0's host, for which a GPU needs no room of its own."""
    gpu = report(1e9, 80).phases[0]
    cpu = dataclasses.replace(gpu, compute=dataclasses.replace(COMPUTE, workers=4))
    assert gpu.copied == cpu.copied == 12 * GB + 4
    assert (gpu.copy_share(), cpu.copy_share(), cpu.copy_share(1)) == (0, 3 * GB + 1, 12 * GB + 4)
    for place in (Place(0), Place(3)):
        assert cpu.needed(place) == gpu.needed(place) + 3 * GB + 1
    room = round(gpu.needed(Place(0)) / 0.9)
    fits = [PlanReport((p,), p.compute, "it", room + 9, room + 9).fits(Place(0)) for p in (gpu, cpu)]
    assert fits == [True, False]


def test_the_table_names_a_checkpoints_copy():
    """In brackets, as what is offloaded, where it is not on the device; nothing is cut off at the widest."""
    gpu = report(1e9, 80, activations=5, zero_stage=3, offload=True)
    compute = dataclasses.replace(COMPUTE, workers=4)
    phase = dataclasses.replace(gpu.phases[0], compute=compute)
    cpu = PlanReport((phase,), compute, "this machine", 80 * GB, 320 * GB)
    rows = [next(line for line in r.lines() if "checkpoint's copy" in line) for r in (gpu, cpu)]
    assert rows[0].split() == ["(checkpoint's", "copy)", *["12.0", "GB"] * 6]
    assert rows[1].split() == ["checkpoint's", "copy", *["3.0", "GB"] * 4]
    texts = ["\n".join(r.lines()) for r in (gpu, cpu)]
    assert "written from a copy of 12.0 GB in the memory of rank 0's host\n" in texts[0]
    assert "written from a copy of 12.0 GB in the memory of rank 0's host, shared by 4 workers\n" in texts[1]
    assert "…" not in texts[0] and max(map(len, texts[0].split("\n"))) <= 100
    assert [r.as_dict()["phases"]["p"]["checkpoint_copy_bytes"] for r in (gpu, cpu)] == [12 * GB + 4] * 2


def test_a_plan_is_that_of_the_run(manifest, data, tmp_path):
    """Its parameters and disk are those of real checkpoints, its costs what is measured, its table fits a terminal."""
    config = recipe(manifest, supcon__steps=3, head__steps=4)
    compute = dataclasses.replace(COMPUTE, workers=2, zero_stage=2)
    r = plan(config.phases(data), data, 3, compute)
    found = json.loads(json.dumps(r.as_dict(), allow_nan=False))
    assert (found["asked"], found["advised"], found["refusal"]) == ("ZeRO 2", "ZeRO 0", None)
    fit = make_fit(config, tmp_path, data=data)
    list(fit.run())
    for phase in fit.phases:
        shown, last = found["phases"][phase.name], fit.checkpoints(phase.name).find("last")
        assert last is not None
        weights = sum(path.stat().st_size for path in last.glob("*.safetensors"))
        assert shown["measured"]["disk_bytes"] == pytest.approx(3 * weights, rel=0.05)
        copied = sum(tensor.nbytes for path in last.glob("*.safetensors") for tensor in load_file(path).values())
        assert shown["checkpoint_copy_bytes"] == copied
        assert set(shown["bytes"]) == {"ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"}  # a CPU has nowhere to offload to
        assert shown["seconds"] > shown["steps"] * shown["measured"]["step_seconds"]
    supcon = found["phases"]["supcon"]
    again = measure(fit.phases[0], data, 3, compute)
    assert supcon["measured"]["activation_bytes"] == again.activation_bytes > 0
    assert supcon["measured"]["flops_per_sample"] == again.flops_per_sample > 0
    assert found["phases"]["head"]["trained_parameters"] == {"encoder": 0, "head": 129}
    assert 0 < supcon["mfu"] < 1.5 and supcon["measured"]["peak_source"] == "measured matmul"
    assert len(supcon["weak_scaling"]) == 5
    lines = r.lines()
    assert any(line.startswith("ZeRO 3: networks are built, and scored, whole on every device") for line in lines)
    assert max(map(len, lines)) <= 100 and any(line.startswith("advice  ZeRO 0: needs") for line in lines)
    assert any("advised" in line and "asked" in line for line in lines)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_activations_are_near_what_autograd_keeps(manifest, data):
    phase = recipe(manifest).phases(data)[0]
    gpu = measure(phase, data, 3, dataclasses.replace(COMPUTE, device="cuda")).activation_bytes
    cpu = measure(phase, data, 3, COMPUTE).activation_bytes
    assert 0.7 * cpu < gpu < 4 * cpu  # with temporary buffers and workspaces
