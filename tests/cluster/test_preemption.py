"""What is stopped in good time loses nothing: a node that will be taken away, and Ctrl-C."""

import json
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
from nodes import Nodes, wait_for
from train_on_nodes import unit_in

pytestmark = [pytest.mark.ray, pytest.mark.slow]
DRIVER = Path(__file__).with_name("train_on_nodes.py")
STEPS = {"steps": 400, "evaluations": 10}


def test_a_node_that_is_taken_away_and_ctrl_c(tmp_path):
    """Both between two evaluations, 40 steps apart: neither repeats a step."""
    unit = unit_in(tmp_path, **STEPS)
    arguments = json.dumps(STEPS | {"workers": 2, "min_workers": 1})
    with Nodes(tmp_path / "cluster") as nodes:
        nodes.add_node()
        driver = nodes.driver(DRIVER, tmp_path, arguments)
        driver.evaluates(1)
        [leaving] = [n["NodeID"] for n in nodes.alive() if "node:__internal_head__" not in n["Resources"]]
        nodes.drain_node(leaving, seconds=600)
        driver.says("preempted: 1 of its nodes will be taken away; the state is saved at step ")
        wait_for(lambda: len(nodes.alive()) == 1, 120, "the node goes, since nothing holds it any more")
        driver.evaluates(1)
        driver.process.send_signal(signal.SIGINT)
        driver.says("stopping after this step; the state is saved")
        assert driver.wait(120) != 0
        assert unit.result() is None
        assert not nodes.head.workers()

        again = nodes.driver(DRIVER, tmp_path, json.dumps(STEPS | {"workers": 1, "min_workers": 1}))
        assert again.wait() == 0, again.said()

    [saved] = re.findall(r"saved at step (\d+) of phase single", driver.said())
    assert STEPS["steps"] > int(saved) >= STEPS["steps"] // STEPS["evaluations"]
    assert unit.result() is not None
    lines = [json.loads(line) for line in unit.outbox.path.read_text().splitlines()]
    steps = Counter(r["step"] for r in lines if r["op"] == "metrics" and "single/loss" in r["values"])
    assert steps == Counter(range(1, STEPS["steps"] + 1)), "a step was repeated, or is missing"
