"""What a job that was submitted to a cluster trains, its workers train, and be it one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from nodes import Nodes, wait_for

from raymed.train.places import cluster
from raymed.train.places.cluster import cpus_for, free_cpus, is_submitted

pytestmark = pytest.mark.ray
JOB = Path(__file__).resolve().parents[2] / "jobs" / "train_classifier.py"
SMALL = (
    "--method=asl --data.preprocess.size=32 --single.batch-size=32 --single.steps=12 --single.evaluations=3 --name=one"
)
_ENDLESS = "--method=asl --data.preprocess.size=32 --single.steps=100000 --single.evaluations=1 --name=endless"


@pytest.mark.slow
def test_one_worker_is_on_a_node_for_work_and_a_second_job_waits_for_it(tmp_path):
    """The head has no CPU. Longer than it would wait for nodes that are missing."""
    with Nodes(tmp_path / "cluster", cpus=0) as nodes:
        node = nodes.add_node(cpus=2)
        first = nodes.driver(JOB, *_ENDLESS.split(), RAYMED_NODE_PATIENCE="1")
        wait_for(lambda: node.workers() or first.process.poll() is not None, 300, first.said())
        assert len(node.workers()) == 1 and not nodes.head.workers(), first.said()
        second = nodes.driver(JOB, *SMALL.split(), RAYMED_NODE_PATIENCE="1")
        second.says("waiting: only 0 of 2 CPU is free now, the rest is in use by other work on this cluster")
        first.process.terminate()
        first.says("the same command continues")
        assert second.wait() == 0, second.said()
    result = json.loads((tmp_path / "cluster/raymed/runs/one/seed-2023/result.json").read_text())
    assert 0 <= result["test"]["auroc"] <= 1
    assert re.search(r"\(RayTrainWorker pid=\d+\).* seed-2023  single  step    12 ", second.said()), second.said()


def test_a_lone_training_takes_what_is_free_and_never_less_than_it_asks_for(ray_cluster):
    import ray

    @ray.remote
    class Holder:
        def hold(self) -> bool:
            return True

    assert (cpus_for(1), cpus_for(1, count=2), cpus_for(2, count=2), cpus_for(8)) == (2, 1, 2, 8)
    holders: list[Any] = [Holder.options(num_cpus=1).remote() for _ in range(2)]
    assert ray.get(holders[0].hold.remote()) and ray.get(holders[1].hold.remote())
    assert cpus_for(1) == 2, "nothing is free: as if nobody used the nodes"
    ray.kill(holders.pop())
    wait_for(lambda: cpus_for(1) == 1, 30, "the CPU that is free")
    ray.kill(holders.pop())
    wait_for(lambda: cpus_for(1) == 2, 30, "both CPUs")


def test_with_one_gpu_of_several_a_training_takes_its_share_of_the_cpus(monkeypatch):
    nodes = {"a": {"CPU": 48.0, "GPU": 4.0}, "b": {"CPU": 16.0, "GPU": 1.0}, "c": {"CPU": 64.0}, "head": {}}
    free = {"a": {"CPU": 40.0, "GPU": 1.0}, "b": {"CPU": 16.0}, "c": {"CPU": 64.0}, "head": {}, "gone": {"CPU": 99.0}}
    monkeypatch.setattr(cluster, "_live_by_id", lambda: nodes)
    monkeypatch.setattr(cluster, "_SETTLES", 0.0)
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: free)
    leaving: set[str] = set()
    monkeypatch.setattr(cluster, "draining", lambda: leaving)
    assert free_cpus(1, gpus=1) == 12, "b's GPU is in use"
    assert free_cpus(1) == 64 and cpus_for(1) == 16, "which may have to run again on any of them"
    assert cpus_for(1, count=4) == 4, "where any of the nodes has room for one"
    leaving.add("c")
    assert free_cpus(1) == 40, "Ray places nothing on a node that is taken away, and still counts it"
    free["a"]["GPU"] = 0.0
    assert free_cpus(1, gpus=1) == 0 and cpus_for(1, gpus=1) == 16, "as if nobody used them"


@pytest.mark.parametrize(("address", "said"), [(None, False), ("", False), ("10.0.0.1:6379", True)])
def test_who_was_submitted(monkeypatch, address, said):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert is_submitted() is said
