"""Batches on their way to the device."""

import time

import numpy as np
import pytest
import torch

from raymed.data.dataset import Batch
from raymed.ledger import Ledger
from raymed.train.evaluate import Feed


@pytest.mark.parametrize("cached", [{}, {"encoder": torch.arange(96.0 * 2).view(96, 2)}], ids=["images", "cached"])
def test_the_way_to_the_device_has_a_name_in_the_ledger(cached, data, monkeypatch):
    move = Batch.to
    monkeypatch.setattr(Batch, "to", lambda batch, device: time.sleep(0.05) or move(batch, device))
    feed, ledger = Feed(data, torch.device("cpu")), Ledger()
    feed.cached = cached
    with ledger.active():
        batch = feed.batch(np.array([3, 5]))
        seconds = ledger.take()
    assert 0.05 <= seconds["host_to_device"] < 0.05 + 0.5 and seconds["other"] < 0.5
    assert batch.label.tolist() == data.labels[[3, 5]].tolist()
    assert (batch.image is None) == bool(cached)
    assert {name: value.tolist() for name, value in batch.cached.items()} == (
        {"encoder": [[6, 7], [10, 11]]} if cached else {}
    )
