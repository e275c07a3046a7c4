"""Nothing waits for ever, and nothing is tried again that cannot succeed."""

import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pytest
from nodes import Nodes, title_of
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError
from torch import nn
from train_on_nodes import unit_in

from raymed.config import UserError, replace
from raymed.tasks.task import Network, Optim, Phase, Task
from raymed.train.loop import Interrupted
from raymed.train.places import ray_train
from raymed.train.places.cluster import fetched
from raymed.train.places.desk import open_desk
from raymed.train.places.ray_train import _Group, _Training, is_death, train_with_workers, what_failed
from raymed.train.places.room import Nodes as RoomNodes
from raymed.train.places.room import await_room
from raymed.train.runs.budget import Budget
from raymed.train.unit import Unit

pytestmark = pytest.mark.ray
DRIVER = Path(__file__).with_name("train_on_nodes.py")
STEPS = {"steps": 400, "evaluations": 10}


@pytest.mark.slow
def test_a_missing_node_is_waited_for_and_named(tmp_path):
    """The second of two nodes is lost and none comes; then one comes in time."""
    arguments = json.dumps(STEPS | {"workers": 2})
    with Nodes(tmp_path / "cluster") as nodes:
        node = nodes.add_node()
        driver = nodes.driver(DRIVER, tmp_path, arguments, RAYMED_NODE_PATIENCE="8")
        driver.evaluates(1)
        nodes.kill_node(node)
        began = time.monotonic()
        assert driver.wait() != 0
        assert time.monotonic() - began < 8 + 60
        assert (
            "waiting, 8 s at most: this needs 2 x 1 CPU; the cluster has 1 CPU (1 free) on 1 node(s)" in driver.said()
        )
        last = driver.said().strip().splitlines()[-1]
        assert "NoRoom: this needs 2 x 1 CPU; the cluster has 1 CPU (1 free) on 1 node(s); lost: " in last
        assert "Start a node, or lower --compute.workers" in last and "the same command continues" in last
        assert not nodes.head.workers()

        node = nodes.add_node()
        driver = nodes.driver(DRIVER, tmp_path, arguments)
        driver.evaluates(1)
        nodes.kill_node(node)
        driver.says("waiting, 600 s at most: this needs 2 x 1 CPU")
        nodes.add_node()
        driver.says("room for 2 workers")
        assert driver.wait() == 0, driver.said()
    assert unit_in(tmp_path, **STEPS).result() is not None


@pytest.mark.slow
def test_what_a_worker_finds_wrong_ends_the_run_at_once(ray_cluster, tmp_path, capsys):
    """Not after three more tries, and in the words of the worker alone."""
    unit = unit_in(tmp_path, steps=20, workers=2)
    unit = replace(unit, {"recipe.single.optim.lr": 1e30, "recipe.single.optim.clip": None})

    with pytest.raises(UserError, match=r"^training became not finite at step \d+ of phase single") as error:
        train_with_workers(unit, Budget.from_config(None, None, tmp_path))

    assert "Traceback" not in str(error.value)
    assert "goes on" not in capsys.readouterr().out


def test_a_user_error_of_a_task_comes_back_in_its_own_words(ray_cluster):
    import ray

    @ray.remote
    def refuse(kind: type) -> None:
        raise kind("there is no such file")

    with pytest.raises(UserError) as refused:
        fetched(refuse.remote(UserError))
    assert str(refused.value) == "there is no such file"
    with pytest.raises(ValueError, match="there is no such file"):
        fetched(refuse.remote(ValueError))
    assert fetched(ray.put(7)) == 7


@dataclass
class Killer:
    """Kills a worker as soon as a step of it is written down, then those that come after it. Called by the driver each
    second in place of whether it is interrupted, which it is from a number of kills on."""

    unit: Unit
    interrupts_at: float = math.inf
    kills: int = 0
    size: int = 0

    def __call__(self) -> bool:
        path = self.unit.outbox.path
        size = path.stat().st_size if path.exists() else 0
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in title_of(p)]
        if workers and size > self.size and "single/loss" in path.read_text()[self.size :]:
            workers[0].kill()
            self.kills, self.size = self.kills + 1, size + 100_000
        elif not workers:
            self.size = size
        return self.kills >= self.interrupts_at


@pytest.mark.slow
def test_workers_that_die_again_and_again_end_the_run_in_words(ray_cluster, tmp_path, capsys):
    unit = unit_in(tmp_path, steps=100_000, evaluations=1, workers=2)
    killer = Killer(unit)
    with pytest.raises(
        UserError, match=r"workers died 3 times in a row without an evaluation between, last: "
    ) as error:
        train_with_workers(unit, Budget.from_config(None, None, tmp_path), killer)
    said = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("unit: ") and "images/s" not in line
    ]

    assert killer.kills == 3 and "the machine may lack memory" in str(error.value).lower()
    died = r"(worker [01] died \(PID \d+ on [\d.]+\)|a worker died \(worker [01] has lost its connection to another\))"
    assert len(said) == 2, said
    assert all(re.fullmatch(f"unit: {died}; it goes on from the last checkpoint", line) for line in said), said

    with pytest.raises(Interrupted):
        train_with_workers(unit, Budget.from_config(None, None, tmp_path), Killer(unit, interrupts_at=1))
    [said] = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("unit: ") and "images/s" not in line
    ]
    assert re.fullmatch(f"unit: {died}; the last checkpoint is kept", said), said


def test_a_group_that_could_not_shrink_is_refused_before_it_starts(ray_cluster, tmp_path, monkeypatch):
    """By the memory where a worker would run. Twelve terabytes of weights fit nowhere."""

    class Giant(Task):
        def networks(self) -> dict[str, Network]:
            return {"net": Network(nn.Sequential(*(nn.Linear(10**6, 10**6, bias=False) for _ in range(3))), Optim())}

    phases = [Phase("giant", Giant(), 10, 8)]
    monkeypatch.setattr(ray_train, "phases_of", lambda unit, data: phases)
    unit = unit_in(tmp_path, steps=20, workers=2, min_workers=1, zero_stage=2)
    message = r"^compute.min_workers is 1, but with so many phase giant needs \d+ GB .* at ZeRO 0, without activations"
    with pytest.raises(UserError, match=message):
        train_with_workers(unit, Budget.from_config(None, None, tmp_path))


def _died(pid: int = 0) -> WorkerHealthCheckFailedError:
    """What Ray Train says of a worker whose process is gone."""
    where = f"\n\tclass_name: RayTrainWorker\n\tpid: {pid}\n\tip: 10.0.0.7" if pid else ""
    return WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError(f"The actor died.{where}"))


GLOO = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]")
LATE = RuntimeError("[../third_party/gloo/gloo/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation")
NCCL = RuntimeError("NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:77, invalid usage")


@pytest.mark.parametrize(
    ("failures", "death", "said"),
    [
        ({0: GLOO, 1: _died(41)}, True, "worker 1 died (PID 41 on 10.0.0.7)"),
        ({0: _died(), 2: _died(41), 1: GLOO}, True, "worker 0 died, worker 2 died (PID 41 on 10.0.0.7)"),
        ({3: GLOO, 2: GLOO}, True, "a worker died (worker 2 has lost its connection to another)"),
        ({0: GLOO, 1: ValueError("no such\nimage")}, False, "worker 1 failed (ValueError: no such)"),
        ({0: _died(41), 1: ValueError("no")}, False, "worker 0 died (PID 41 on 10.0.0.7)"),
        ({1: LATE}, False, "worker 1 failed (RuntimeError: Timed out waiting 1800000ms for recv operation)"),
        ({1: NCCL}, False, "worker 1 failed (RuntimeError: NCCL error in: invalid usage)"),
        ({}, False, "Ray Train failed (WorkerGroupError: Training failed due to worker errors:)"),
    ],
)
def test_a_failure_in_a_line(failures, death, said):
    error = WorkerGroupError("ended", failures)
    assert what_failed(error) == said
    assert is_death(error) == death


def test_lost_nodes_are_not_counted(tmp_path):
    """Nor what came before them, or before an evaluation."""
    unit, nodes = unit_in(tmp_path, steps=20), cast(RoomNodes, None)
    training = _Training(unit, Budget.from_config(None, None, tmp_path), lambda: False, [2], {"CPU": 1.0}, nodes)

    def count(lost: bool = False, evaluations: int = 0, **failures: Exception) -> None:
        group = SimpleNamespace(error=WorkerGroupError("", {"0": GLOO} | failures), evaluations=evaluations)
        training._count(cast(_Group, group), "x", lost)

    for lost in (False, False, True, True, True, False, False):
        count(lost)
    count(evaluations=1)
    count()
    with pytest.raises(UserError, match="died 3 times in a row without an evaluation between, last: x. The machine"):
        count()
    training.deaths = []
    count(), count(other=ValueError("no"))
    with pytest.raises(WorkerGroupError):
        count()


def test_sizes_that_the_cluster_cannot_have_cost_no_time(ray_cluster):
    """Each would be tried for seconds; and none is when it is over."""
    began = time.monotonic()
    sizes = range(64, 0, -1)
    assert await_room({"CPU": 1.0}, sizes, RoomNodes(), lambda: False, 600) == 2
    assert await_room({"CPU": 1.0}, sizes, RoomNodes(), lambda: True, 600) is None
    assert time.monotonic() - began < 30


def test_at_the_desk_all_wait_for_the_last(ray_cluster):
    import ray

    desk = open_desk(3)
    first = [desk.ready.remote(), desk.ready.remote()]
    assert ray.wait(first, timeout=0.5)[0] == []
    assert ray.get([*first, desk.ready.remote()], timeout=60) == [None] * 3
    ray.kill(desk)
