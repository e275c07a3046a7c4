"""Real allocation failures: the phase goes on in smaller micro-batches, with the curve it would have had with them."""

import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch
from small import curve
from torch import nn

from raymed.config import UserError
from raymed.tasks.task import Loss, Network, Optim, Phase, Task
from raymed.tracking.outbox import Outbox
from raymed.train.compute import Compute
from raymed.train.loop import Fit
from raymed.train.out_of_memory import OutOfMemory, noticed

PHASE = Phase("tiny", Task(), steps=12, batch_size=8, evaluations=3)


class Greedy(nn.Linear):
    """Asks for more memory than any machine has when it trains on more than `most` images, after so many calls."""

    def __init__(self, most: int, patient: int):
        super().__init__(256, 1)
        self.most, self.calls_left = most, patient

    def forward(self, x):
        if self.training:
            self.calls_left -= 1
            if len(x) > self.most and self.calls_left < 0:
                torch.empty(2**60, dtype=torch.uint8)
        return super().forward(x).square().mean()


@dataclass
class Hungry(Task):
    """Trains a Greedy network, and knows which ones are alive."""

    most: int
    patient: int = 0
    alive: list = field(default_factory=list)

    def networks(self):
        assert not any(made() for made in self.alive), "the networks that ran out of memory still hold theirs"
        module = Greedy(self.most, self.patient)
        self.alive.append(weakref.ref(module))
        return {"net": Network(module, Optim("adamw", lr=1e-2))}

    def losses(self, step, nets):
        with nets.training("net"):
            for k, batch in step.batches():
                value = nets["net"](batch.unit_image().flatten(1)) / len(step.micro)
                yield Loss("net", value, {"loss": value.detach()}, step=k == len(step.micro) - 1)

    def predict(self, batch, nets):
        return {}


def make_fit(data, folder, task, **phase) -> Fit:
    changed = replace(PHASE, **({"task": task} | phase))
    return Fit([changed], data, folder, 0, Compute(channels_last=False), Outbox(folder / "outbox.jsonl"))


@pytest.fixture(scope="module")
def halves(data, tmp_path_factory):
    """The curve with two micro-batches from the start."""
    folder = tmp_path_factory.mktemp("halves")
    list(make_fit(data, folder, Hungry(most=8), accumulate=2).run())
    return curve(folder)


def test_the_curve_is_that_of_half_the_micro_batch(halves, data, tmp_path, capsys):
    fit = make_fit(data, tmp_path, Hungry(most=4))
    assert [(e.step, e.number) for e in fit.run()] == [(4, 1), (8, 2), (12, 3)]
    assert curve(tmp_path) == halves  # to the bit
    what = "out of memory at step 1 of phase tiny: it goes on from its last checkpoint with 2 micro-batches of 4 a step"
    assert capsys.readouterr().out.strip() == what
    tags = [r["tags"] for r in fit.outbox.records() if r["op"] == "tags"]
    assert tags == [{"raymed.out_of_memory.tiny": "out of memory at step 1 of phase tiny: 2 micro-batches of 4 a step"}]


def test_later_in_the_run_it_goes_on_at_the_last_checkpoint(halves, data, tmp_path):
    """Steps 1 to 4 in one batch, 5 and 6 lost, 5 to 12 in two micro-batches."""
    fit = make_fit(data, tmp_path, Hungry(most=4, patient=6))
    assert [(e.step, e.number) for e in fit.run()] == [(4, 1), (8, 2), (12, 3)]
    found = curve(tmp_path)
    assert [step for step, _ in found] == [step for step, _ in halves]
    for (_, values), (_, expected) in zip(found, halves, strict=True):
        assert values == pytest.approx(expected, rel=1e-5)


def test_the_second_time_it_says_what_to_change(data, tmp_path):
    fit = make_fit(data, tmp_path, Hungry(most=2))
    with pytest.raises(UserError, match="again, with 2 micro-batches a step: set --tiny.accumulate to 4 or more"):
        list(fit.run())


def test_an_odd_batch_cannot_be_halved(data, tmp_path):
    fit = make_fit(data, tmp_path, Hungry(most=2), batch_size=9)
    with pytest.raises(UserError, match="step 1 of phase tiny, and its batch of 9 cannot be cut into 2 micro-batches"):
        list(fit.run())


def test_several_workers_end(monkeypatch):
    monkeypatch.setattr("raymed.train.out_of_memory.world_size", lambda: 2)
    with (
        pytest.raises(UserError, match="step 6 of phase tiny on worker 0: set --tiny.accumulate to 2"),
        noticed(PHASE, 5),
    ):
        torch.empty(2**60)


def test_only_memory_is_taken_for_memory():
    with pytest.raises(OutOfMemory), noticed(PHASE, 0):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    with pytest.raises(RuntimeError, match="inplace"), noticed(PHASE, 0):
        raise RuntimeError("a leaf Variable that requires grad is being used in an inplace operation")
