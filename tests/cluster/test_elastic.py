"""A node is lost and another one joins: the group shrinks, grows back, and learns what it would have learned anyway."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nodes import Nodes
from train_on_nodes import main, unit_in

from raymed.train.checkpoints.checkpoint import Checkpoints, load_weights
from raymed.train.unit import Unit

pytestmark = [pytest.mark.ray, pytest.mark.slow]
DRIVER = Path(__file__).with_name("train_on_nodes.py")
STEPS = {"steps": 900, "evaluations": 30}


def test_a_group_shrinks_and_grows_with_its_nodes(tmp_path):
    elastic, plain = tmp_path / "elastic", tmp_path / "plain"
    with Nodes(tmp_path / "cluster") as nodes:
        node = nodes.add_node()
        arguments = json.dumps(STEPS | {"workers": 2, "min_workers": 1})
        driver = nodes.driver(DRIVER, elastic, arguments, RAYMED_GROW_AFTER="1")
        driver.evaluates(2)
        assert len(node.workers()) == 1
        nodes.kill_node(node)
        driver.says("node lost: ")
        driver.evaluates(1)
        assert len(nodes.head.workers()) == 1
        node = nodes.add_node()
        driver.says("there is room for more workers; the state is saved at step ")
        driver.evaluates(1)
        assert len(node.workers()) == len(nodes.head.workers()) == 1
        assert driver.wait() == 0, driver.said()
        assert "finished" in driver.said().splitlines()
        assert not node.workers() and not nodes.head.workers()
    main(plain, STEPS | {"workers": 1})

    ours, expected = unit_in(elastic, **STEPS), unit_in(plain, **STEPS)

    losses, undisturbed = _losses(ours), _losses(expected)
    assert len(undisturbed) == STEPS["steps"]
    assert (np.abs(losses - undisturbed) / undisturbed).max() < 1e-5
    assert _distance(ours, expected) < 1e-5
    scores = [unit.result()["test"]["auroc"] for unit in (ours, expected)]
    assert scores[0] == scores[1]


def _losses(unit: Unit) -> np.ndarray:
    """Every step's loss."""
    records = [r for r in unit.outbox.records() if r["op"] == "metrics"]
    values = {r["step"]: r["values"]["single/loss"] for r in records if "single/loss" in r["values"]}
    return np.array([values[step] for step in sorted(values)])


def _distance(one: Unit, other: Unit) -> float:
    """Norm of the difference of all last weights, relative to the norm of the weights."""
    folders = [Checkpoints(unit.folder / "checkpoints" / "single").find("last") for unit in (one, other)]
    assert folders[0] and folders[1]
    a, b = (load_weights(folder, averaged=False) for folder in folders if folder)
    a, b = (torch.cat([weights[name].double().flatten() for name in sorted(weights)]) for weights in (a, b))
    return ((a - b).norm() / a.norm()).item()
