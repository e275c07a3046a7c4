"""How long a training waits for nodes that are missing, and who says so. No Ray: no group finds its place here."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from raymed.config import UserError
from raymed.train.compute import Compute
from raymed.train.places import room
from raymed.train.places.ray_train import _Training


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


def test_a_time_before_now_is_refused():
    with pytest.raises(UserError, match="compute.node_patience must be >= 0"):
        Compute(node_patience=-1)
