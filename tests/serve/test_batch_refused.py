"""Jobs whose images the device refuses: they can be cancelled, and do not try for ever. Those of a device that has
failed are left to other servers."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from batch_example import JOBS, ask, case_bundle, config, ended, root, started
from waiting import until

from raymed.serve.config import Limits
from raymed.serve.jobs import runner

__all__ = ["case_bundle", "config", "root"]


@contextmanager
def full_device(client):
    """Let every image of the model be too much for the device; gives an event, set when one was."""
    tried = threading.Event()

    def network(batch):
        tried.set()
        raise torch.OutOfMemoryError

    with answered_by(client, network):
        yield tried


@contextmanager
def failing_device(client):
    """Let the device fail, for good, at the next image of the model."""
    engine = client.app.state.service.engine
    device = engine.device

    def network(batch):
        engine.device = "cuda:99"
        raise ValueError

    with answered_by(client, network):
        yield
    engine.device = device


@contextmanager
def hanging_device(client):
    """Let the device hang at the next image of the model, and compute nothing else meanwhile; gives an event, set when
    it does."""
    began, go = threading.Event(), threading.Event()

    def network(batch):
        began.set()
        go.wait()
        return batch

    with answered_by(client, network):
        try:
            yield began
        finally:
            go.set()


@contextmanager
def answered_by(client, network):
    """Let something else take the place of the model's network."""
    lanes = client.app.state.service.models.get("hsg").lanes
    lane = lanes["image"]
    lanes["image"] = replace(lane, network=network)
    yield
    lanes["image"] = lane


def test_a_job_whose_image_is_always_refused_can_be_cancelled(config, monkeypatch):
    monkeypatch.setattr(runner, "_PATIENCE_S", 0.05)
    with started(config) as client:
        with full_device(client) as tried:
            first, second = (ask(client).json()["id"] for _ in range(2))
            assert tried.wait(20)
            assert client.get(f"{JOBS}/{first}").json()["state"] == "running"
            assert client.delete(f"{JOBS}/{first}").status_code == 204
            until(lambda: client.get(f"{JOBS}/{second}").json()["state"] == "running")
        done = ended(client, second)
        assert (done["state"], done["done"]) == ("succeeded", 12), "it waited until there was memory"


def test_a_job_whose_image_is_refused_for_long_fails_and_the_next_is_done(config, monkeypatch):
    monkeypatch.setattr(runner, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(runner, "_REFUSED_S", 0.2)
    with started(config) as client:
        with full_device(client):
            done = ended(client, ask(client).json()["id"])
            assert done["state"] == "failed" and "no memory" in done["problem"]
        assert ended(client, ask(client).json()["id"])["state"] == "succeeded"


@pytest.mark.parametrize("device", [failing_device, hanging_device])
def test_jobs_of_a_server_whose_device_has_failed_are_left_to_another(device, config, monkeypatch):
    monkeypatch.setattr(runner, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(runner, "_LOOK_S", 0.05)
    monkeypatch.setattr("raymed.serve.service._CHECK_S", 0.01)
    config = replace(config, limits=Limits(timeout_s=1.0))
    with started(config) as client:
        engine = client.app.state.service.engine
        with device(client):
            asked = [ask(client).json()["id"] for _ in range(2)]
            until(lambda: not engine.computes)
            assert not client.jobs._next(), "it begins no other"
            with started(config) as other:
                done = [ended(other, number) for number in asked]
            assert [(job["state"], job["done"]) for job in done] == [("succeeded", 12)] * 2
            waits = ask(client).json()["id"]
        assert ended(client, waits)["state"] == "succeeded", "the device computes again"


def ends(client) -> bool:
    """Whether the thread of jobs has ended when it was told to, as far as anybody waits for it."""
    stopping = threading.Thread(target=client.jobs.stop, daemon=True)
    stopping.start()
    stopping.join(8)
    return not stopping.is_alive() and not client.jobs._thread.is_alive()


def test_a_server_ends_before_it_knows_that_its_device_hangs(config, monkeypatch):
    monkeypatch.setattr(runner, "_PATIENCE_S", 0.05)
    with started(config) as client:
        with hanging_device(client) as hangs:
            number = ask(client).json()["id"]
            assert hangs.wait(20) and client.app.state.service.engine.computes
            assert ends(client)
        assert client.get(f"{JOBS}/{number}").json()["state"] == "running"
    with started(config) as client:
        assert ended(client, number)["state"] == "succeeded"
