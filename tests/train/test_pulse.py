"""When workers look at each other, and checkpoints between evaluations."""

import time

import torch
from small import make_fit, recipe

from raymed.train.compute import Compute
from raymed.train.pulse import Pulse


def test_one_worker_looks_after_every_step():
    asked = []
    pulse = Pulse(lambda: asked.append(1) is None and len(asked) == 3, minutes=60, device=torch.device("cpu"))
    assert [pulse.after_step() for _ in range(3)] == [(False, False), (False, False), (True, False)]


def test_a_checkpoint_is_due_when_the_last_is_too_old(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pulse = Pulse(lambda: False, minutes=1, device=torch.device("cpu"))
    now[0] += 59
    assert pulse.after_step() == (False, False)
    now[0] += 2
    assert pulse.after_step() == (False, True)
    pulse.saved()
    now[0] += 59
    assert pulse.after_step() == (False, False)


def test_several_look_after_ten_quick_steps_and_after_every_slow_one(monkeypatch):
    now, looks = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("raymed.train.pulse.world_size", lambda: 2)
    monkeypatch.setattr("raymed.train.pulse.max_over_ranks", lambda values, device: list(values))
    pulse = Pulse(lambda: looks.append(round(now[0])) is not None, minutes=60, device=torch.device("cpu"))
    for _ in range(20):
        now[0] += 0.1
        pulse.after_step()
    assert looks == [1, 2]
    for _ in range(13):
        now[0] += 3
        pulse.after_step()
    assert looks == [1, 2, 32, 35, 38, 41]


def test_checkpoints_between_evaluations(manifest, data, tmp_path):
    """With evaluations at the end only, what is saved lags the training by at most two steps: the one that is being
    written and the one that is being trained."""
    found = []

    def look() -> bool:
        last = fit.checkpoints("supcon").find("last")
        found.append(int(last.name.split("-")[1]) if last else 0)
        return False

    changes = {"supcon__evaluations": 1, "head__evaluations": 1}
    compute = Compute(checkpoint_minutes=1e-9)
    fit = make_fit(recipe(manifest, **changes), tmp_path, compute, data=data, interrupted=look)
    list(fit.run())
    assert all(step >= done - 2 for done, step in enumerate(found[:12], start=1))
    assert fit.checkpoints("supcon").find("last").name == "step-000012"
