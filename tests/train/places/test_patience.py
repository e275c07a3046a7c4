"""How long a training waits for nodes that are missing, and who says so. No Ray: no group finds its place here."""

import json
from contextlib import nullcontext
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any, cast

import pytest

from raymed.config import UserError
from raymed.train.compute import Compute
from raymed.train.places import launch, ray_train, room
from raymed.train.places.ray_train import _Training
from raymed.train.runs.budget import Budget


def test_a_run_says_it_then_the_cluster(monkeypatch):
    monkeypatch.delenv("RAYMED_NODE_PATIENCE", raising=False)
    assert room.patience(None) == 600
    monkeypatch.setenv("RAYMED_NODE_PATIENCE", "1800")
    assert room.patience(None) == 1800
    assert room.patience(0) == 0


def test_a_training_waits_as_long_as_its_config_says_and_names_the_flag(monkeypatch):
    monkeypatch.setenv("RAYMED_NODE_PATIENCE", "600")
    monkeypatch.setattr(room, "_largest", lambda *_: None)
    monkeypatch.setattr(room, "_there", lambda _: 1)
    monkeypatch.setattr(room, "place", lambda *_: nullcontext(SimpleNamespace(wait=lambda _: False)))
    unit = SimpleNamespace(result=lambda: None, compute=Compute(workers=2, node_patience=0))
    seen = SimpleNamespace(shortage=lambda *_: "this needs 2 x 1 CPU")
    training = _Training(*cast(Any, (unit, None, lambda: False, [2], {"CPU": 1.0}, seen)))
    training._over = lambda: False
    with pytest.raises(UserError, match=r"^this needs 2 x 1 CPU; waited 0 s \(--compute.node-patience SECONDS changes"):
        training.run()


def test_others_work_is_waited_for_without_end_and_nodes_from_when_they_went(monkeypatch, capsys):
    """Two hours of other work; then its only node is lost, and half an hour is to be waited for another one."""
    clock = [0.0]

    def look(_) -> bool:
        clock[0] += 60.0
        return False

    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(room, "_largest", lambda *_: None)
    monkeypatch.setattr(room, "_there", lambda _: int(clock[0] <= 7200))
    monkeypatch.setattr(room, "place", lambda *_: nullcontext(SimpleNamespace(wait=look)))
    seen = cast(Any, SimpleNamespace(shortage=lambda *_: "this needs 1 CPU"))
    with pytest.raises(UserError, match="waited 1860 s"):
        room.await_room({"CPU": 1.0}, [1], seen, lambda: False, 1800)
    assert clock[0] == 7200 + 1860
    told = capsys.readouterr().out.splitlines()
    assert told == [f"waiting, {what}: this needs 1 CPU" for what in ("for other work to end", "1800 s at most")]


def test_a_group_whose_room_has_gone_is_no_failure(capsys):
    """However often others are faster; a group that fails otherwise is one."""
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    unit = SimpleNamespace(name="one", result=lambda: None)
    training = _Training(*cast(Any, (unit, None, lambda: False, [1], {"CPU": 1.0}, SimpleNamespace(look=list))))
    training._over = lambda: False
    for _ in range(5):
        training._account(cast(Any, SimpleNamespace(error=ControllerError(WorkerGroupStartupTimeoutError(1)))), None)
    assert training.deaths == [] and capsys.readouterr().out == ""
    failed = ControllerError(ValueError("broken"))
    training._account(cast(Any, SimpleNamespace(error=failed, evaluations=0)), None)
    assert training.deaths == [False] and "broken" in capsys.readouterr().out


def test_a_node_that_goes_while_a_group_waits_for_its_place_is_told_and_counts_for_nothing(capsys):
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    unit, seen = SimpleNamespace(name="one", result=lambda: None), SimpleNamespace(look=lambda: ["a node at noon"])
    training = _Training(*cast(Any, (unit, None, lambda: False, [1], {"CPU": 1.0}, seen)))
    training._over, training.deaths = lambda: False, [True, True]
    group = SimpleNamespace(error=ControllerError(WorkerGroupStartupTimeoutError(1)), evaluations=0)
    training._account(cast(Any, group), None)
    assert training.deaths == []
    assert capsys.readouterr().out == "one: node lost: a node at noon; it goes on from the last checkpoint\n"


def test_gpus_count_from_when_the_workers_have_their_place(monkeypatch, tmp_path):
    """A clock that only waiting moves: three looks before they arrive, four after."""
    clock, looks = [0.0], iter([False] * 7 + [True])

    class Group:
        error, ended = None, ""

        def __init__(self, *_) -> None:
            self.looked = 0

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            assert self.looked == 7

        def wait(self, seconds: float) -> bool:
            ended = next(looks)
            self.looked += not ended
            clock[0] += 0 if ended else 3600.0
            return ended

        def has_arrived(self) -> bool:
            return self.looked >= 3

        def node_ids(self) -> list[str]:
            return []

    results = chain([None], repeat({}))
    unit = SimpleNamespace(name="one", compute=Compute(workers=2), result=lambda: next(results))
    budget = Budget.from_config(None, None, tmp_path, lambda: clock[0])
    monkeypatch.setattr(ray_train, "_Group", Group)
    monkeypatch.setattr(ray_train, "await_room", lambda *_: 2)
    monkeypatch.setattr(ray_train, "draining", set)
    bundle = {"CPU": 1.0, "GPU": 1.0}
    assert _Training(*cast(Any, (unit, budget, lambda: False, [2], bundle, SimpleNamespace(look=list)))).run()
    assert json.loads((tmp_path / "budget.json").read_text()) == {"seconds": 7 * 3600, "gpu_hours": 2 * 4}


def test_the_threads_of_an_estimate_are_those_of_the_training(monkeypatch):
    """Each of several workers has what is stated, a lone one what is free, and those side by side a share that any
    node has."""
    monkeypatch.setattr(launch, "gpus_of", lambda _: 0)
    monkeypatch.setattr(launch, "free_cpus", lambda stated, gpus: 64)
    monkeypatch.setattr(launch, "cpus_for", lambda stated, gpus, count: 16 // count)
    several, lone = (cast(Any, SimpleNamespace(compute=Compute(workers=workers))) for workers in (4, 1))
    assert launch._resources(several, 1, True) == (1, 0)
    assert launch._resources(lone, 1, True) == (64, 0)
    assert launch._resources(lone, 4) == (4, 0)


def test_a_time_before_now_is_refused():
    with pytest.raises(UserError, match="compute.node_patience must be >= 0"):
        Compute(node_patience=-1)
