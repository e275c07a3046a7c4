"""The thread of a device: what shares a batch, who waits, and what a full device or a failing network costs."""

import asyncio
import contextvars
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch
from waiting import until

from raymed.serve.access.limits import asking
from raymed.serve.config import Hardware
from raymed.serve.engine import Engine, Lane, best_batch, best_threads
from raymed.serve.problems import Problem

ITEM = torch.zeros(1)


@pytest.fixture
def engine():
    made = Engine(Hardware(device="cpu", threads=1), queue=8)
    yield made
    made.close()


class Recorder:
    """A network that doubles, remembers its batches, and holds the first until it is let go."""

    def __init__(self, hold=True):
        self.sizes, self.go, self.started = [], threading.Event(), threading.Event()
        if not hold:
            self.go.set()

    def __call__(self, batch):
        self.started.set()
        self.go.wait(10)
        self.sizes.append(len(batch))
        return [2 * value.item() for value in batch]


async def started(recorder):
    await asyncio.to_thread(recorder.started.wait, 10)


def of(caller, work):
    """A task of a request of somebody."""
    context = contextvars.copy_context()
    context.run(asking.set, caller)
    return asyncio.create_task(work, context=context)


def test_a_batch_is_what_came_while_the_last_one_ran(engine):
    network = Recorder()
    lane = Lane("m", network, 4)

    async def ask():
        first = asyncio.create_task(engine.ask(lane, ITEM))
        await started(network)
        others = [asyncio.create_task(engine.ask(lane, ITEM + i)) for i in range(1, 7)]
        await asyncio.sleep(0)
        network.go.set()
        return await asyncio.gather(first, *others)

    assert asyncio.run(ask()) == [2.0 * i for i in range(7)]
    assert network.sizes == [1, 4, 2]


def test_shapes_do_not_share_a_batch(engine):
    network = Recorder()
    lane = Lane("m", network, 8)

    async def ask():
        first = asyncio.create_task(engine.ask(lane, ITEM))
        await started(network)
        others = [asyncio.create_task(engine.ask(lane, torch.zeros(1 if i % 2 else (1, 1)))) for i in range(4)]
        await asyncio.sleep(0)
        network.go.set()
        await asyncio.gather(first, *others)

    asyncio.run(ask())
    assert sorted(network.sizes) == [1, 2, 2]


def test_a_busy_model_does_not_starve_another(engine):
    order, network = [], Recorder()

    def of(name):
        return lambda batch: order.append(name) or [None] * len(batch)

    busy, rare = Lane("busy", of("busy"), 1), Lane("rare", of("rare"), 1)

    async def ask():
        first = asyncio.create_task(engine.ask(Lane("m", network), ITEM))
        await started(network)
        asked = [asyncio.create_task(engine.ask(busy, ITEM)) for _ in range(5)]
        asked.append(asyncio.create_task(engine.ask(rare, ITEM)))
        await asyncio.sleep(0)
        network.go.set()
        await asyncio.gather(first, *asked)

    asyncio.run(ask())
    assert order.index("rare") == 1 and order.count("busy") == 5


def test_who_comes_when_too_many_wait_is_sent_away_and_others_are_answered(engine):
    network = Recorder()
    lane = Lane("m", network, 8)

    async def ask():
        asked = [asyncio.create_task(engine.ask(lane, ITEM)) for _ in range(9)]
        await started(network)
        network.go.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    *answered, refused = asyncio.run(ask())
    assert answered == [0.0] * 8
    assert isinstance(refused, Problem) and refused.status == 503 and refused.headers == {"Retry-After": "1"}
    assert engine.waiting == {"m": 0}


def test_one_caller_fills_his_part_of_the_queue_and_no_more():
    engine, network = Engine(Hardware(device="cpu", threads=1), queue=80), Recorder()
    lane = Lane("m", network, 8)

    async def ask():
        greedy = [of("greedy", engine.ask(lane, ITEM)) for _ in range(42)]
        other = [of("ward", engine.ask(lane, ITEM + 1)), of("ward", engine.alone("m", lambda: "done"))]
        third = [of("pacs", engine.ask(lane, ITEM)) for _ in range(39)]
        await started(network)
        network.go.set()
        return [await asyncio.gather(*each, return_exceptions=True) for each in (greedy, other, third)]

    greedy, other, third = asyncio.run(ask())
    assert greedy[:40] == [0.0] * 40 and other == [2.0, "done"] and third[:38] == [0.0] * 38
    assert [problem.status for problem in (*greedy[40:], *third[38:])] == [429, 429, 503], "his part, then all"
    assert "of yours" in greedy[-1].detail and greedy[-1].headers == {"Retry-After": "1"}
    assert not +engine._of_caller and engine.waiting == {"m": 0}, "what has been answered counts no more"
    engine.close()


def test_a_case_fits_into_a_short_queue():
    engine, network = Engine(Hardware(device="cpu", threads=1), queue=33), Recorder(hold=False)

    async def ask():
        lane = Lane("m", network, 8)
        return await asyncio.gather(*(of("pacs", engine.ask(lane, ITEM)) for _ in range(32)))

    assert asyncio.run(ask()) == [0.0] * 32
    engine.close()


@pytest.mark.parametrize(("size", "batches"), [(1, [[1], [7], [1], [1], [1], [1]]), (3, [[1, 7, 1], [1, 1, 1]])])
def test_callers_take_turns_and_share_batches(engine, size, batches):
    network, seen = Recorder(), []

    def noted(batch):
        seen.append([int(value) for value in batch])
        return [None] * len(batch)

    async def ask():
        lane = Lane("m", noted, size)
        first = asyncio.create_task(engine.ask(Lane("m", network), ITEM))
        await started(network)
        asked = [of("greedy", engine.ask(lane, ITEM + 1)) for _ in range(5)] + [of("ward", engine.ask(lane, ITEM + 7))]
        await asyncio.sleep(0)
        network.go.set()
        await asyncio.gather(first, *asked)

    asyncio.run(ask())
    assert seen == batches


def test_much_work_beside_the_networks_does_not_starve_them(engine):
    order, network = [], Recorder()

    async def ask():
        lane = Lane("m", lambda batch: order.append("network") or [None] * len(batch))
        first = asyncio.create_task(engine.ask(Lane("m", network), ITEM))
        await started(network)
        asked = [asyncio.create_task(engine.alone("m", lambda: order.append("work"))) for _ in range(5)]
        asked.append(asyncio.create_task(engine.ask(lane, ITEM)))
        await asyncio.sleep(0)
        network.go.set()
        await asyncio.gather(first, *asked)

    asyncio.run(ask())
    assert order.index("network") == 1 and order.count("work") == 5


def test_requests_are_answered_in_the_precision_that_was_wanted():
    engine = Engine(Hardware(device="cpu", threads=1, precision="bf16"), queue=8)
    weight = torch.ones(1, 1)
    lane = engine.lanes("m", {"image": lambda batch: [str((batch @ weight).dtype)] * len(batch)}, {"image": ITEM})
    assert asyncio.run(engine.ask(lane["image"], ITEM)) == "torch.bfloat16"
    assert engine.now(lambda: engine.precisely(lambda: (weight @ weight).dtype)) == torch.bfloat16
    engine.close()


def test_nothing_is_computed_for_who_has_gone(engine):
    network = Recorder()
    lane = Lane("m", network, 1)

    async def ask():
        first = asyncio.create_task(engine.ask(lane, ITEM))
        await started(network)
        gone = asyncio.create_task(engine.ask(lane, ITEM))
        last = asyncio.create_task(engine.ask(lane, ITEM + 1))
        await asyncio.sleep(0)
        gone.cancel()
        network.go.set()
        return await first, await last

    assert asyncio.run(ask()) == (0.0, 2.0)
    assert network.sizes == [1, 1]


def test_a_batch_that_does_not_fit_the_memory_is_halved(engine):
    network = Recorder()
    sizes = []

    def small(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return network(batch)

    lane = Lane("m", small, 8)

    async def ask():
        first = asyncio.create_task(engine.ask(lane, ITEM))
        await started(network)
        others = [asyncio.create_task(engine.ask(lane, ITEM + i)) for i in range(7)]
        await asyncio.sleep(0)
        network.go.set()
        await first
        return await asyncio.gather(*others)

    assert asyncio.run(ask()) == [2.0 * i for i in range(7)]
    assert sizes == [1, 7, 3, 1, 2, 4, 2, 2]


def test_one_that_does_not_fit_alone_is_told_so_and_the_next_is_answered(engine):
    def full(batch):
        raise torch.OutOfMemoryError

    async def ask():
        full_one = await asyncio.gather(engine.ask(Lane("m", full), ITEM), return_exceptions=True)
        return *full_one, await engine.ask(Lane("m", Recorder(hold=False)), ITEM + 3)

    refused, answer = asyncio.run(ask())
    assert isinstance(refused, Problem) and refused.status == 503 and "memory" in refused.detail
    assert answer == 6.0


def test_a_network_that_fails_fails_its_own_batch(engine):
    def broken(batch):
        raise ValueError("broken")

    async def ask():
        return await asyncio.gather(
            engine.ask(Lane("a", broken), ITEM),
            engine.ask(Lane("b", Recorder(hold=False)), ITEM + 1),
            engine.alone("b", lambda: "done"),
            return_exceptions=True,
        )

    error, answer, done = asyncio.run(ask())
    assert isinstance(error, ValueError) and answer == 2.0 and done == "done"


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({1: 36, 2: 33, 4: 31}, 1),  # a CPU
        ({1: 100, 2: 190, 4: 350, 8: 600, 16: 900, 32: 950}, 16),
        ({1: 100, 2: 200, 4: 0}, 2),  # no memory for four
        ({size: size for size in (1, 2, 4, 8, 16, 32, 64)}, 64),
    ],
)
def test_a_batch_is_as_large_as_it_is_worth(rates, best):
    assert best_batch(lambda size: float(rates[size])) == best


@pytest.mark.parametrize(("rates", "best"), [({1: 100, 8: 250}, 8), ({1: 100, 8: 105}, 1), ({1: 100, 8: 40}, 1)])
def test_threads_are_as_many_as_are_worth_it(rates, best):
    assert best_threads(8, lambda threads: float(rates[threads])) == best
    assert best_threads(1, lambda threads: 1 / 0) == 1


def test_each_network_has_its_own_number_of_threads_and_other_work_all():
    engine = Engine(Hardware(device="cpu", threads=2), queue=8)

    def threads_of(batch):
        return [torch.get_num_threads()] * len(batch)

    async def ask():
        small, large = Lane("m", threads_of, threads=1), Lane("m", threads_of, threads=2)
        return [await engine.ask(lane, ITEM) for lane in (large, small, large)] + [
            await engine.alone("m", torch.get_num_threads)
        ]

    assert asyncio.run(ask()) == [2, 1, 2, 2]
    assert engine.now(torch.get_num_threads) == 2
    assert engine.lanes("m", {"image": threads_of}, {"image": ITEM})["image"].threads == 2, "as it was told"
    engine.close()


def test_a_device_is_found_to_compute_or_not(engine):
    asyncio.run(engine.check(10))
    assert engine.computes
    engine.device = "cuda:99"
    with pytest.raises(Exception, match="(?i)cuda"):
        asyncio.run(engine.check(10))
    assert not engine.computes
    engine.device = "cpu"
    asyncio.run(engine.check(10))
    assert engine.computes
    engine.close()
    with pytest.raises(RuntimeError, match="ended"):
        asyncio.run(engine.check(10))
    assert not engine.computes


def test_a_device_that_hangs_is_found_and_costs_no_place_in_the_queue(engine):
    go = threading.Event()
    running = engine._thread.submit(go.wait, 10)
    until(running.running)
    with pytest.raises(TimeoutError):
        asyncio.run(engine.check(0.02))
    assert not engine.computes and not engine.waiting
    go.set()
    asyncio.run(engine.check(10))
    assert engine.computes


def test_what_fails_with_its_device_is_to_come_again_elsewhere(engine, capfd):
    def broken(batch):
        engine.device = "cuda:99"
        raise ValueError("of patient Kim")

    async def ask():
        return await asyncio.gather(
            engine.ask(Lane("a", broken), ITEM), engine.alone("a", lambda: 1 / 0), return_exceptions=True
        )

    found = asyncio.run(ask())
    assert all(isinstance(each, Problem) and each.status == 503 and each.headers for each in found)
    told = capfd.readouterr().err
    assert "ValueError" in told and "ZeroDivisionError" in told and "Kim" not in told


def test_the_end_waits_for_what_runs_and_cancels_what_waits():
    engine = Engine(Hardware(device="cpu", threads=1), 8)
    go, began, done = threading.Event(), threading.Event(), []

    def work():
        began.set()
        go.wait(10)
        done.append(True)

    with ThreadPoolExecutor(3) as others:
        running = others.submit(engine.now, work)
        began.wait(10)
        waiting = others.submit(engine.now, lambda: done.append(False))
        until(lambda: not engine._thread._given.empty())
        ending = others.submit(engine.close)
        assert isinstance(waiting.exception(10), CancelledError)
        go.set()
        ending.result(10)
        assert running.result(10) is None and done == [True]
    with pytest.raises(RuntimeError, match="ended"):
        engine.now(work)


def test_the_end_does_not_wait_for_what_never_ends(monkeypatch):
    monkeypatch.setattr("raymed.serve.engine._END_S", 0.05)
    engine, go = Engine(Hardware(device="cpu", threads=1), 8), threading.Event()
    running = engine._thread.submit(go.wait)
    until(running.running)
    engine.close()
    assert running.running()
    go.set()


def test_what_runs_is_measured():
    seen = []
    engine = Engine(Hardware(device="cpu", threads=1), 8, lambda *what: seen.append(what))
    asyncio.run(engine.ask(Lane("m", Recorder(hold=False), 8), ITEM))
    engine.close()
    assert [(stage, model, size) for stage, model, _, size in seen] == [("queue", "m", 1), ("network", "m", 1)]
    assert all(seconds >= 0 for *_, seconds, _ in seen)
