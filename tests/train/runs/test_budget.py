"""Budgets: what counts, over restarts and for trainings side by side, by a clock of the test's own."""

import json

import pytest

from raymed.config import UserError
from raymed.train.runs.budget import Budget, parse_duration


class Clock:
    """Moves when told to."""

    def __init__(self):
        self.now = 1e6

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("90m", 5400), ("30s", 30), ("1h30m", 5400), ("1.5h", 5400), ("1d12h", 129600), (" 5M ", 300)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "2 h", "30m1h", "-1h", "1h-30m", "2hours", "0s", "1e3s", "inf", "1.h"])
def test_what_is_no_duration(text):
    with pytest.raises(UserError, match="like 2h, 90m, 30s or 1h30m"):
        parse_duration(text)


def test_time_is_used_up(tmp_path, clock):
    budget = Budget.from_config("1m", None, tmp_path, clock)
    clock.now += 59.9
    assert budget.exhausted() is None
    clock.now += 0.1
    assert budget.exhausted() == "the time budget of 1m is used up (--time-budget)"


def test_without_limits_it_only_counts(tmp_path, clock):
    budget = Budget.from_config(None, None, tmp_path, clock)
    with budget.running("a", 8):
        clock.now += 1e9
    assert budget.exhausted() is None
    assert budget.seconds_used == 1e9 and budget.gpu_hours_used == pytest.approx(8e9 / 3600)


def test_gpu_hours_are_gpus_times_time_of_all_that_run(tmp_path, clock):
    """1 GPU for 3 h, 2 for the last 2 of them, half a one for the first: 1 x 3 + 2 x 2 + 0.5 x 1."""
    budget = Budget.from_config(None, 7.5, tmp_path, clock)
    budget.started("a", 1)
    budget.started("half", 0.5)
    clock.now += 3600
    budget.ended("half")
    budget.ended("half")
    with budget.running("b", 2):
        clock.now += 7199
        assert budget.exhausted() is None
        clock.now += 1
        assert budget.exhausted() == "the budget of 7.5 GPU-hours is used up (--max-gpu-hours)"
    budget.ended("a")
    clock.now += 3600
    assert budget.gpu_hours_used == pytest.approx(7.5)
    assert budget.seconds_used == 4 * 3600


def test_a_failure_ends_what_runs(tmp_path, clock):
    budget = Budget.from_config(None, 1, tmp_path, clock)
    with pytest.raises(ZeroDivisionError), budget.running("a", 1):
        clock.now += 1800
        raise ZeroDivisionError
    clock.now += 7200
    assert budget.exhausted() is None and budget.gpu_hours_used == 0.5


def test_a_resumed_run_has_what_was_left(tmp_path, clock):
    folder = tmp_path / "run"
    budget = Budget.from_config("1h", None, folder, clock)
    with budget.running("a", 2):
        clock.now += 1800
    clock.now += 5e5  # after its end nothing counts; another machine's clock starts anywhere
    clock.now = 3.0
    budget = Budget.from_config("1h", None, folder, clock)
    assert budget.seconds_used == 1800 and budget.gpu_hours_used == 1
    clock.now += 1799
    assert budget.exhausted() is None
    clock.now += 1
    assert budget.exhausted()
    assert Budget.from_config("1h", None, folder, clock).exhausted()
    assert Budget.from_config("2h", None, folder, clock).exhausted() is None  # the user gave it more


def test_a_killed_run_forgets_a_few_seconds_at_most(tmp_path, clock):
    budget = Budget.from_config("1h", None, tmp_path, clock)
    writes = set()
    for _ in range(1000):
        clock.now += 0.1
        budget.exhausted()
        if budget.path.is_file():
            writes.add(budget.path.read_text())
    assert 100 - Budget.from_config("1h", None, tmp_path, clock).seconds_used <= 5.1
    assert len(writes) <= 20
    assert json.loads(budget.path.read_text()).keys() == {"seconds", "gpu_hours"}


def test_a_clock_that_steps_back_counts_no_time(tmp_path, clock):
    budget = Budget.from_config("1m", None, tmp_path, clock)
    clock.now -= 1000
    assert budget.seconds_used == 0
    clock.now += 30
    assert budget.seconds_used == 30


def test_what_cannot_be(tmp_path):
    with pytest.raises(UserError, match="max_gpu_hours must be > 0, got -1"):
        Budget.from_config(None, -1, tmp_path)
    with pytest.raises(UserError, match="got 'soon'"):
        Budget.from_config("soon", None, tmp_path)
