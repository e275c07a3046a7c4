"""Estimates: measured costs are those of real training, nothing is left behind, and the sums are right."""

import dataclasses
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import curve, make_fit, recipe
from torch import nn

from raymed.config import UserError
from raymed.tasks.task import Ema, Loss, Network, Optim, Phase, Task
from raymed.train.compute import Compute
from raymed.train.plans import estimate
from raymed.train.plans.estimate import Plan, StepCost, Trainings, in_bytes, in_time, measure, trials_per_gpu

COMPUTE = Compute(threads=1)
GB = 10**9
COST = StepCost(0.5, 2.0, 3.0, 4 * GB, GB, "cpu")


def test_measuring_leaves_nothing_behind(manifest, data, tmp_path):
    """Torch's generator, the number of threads, the files; and a run is the same to the bit with it and without."""
    phases = recipe(manifest, supcon__steps=6, head__steps=6).phases(data)
    files = sorted(Path(manifest).parent.rglob("*"))
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    costs = [measure(phase, data, 3, COMPUTE, threads=k) for k, phase in ((1, phases[0]), (2, phases[1]))]
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert sorted(Path(manifest).parent.rglob("*")) == files
    assert all(cost.step_seconds > 0 and cost.evaluation_seconds > 0 and cost.setup_seconds > 0 for cost in costs)

    for name, measured in (("plain", False), ("measured", True)):
        fit = make_fit(recipe(manifest), tmp_path / name, data=data)
        fit.phases = phases
        for evaluation in fit.run():
            if measured and evaluation.number == 2:
                measure(phases[0], data, 3, COMPUTE)
    assert curve(tmp_path / "plain") == curve(tmp_path / "measured")


@pytest.mark.parametrize("number", [0, 1], ids=["supcon", "head"])
def test_disk_is_that_of_the_checkpoints(manifest, data, tmp_path, number):
    config = recipe(manifest, supcon__steps=3, head__steps=4)
    fit = make_fit(config, tmp_path, data=data)
    list(fit.run())
    phase = fit.phases[number]
    last = fit.checkpoints(phase.name).find("last")
    kept = sum(path.stat().st_size for path in last.glob("*.safetensors"))
    assert measure(phase, data, 3, COMPUTE).disk_bytes == pytest.approx(3 * kept, rel=0.05)


@dataclasses.dataclass
class Slow(Task):
    """Known times and sizes: each step, scored batch and frozen batch sleeps, and a step holds some memory."""

    step: float = 0.0
    score: float = 0.0
    freeze: float = 0.0
    megabytes: int = 0
    seen: list = dataclasses.field(default_factory=list)

    def networks(self):
        return {"net": Network(nn.Linear(1000, 1000, bias=False), Optim("adamw"), Ema(0.9))}

    def frozen(self, batch, nets):
        time.sleep(self.freeze * len(batch))
        return {"net": torch.zeros(len(batch), 5)}

    def losses(self, step, nets):
        self.seen.append([len(batch) for batch in step.micro])
        held = torch.ones(self.megabytes * 2**18)
        time.sleep(self.step)
        with nets.training("net"):
            value = nets["net"](torch.ones(1000)).mean() + held[:1].sum() * 0
            yield Loss("net", value, {"loss": value.detach()})

    def predict(self, batch, nets):
        time.sleep(self.score * len(batch))
        return {}


def test_times_are_those_of_what_is_done(data):
    num_val, num = len(data.splits["val"]), len(data)
    phase = Phase("slow", Slow(0.1, 0.01, 0.005), steps=100, batch_size=8, cache=True)
    cost = measure(phase, data, 0, COMPUTE)
    for seconds, least in (
        (cost.step_seconds, 0.1),
        (cost.evaluation_seconds, 0.01 * num_val),
        (cost.setup_seconds, 0.005 * num),
    ):
        assert least <= seconds < 1.5 * least + 0.05  # what comes on top is the machine's


def test_memory_is_the_most_a_step_holds(data):
    peaks = [measure(Phase("p", Slow(0.02, megabytes=m), 9, 8), data, 0, COMPUTE).peak_bytes for m in (1, 257)]
    assert peaks[1] - peaks[0] == pytest.approx(256 * 2**20, rel=0.15)
    assert peaks[0] > 100e6  # Python and torch are in it


def test_weights_averages_and_states_count_twice(data):
    """Weights, averages and AdamW's two moments of a million numbers, of 4 bytes, in two checkpoints."""
    assert measure(Phase("p", Slow(), 9, 8), data, 0, COMPUTE).disk_bytes == pytest.approx(3 * 4 * 4e6, rel=1e-4)


def test_a_worker_has_its_share_of_each_micro_batch(data):
    task = Slow()
    measure(Phase("p", task, 1, 12, accumulate=2), data, 0, dataclasses.replace(COMPUTE, workers=3))
    steps = [seen for seen in task.seen if len(seen) == 2]
    assert len(steps) >= 3 and steps == [[2, 2]] * len(steps)
    assert [seen for seen in task.seen if len(seen) != 2] == [[2]] * 2  # for FLOPs, and for activations


@pytest.mark.parametrize(("stated", "given", "expected"), [(1, 2, 1), (None, 2, 2), (3, None, 3)])
def test_the_threads_are_those_of_the_training(data, monkeypatch, stated, given, expected):
    """As compute.threads says; else as many as a worker is given."""
    seen, kept = [], torch.get_num_threads()
    monkeypatch.setattr(
        estimate, "_Trial", lambda *_: SimpleNamespace(cost=lambda: seen.append(torch.get_num_threads()))
    )
    measure(Phase("p", Slow(), 9, 8), data, 0, dataclasses.replace(COMPUTE, threads=stated), given)
    assert seen == [expected] and torch.get_num_threads() == kept


def test_several_workers_take_as_much_memory_each():
    cost = dataclasses.replace(COST, workers=3)
    assert Trainings("heads", 8, [(phase(20, 1), cost), (phase(1, 1), COST)], at_once=2).memory_bytes == 24 * GB


def test_an_unsharded_copy_is_measured_whatever_the_engine(data):
    compute = dataclasses.replace(COMPUTE, engine="deepspeed", zero_stage=3, offload=True, network_stages=("net=2",))
    cost = measure(Phase("p", Slow(megabytes=1), 9, 8), data, 0, compute)
    assert cost.disk_bytes == pytest.approx(3 * 4 * 4e6, rel=1e-4) and cost.workers == 1


@dataclasses.dataclass
class Wide(Task):
    """A network that keeps known tensors for its backward pass, and two losses one after the other."""

    def networks(self):
        return {"net": Network(nn.Linear(100, 50), Optim("sgd"))}

    def losses(self, step, nets):
        for batch in step.micro:
            with nets.training("net"):
                for last in (False, True):
                    value = nets["net"](torch.ones(len(batch), 100)).exp().sum()
                    yield Loss("net", value, {"loss": value.detach()}, step=last)

    def predict(self, batch, nets):
        return {}


def test_activations_are_those_of_a_micro_batch_once(data):
    """The input (6, 100) and the result of exp (6, 50), not the weights; the first loss's are gone when the second's
    are there. FLOPs of the two: x W forward and x' g for the weights, 2 x 100 x 50 each."""
    cost = measure(Phase("p", Wide(), 9, 12, accumulate=2), data, 0, COMPUTE)
    assert cost.activation_bytes == 4 * 6 * (100 + 50)
    assert cost.flops_per_sample == 2 * 2 * (2 * 100 * 50)


def phase(steps: int, evaluations: int) -> Phase:
    return Phase("p", Task(), steps, 8, evaluations=evaluations)


def test_sums():
    """Encoders: 3 rounds of 3 + 100 x 0.5 + 4 x 2 s. Heads: 2 rounds of (3 + 20 x 0.5 + 2) + (3 + 10 x 0.5 + 2)."""
    encoders = Trainings("encoders", 5, [(phase(100, 4), COST)], at_once=2)
    smaller = dataclasses.replace(COST, peak_bytes=GB)
    heads = Trainings("heads", 8, [(phase(20, 1), smaller), (phase(10, 1), smaller)], at_once=4)
    plan = Plan([encoders, heads])
    assert (encoders.seconds, heads.seconds, plan.seconds) == (183, 50, 233)
    assert (encoders.memory_bytes, heads.memory_bytes, plan.memory_bytes) == (8 * GB, 4 * GB, 8 * GB)
    assert plan.disk_bytes == 5 * GB + 16 * GB
    assert plan.lines(free_disk=40 * GB) == [
        "estimate: about 4 min, 8.0 GB memory at a time, 21.0 GB disk (free 40.0 GB)",
        "      3 min  5 encoders of 100 steps at 500 ms, 2 at a time",
        "       50 s  8 heads of 20 steps at 500 ms + 10 steps at 500 ms, 4 at a time",
    ]
    assert Trainings("encoders", 1, encoders.phases, at_once=2).memory_bytes == 4 * GB


def test_too_little_disk_is_refused_and_too_little_memory_said(monkeypatch, tmp_path, capsys):
    plan = Plan([Trainings("encoders", 5, [(phase(100, 4), COST)], at_once=2)])
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(estimate, "memory_bytes", lambda gpu: 7 * GB)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda folder: usage(6 * GB))
    plan.announce(tmp_path)
    said = capsys.readouterr().out
    assert "5.0 GB disk (free 6.0 GB)" in said and "warning: this machine has 7.0 GB memory" in said
    monkeypatch.setattr(estimate, "memory_bytes", lambda gpu: 9 * GB)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda folder: usage(4 * GB))
    with pytest.raises(UserError, match=r"has 4.0 GB free, and this needs about 5.0 GB: .*--storage PATH"):
        plan.announce(tmp_path)
    assert "warning" not in capsys.readouterr().out
    Plan([Trainings("encoders", 0, [(phase(100, 4), COST)])]).announce(tmp_path)
    assert capsys.readouterr().out == ""  # all finished: nothing is to come


def test_trials_per_gpu():
    """A trial of 2 GB takes 2.2 GB and the context's 0.63."""
    assert trials_per_gpu(2 * GB, 80 * GB, at_most=100) == 28
    assert trials_per_gpu(2 * GB, 80 * GB, at_most=8) == 8
    assert trials_per_gpu(70 * GB, 80 * GB, at_most=8) == 1
    assert trials_per_gpu(2 * GB, 80 * GB, at_most=100, headroom=1.0) == 17
    with pytest.raises(UserError, match="a trial needs about 88.6 GB GPU memory, and the GPU has 80.0 GB: lower"):
        trials_per_gpu(80 * GB, 80 * GB, at_most=8)


def test_words():
    assert [in_time(s) for s in (0.2, 45, 89, 91, 720, 5399, 12600)] == [
        "1 s", "45 s", "89 s", "2 min", "12 min", "90 min", "3.5 h",
    ]  # fmt: skip
    assert [in_bytes(b) for b in (6_400, 2_500_000, 85e6, 999e6, 1.23e9, 40e9, 400e9)] == [
        "6 kB", "2.5 MB", "85 MB", "999 MB", "1.2 GB", "40.0 GB", "400 GB",
    ]  # fmt: skip
