"""Nothing waits for ever, and nothing is tried again that cannot succeed."""

import json
import time
from pathlib import Path

import pytest
from nodes import Nodes
from train_on_nodes import unit_in

from raymed.config import UserError, replace
from raymed.train.budget import Budget
from raymed.train.ray_train import train_with_workers

pytestmark = pytest.mark.ray
DRIVER = Path(__file__).with_name("train_on_nodes.py")
STEPS = {"steps": 400, "evaluations": 10}


@pytest.mark.slow
@pytest.mark.timeout(900)
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
        assert "UserError: this needs 2 x 1 CPU; the cluster has 1 CPU (1 free) on 1 node(s); lost: " in last
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


def test_what_a_worker_finds_wrong_ends_the_run_at_once(ray_cluster, tmp_path, capsys):
    """Not after three more tries, and in the words of the worker alone."""
    unit = unit_in(tmp_path, steps=20, workers=2)
    unit = replace(unit, {"recipe.single.optim.lr": 1e30, "recipe.single.optim.clip": None})

    with pytest.raises(UserError, match=r"^training became not finite at step \d+ of phase single") as error:
        train_with_workers(unit, Budget.from_config(None, None, tmp_path))

    assert "Traceback" not in str(error.value)
    assert "goes on" not in capsys.readouterr().out
