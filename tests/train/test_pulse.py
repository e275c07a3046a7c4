"""When workers look at each other, and checkpoints between evaluations."""

import multiprocessing
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import make_fit, recipe

from raymed.train.compute import Compute
from raymed.train.pulse import Pulse

FORK = multiprocessing.get_context("fork")


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
    pulse = Pulse(lambda: looks.append(round(now[0], 1)) is not None, minutes=60, device=torch.device("cpu"))
    for _ in range(21):
        now[0] += 0.1
        pulse.after_step()
    assert looks == [0.1, 1.1, 2.1]
    for _ in range(13):
        now[0] += 3
        pulse.after_step()
    assert looks == [0.1, 1.1, 2.1, 32.1, 35.1, 38.1, 41.1]


@pytest.mark.parametrize(("seconds", "looks"), [(30, [1, 2, 3, 4]), (0.7, [1, 3, 5, 7]), (0.15, [1, 11, 21, 31])])
def test_a_start_with_slow_steps_is_looked_after_from_the_first(seconds, looks, monkeypatch):
    now, seen = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("raymed.train.pulse.world_size", lambda: 2)
    monkeypatch.setattr("raymed.train.pulse.max_over_ranks", lambda values, device: list(values))
    pulse = Pulse(lambda: seen.append(round(now[0] / seconds)) is not None, minutes=60, device=torch.device("cpu"))
    for _ in range(39):
        now[0] += seconds
        pulse.after_step()
    assert seen[:4] == looks


def worker(rank: int, folder: Path, answers) -> None:
    """Steps of 0.1 s on rank 0, which is to stop from the sixth on, and of 0.6 s on rank 1, by clocks of their own.
    Answers with the steps at which this one looked, and the one at which it stopped."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    now, looks, seconds = [0.0], [], (0.1, 0.6)[rank]
    time.monotonic = lambda: now[0]

    def interrupted() -> bool:
        looks.append(round(now[0] / seconds))
        return rank == 0 and looks[-1] >= 6

    pulse = Pulse(interrupted, minutes=60, device=torch.device("cpu"))
    stopped = False
    while not stopped:
        now[0] += seconds
        stopped, _ = pulse.after_step()
    answers.put((rank, looks, round(now[0] / seconds)))
    dist.destroy_process_group()


def test_the_slowest_says_how_often_and_all_stop_at_the_same_step(tmp_path):
    """Three steps of 0.6 s fit into two seconds."""
    answers = FORK.Queue()
    workers = [FORK.Process(target=worker, args=(rank, tmp_path, answers)) for rank in range(2)]
    for process in workers:
        process.start()
    said = sorted(answers.get(timeout=60) for _ in workers)
    for process in workers:
        process.join()
    assert said == [(0, [1, 4, 7], 7), (1, [1, 4, 7], 7)]


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
