"""What processes of one training owe each other."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from filelock import FileLock
from small import make_unit, recipe

from raymed.train.places import peers
from raymed.train.places.peers import collective_timeout, is_loss, load_in_turn


def test_collectives_are_more_patient_than_s3(monkeypatch):
    monkeypatch.delenv("RAYMED_S3_PATIENCE", raising=False)
    assert collective_timeout() == timedelta(minutes=30)
    monkeypatch.setenv("RAYMED_S3_PATIENCE", "7200")
    assert collective_timeout() == timedelta(hours=2, minutes=10)


@pytest.mark.parametrize("text", ["[a.cc:5] Connection closed by peer", "Connection reset by peer", "Broken pipe"])
def test_a_connection_that_is_gone_is_a_loss(text):
    assert is_loss(RuntimeError(text)) and is_loss(dist.DistNetworkError(""))
    assert not is_loss(ValueError(text)) and not is_loss(RuntimeError("Timed out"))


def test_one_process_of_a_machine_loads_at_a_time(manifest, tmp_path, monkeypatch):
    unit, loaded = make_unit(recipe(manifest), tmp_path), []
    monkeypatch.setattr(peers, "unit_data", loaded.append)
    thread = threading.Thread(target=load_in_turn, args=(unit,))
    with FileLock(unit.cache / "loading.lock"):
        thread.start()
        thread.join(0.3)
        assert not loaded
    thread.join(30)
    assert loaded == [unit]
