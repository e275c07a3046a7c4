"""What a job's outboxes amount to, as Prometheus is to see it."""

import math

import pytest

from raymed.tracking.outbox import Outbox
from raymed.train.places.metrics import Board
from raymed.train.timing import timing


@pytest.fixture
def boxes(tmp_path):
    """Of a trial and its training, opened."""
    trial, training = Outbox(tmp_path / "trial.jsonl"), Outbox(tmp_path / "training.jsonl")
    trial.open("sweep-1/trial-0003", "trial-0003", "sweep-1", {})
    training.open("sweep-1/trial-0003/seed-7", "trial-0003-seed-7", "sweep-1/trial-0003", {})
    return trial, training


def test_a_running_job_adds_up(boxes):
    trial, training = boxes
    board = Board("sweep", lambda: [(trial, 0), (training, 0)])
    training.metrics(timing("head", {"forward": 2.0, "data": 0.5}, 100.0), 5)
    assert board.look() == {"forward": 2.0, "data": 0.5} and board.speed == 100
    training.metrics({"head/loss": 0.3, "val/auroc": math.nan}, 6)
    training.metrics(timing("head", {"forward": 1.0}, 50.0), 10)
    assert board.look() == {"forward": 1.0} and board.seconds == {"forward": 3.0, "data": 0.5} and board.speed == 50
    assert board.runs == {("trial", "RUNNING"): 1, ("training", "RUNNING"): 1}
    assert board.look() == {}


def test_what_has_ended_does_not_run(boxes):
    trial, training = boxes
    board = Board("sweep", lambda: [(trial, 0), (training, 0)])
    training.metrics(timing("head", {"forward": 1.0}, 50.0), 10)
    board.look()
    training.close("FINISHED")
    trial.close("FAILED")
    board.look()
    assert board.speed == 0
    assert board.runs == {
        ("training", "RUNNING"): 0,
        ("trial", "RUNNING"): 0,
        ("training", "FINISHED"): 1,
        ("trial", "FAILED"): 1,
    }


def test_time_of_an_earlier_process_is_not_counted_again(boxes):
    """But what has become of a training is known."""
    trial, training = boxes
    training.metrics(timing("head", {"forward": 9.0}, 50.0), 10)
    size = training.path.stat().st_size
    board = Board("sweep", lambda: [(training, size)])
    assert board.look() == {} and board.speed == 0 and board.runs == {("training", "RUNNING"): 1}
    training.metrics(timing("head", {"forward": 1.0}, 20.0), 20)
    assert board.look() == {"forward": 1.0} and board.speed == 20


def test_what_is_not_written_yet_is_nothing(tmp_path):
    board = Board("sweep", lambda: [(Outbox(tmp_path / "none.jsonl"), 0)])
    assert board.look() == {} and board.runs == {} and board.speed == 0
