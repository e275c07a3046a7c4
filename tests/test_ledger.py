"""Time ledger: exclusive, complete, one thread, cheap."""

import threading
import time

import pytest
import torch

from raymed.ledger import OTHER, Ledger, describe, span, within


class Clock:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now = 0.0

    def stamp(self) -> float:
        return self.now

    def seconds(self, stamps: list[float]) -> list[float]:
        return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]


@pytest.fixture
def clock():
    return Clock()


def spend(clock: Clock, name: str, seconds: float) -> None:
    """A span of so many seconds."""
    with span(name):
        clock.now += seconds


def test_nested_spans_are_taken_off_the_outer_one(clock):
    ledger = Ledger(clock=clock)
    clock.now = 100.0  # before it is active nothing counts
    with ledger.active():
        clock.now += 1
        spend(clock, "data", 2)
        with span("backward"):
            clock.now += 4
            spend(clock, "communication", 8)
            with span("backward"):
                clock.now += 16
            clock.now += 32
        assert ledger.take() == {OTHER: 1, "data": 2, "backward": 52, "communication": 8}
        spend(clock, "data", 64)
    clock.now += 1000
    assert ledger.take() == {OTHER: 0, "data": 64}
    assert ledger.take() == {OTHER: 0}


def test_a_span_is_cut_where_it_is_taken(clock):
    ledger = Ledger(clock=clock)
    with ledger.active(), span("evaluation"):
        clock.now += 3
        with span("data"):
            clock.now += 1
            assert ledger.take() == {OTHER: 0, "evaluation": 3, "data": 1}
            clock.now += 5
        clock.now += 7
        assert ledger.take() == {OTHER: 0, "evaluation": 7, "data": 5}


def test_an_error_ends_its_spans(clock):
    ledger = Ledger(clock=clock)
    with ledger.active():
        with pytest.raises(ValueError), span("forward"), span("data"):
            clock.now += 1
            raise ValueError
        clock.now += 2
        assert ledger.take() == {OTHER: 2, "data": 1, "forward": 0}


def test_the_innermost_ledger_counts_and_none_after_it(clock):
    outer, inner = Ledger(clock=clock), Ledger(clock=clock)
    with outer.active():
        spend(clock, "data", 1)
        with inner.active():
            spend(clock, "data", 2)
        spend(clock, "data", 4)
        assert outer.take() == {OTHER: 2, "data": 5}  # the inner one's time passes for the outer one too
    spend(clock, "data", 8)
    assert inner.take() == {OTHER: 0, "data": 2} and outer.take() == {OTHER: 0}


def test_other_threads_pass_unseen(clock):
    ledger = Ledger(clock=clock)
    with ledger.active(), span("forward"):
        thread = threading.Thread(target=spend, args=(clock, "checkpoint", 1))
        thread.start()
        thread.join()
        clock.now += 1
        assert ledger.take() == {OTHER: 0, "forward": 2}


def test_spans_inside_a_backward_pass_count(clock):
    """Collectives run from autograd's hooks, on a GPU in autograd's threads."""
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: spend(clock, "communication", 5))
    ledger = Ledger(clock=clock)
    with ledger.active():
        with span("backward"):
            y.sum().backward()
        assert ledger.take() == {OTHER: 0, "backward": 0, "communication": 5}


def test_within_measures_every_call(clock):
    def work(seconds: float) -> str:
        clock.now += seconds
        return "done"

    ledger = Ledger(clock=clock)
    measured = within("optimizer", work)
    with ledger.active():
        assert measured(2) == measured(seconds=3) == "done"
        assert ledger.take() == {OTHER: 0, "optimizer": 5}


def test_many_stamps_are_added_up_early(clock, monkeypatch):
    monkeypatch.setattr("raymed.ledger._MOST_STAMPS", 7)
    ledger = Ledger(clock=clock)
    with ledger.active():
        for _ in range(50):
            spend(clock, "data", 1)
            clock.now += 1
        assert len(ledger._stamps) <= 8
        assert ledger.take() == {OTHER: 50, "data": 50}


def test_the_hosts_clock_loses_nothing():
    ledger = Ledger("cpu")
    began = time.perf_counter()
    with ledger.active():
        inside = time.perf_counter()
        for _ in range(100):
            with span("forward"), span("communication"):
                sum(range(1000))
        seconds = ledger.take()
        ended = time.perf_counter()
    assert 0 < seconds["communication"] and 0 < seconds["forward"] < seconds["communication"]
    assert (ended - inside) * 0.5 < sum(seconds.values()) < ended - began


def per_call(active: bool) -> float:
    """Seconds of an empty span: the best of some rounds."""

    def rounds() -> float:
        best = 1.0
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(1000):
                with span("forward"):
                    pass
            best = min(best, (time.perf_counter() - began) / 1000)
        return best

    if not active:
        return rounds()
    with Ledger().active():
        return rounds()


def test_a_span_costs_little():
    assert per_call(active=False) < 1e-6
    assert per_call(active=True) < 10e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_time_is_that_of_its_stream():
    """Kernels are called in no time and run for long; a wait hidden behind them is no wait."""
    x = torch.randn(8192, 8192, device="cuda")
    ledger = Ledger("cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    with ledger.active():
        with span("forward"):
            for _ in range(30):
                x @ x
        with span("data"):
            time.sleep(0.02)  # the GPU is busy for longer
        first = ledger.take()
        with span("data"):
            time.sleep(0.2)
        with span("forward"):
            x @ x
        second = ledger.take()
        passed = time.perf_counter() - began
    assert first["forward"] > 0.05 > 0.001 > first["data"]
    assert 0.19 < second["data"] < 0.3
    assert sum(first.values()) + sum(second.values()) == pytest.approx(passed, rel=0.05)


def test_description():
    seconds = {"forward": 4.1, "other": 0.6, "backward": 3.9, "host_to_device": 1.31, "data": 0.09}
    assert describe(seconds) == "forward 41 %, backward 39 %, host to device 13 %, other 6 %"
    assert describe({"other": 0.0}) == "nothing yet"
