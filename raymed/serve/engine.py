"""Where networks run: one thread a device, which takes what waits, in batches of equal shape.

    ask -> queue of (model, network, shape) -> a batch, as soon as the thread is free -> results

Nobody waits for a batch to fill: a batch is what has come while the last one ran, so that a lone request is as fast as
without batching. Networks take turns, and so do callers: whoever asks for much delays himself.

How large a batch may be is measured when a model is loaded: on a GPU many images cost little more than one, on a CPU
often just as much each. So is whether a network is worth all of a CPU's threads: a small one is answered sooner by one.
"""

import asyncio
import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from raymed.serve.access import log
from raymed.serve.access.limits import asking
from raymed.serve.config import Hardware
from raymed.serve.handlers import Network
from raymed.serve.problems import OutOfMemory, Problem, busy

T = TypeVar("T")
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_WORTH = 1.1
"""A larger batch, and more threads, must give so much more throughput."""
_CASE = 32
"""Images of a case that wait at most (`raymed.serve.handlers.ask_all`): they fit into a caller's share."""
_END_S = 10.0
"""For what the thread is doing when it is to end."""
_TIMED, _TIMED_S = 3, 0.05
"""Of the warm-up, batches of each size at least, and for how long."""


@dataclass(eq=False)
class Job:
    """An item that waits, or work without one."""

    result: "asyncio.Future[Any]"
    item: Tensor | None = None
    work: Callable[[], Any] | None = None
    begun: Callable[[], None] = lambda: None
    """Called in the device's thread, before it is done."""
    caller: str = field(default_factory=asking.get)
    since: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, eq=False)
class Lane:
    """A network of a loaded model: what may share a batch, with items of one shape."""

    model: str
    network: Network
    max_batch: int = 1
    threads: int = 1
    """Of torch, on a CPU."""


class _Turns:
    """Jobs that may share a batch. Callers take turns."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[Job]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._of)

    def put(self, job: Job) -> None:
        self._of.setdefault(job.caller, deque()).append(job)

    def take(self, most: int) -> list[Job]:
        """The next ones; who has gone is left out."""
        jobs: list[Job] = []
        while self._of and len(jobs) < most:
            caller, queue = self._of.popitem(last=False)
            job = queue.popleft()
            if queue:
                self._of[caller] = queue
            if not job.result.done():
                jobs.append(job)
        return jobs


class Engine:
    """The thread of a device.

    queue: images that may wait for a model; of one caller half of them, or a case where that is more.
    observe(stage, model, seconds, size): told of every batch ("network") and of every wait ("queue").
    """

    def __init__(
        self,
        hardware: Hardware,
        queue: int,
        observe: Callable[[str, str, float, int], None] = lambda *_: None,
    ):
        self.device = device_of(hardware.device)
        self.hardware = hardware
        self.threads = hardware.threads or len(os.sched_getaffinity(0))
        self.queue = queue
        self.observe = observe
        self.at_once = max(1, min(_CASE, queue // 2))
        """Images of one case that may wait, so that the largest case is answered by the shortest queue."""
        self.computes = True
        """As the last `check` found."""
        self.waiting: dict[str, int] = {}
        self._of_caller: Counter[tuple[str, str]] = Counter()
        self._lanes: OrderedDict[tuple[Lane | None, Any], _Turns] = OrderedDict()
        self._thread = Thread()
        self._running = False

    async def ask(self, lane: Lane, item: Tensor, begun: Callable[[], None] = lambda: None) -> Any:
        """The result of a lane's network for one item. begun: called in the device's thread, when its batch is next.
        Raises Problem where too many wait for its model: 429 where they are of the same caller, else 503."""
        return await self._put((lane, (item.shape, item.dtype)), lane.model, item=item, begun=begun)

    async def alone(self, model: str, work: Callable[[], T], begun: Callable[[], None] = lambda: None) -> T:
        """The result of some work in the device's thread, between batches. begun, raises: as of `ask`."""
        return await self._put((None, model), model, work=work, begun=begun)

    async def _put(self, key: tuple[Lane | None, Any], model: str, **what: Any) -> Any:
        job = Job(asyncio.get_running_loop().create_future(), **what)
        self._check_room(model, job.caller)
        self.waiting[model] = self.waiting.get(model, 0) + 1
        self._of_caller[model, job.caller] += 1
        self._lanes.setdefault(key, _Turns()).put(job)
        if not self._running:
            self._next()
        try:
            return await job.result
        finally:
            self.waiting[model] -= 1
            self._of_caller[model, job.caller] -= 1

    def _check_room(self, model: str, caller: str) -> None:
        if caller and self._of_caller[model, caller] >= max(_CASE, self.queue // 2):
            raise Problem(429, f"as many images of yours as may wait for {model} do already", retry_after=1)
        if self.waiting.get(model, 0) >= self.queue:
            raise busy(f"{self.queue} images wait for {model} already", retry_after=1)

    def _next(self) -> None:
        """Send what waits longest to the thread, with all that may go with it."""
        lane, jobs = self._take()
        self._running = bool(jobs)
        if not jobs:
            return
        running = asyncio.wrap_future(self._thread.submit(_run, self, lane, jobs))
        running.add_done_callback(lambda done: self._finish(jobs, done))

    def _take(self) -> tuple[Lane | None, list[Job]]:
        """The next batch. Lanes take turns, so that a busy model does not starve another."""
        while self._lanes:
            (lane, kind), turns = self._lanes.popitem(last=False)
            jobs = turns.take(1 if lane is None else lane.max_batch)
            if turns:
                self._lanes[(lane, kind)] = turns
            if jobs:
                return lane, jobs
        return None, []

    def _finish(self, jobs: Sequence[Job], done: "asyncio.Future[list[Any]]") -> None:
        error = done.exception()
        results = [None] * len(jobs) if error else done.result()
        for job, result in zip(jobs, results, strict=True):
            if job.result.done():
                continue
            if error:
                job.result.set_exception(error)
            else:
                job.result.set_result(result)
        self._next()

    def lanes(self, model: str, networks: Mapping[str, Network], examples: Mapping[str, Tensor]) -> dict[str, Lane]:
        """A lane for each network, warmed up, with the batch that is worth it. Blocks: for a thread of its own."""
        return {name: self._lane(model, network, examples[name]) for name, network in networks.items()}

    def _lane(self, model: str, network: Network, example: Tensor) -> Lane:
        """Measured size by size, so that other models answer in between."""

        def faster(batch: Tensor) -> Sequence[Any]:
            return self.precisely(lambda: network(batch))

        def rate(size: int, threads: int) -> float:
            return self.now(lambda: _rate(faster, example, size), threads)

        fixed = self.hardware.threads or self.hardware.compile  # what is compiled is made for a number of threads
        threads = self.threads if fixed else best_threads(self.threads, lambda threads: rate(1, threads))
        size = self.hardware.max_batch or best_batch(lambda size: rate(size, threads))
        self.now(lambda: run_batch(faster, [example] * size), threads)
        return Lane(model, faster, size, threads)

    def now(self, work: Callable[[], T], threads: int | None = None) -> T:
        """The result of some work in the device's thread, as soon as that is free. Blocks: for a thread of its own."""
        return self._thread.submit(_with_threads, threads or self.threads, work).result()

    def precisely(self, work: Callable[[], T]) -> T:
        """The result of some work in the precision that requests are answered in."""
        if self.hardware.precision == "fp32":
            return work()
        with torch.autocast(self.device.split(":")[0], torch.bfloat16):
            return work()

    async def check(self, within_s: float) -> None:
        """Raises TimeoutError where the device's thread does not get to a small computation in time, and whatever the
        device raises where it does not compute any more; `computes` says so too."""
        try:
            async with asyncio.timeout(within_s):
                await asyncio.wrap_future(self._thread.submit(_compute, self.device))
        except Exception:
            self.computes = False
            raise
        self.computes = True

    def close(self) -> None:
        """End the thread after what it is doing, or leave it where that never ends."""
        self._thread.close()


class Thread:
    """Does one thing after the other. The end of the process does not wait for it, as it would for that of an executor:
    a device may hang."""

    def __init__(self) -> None:
        self._given: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._ended = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="networks", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Have it done. Raises RuntimeError after the end."""
        result: Future[T] = Future()
        with self._lock:
            if self._ended:
                raise RuntimeError("the device's thread has ended")
            self._given.put((result, partial(work, *arguments)))
        return result

    def close(self) -> None:
        """Do no more; what waits is cancelled."""
        with self._lock:
            self._ended = True
            while not self._given.empty():
                if given := self._given.get():
                    given[0].cancel()
            self._given.put(None)
        self._thread.join(_END_S)

    def _run(self) -> None:
        while given := self._given.get():
            result, work = given
            if result.set_running_or_notify_cancel():
                try:
                    result.set_result(work())
                except BaseException as error:  # it is for whoever asked
                    result.set_exception(error)
            del given, result, work  # nothing stays in memory while it waits


def _run(engine: Engine, lane: Lane | None, jobs: Sequence[Job]) -> list[Any]:
    """`_results`. Raises Problem (503) where they failed since the device does not compute any more."""
    try:
        return _results(engine, lane, jobs)
    except Problem:
        raise
    except Exception as error:
        if _still_computes(engine.device):
            raise
        log.failed(error)
        raise busy("the device of this server has failed", retry_after=10) from None


def _still_computes(device: str) -> bool:
    """After an error of CUDA that stays, such as a failed assertion, nothing does."""
    try:
        _compute(device)
    except Exception:
        return False
    return True


def _compute(device: str) -> None:
    torch.ones(1, device=device).item()


def _results(engine: Engine, lane: Lane | None, jobs: Sequence[Job]) -> list[Any]:
    """In the thread: of a batch, or of one piece of work."""
    started = time.perf_counter()
    torch.set_num_threads(engine.threads if lane is None else lane.threads)
    for job in jobs:
        job.begun()
    if lane is None:
        (job,) = jobs
        assert job.work is not None
        return [_within_memory(job.work)]
    for job in jobs:
        engine.observe("queue", lane.model, started - job.since, 1)
    results = run_batch(lane.network, [job.item for job in jobs])  # type: ignore[misc]
    engine.observe("network", lane.model, time.perf_counter() - started, len(jobs))
    return results


def run_batch(network: Network, items: Sequence[Tensor]) -> list[Any]:
    """The results of a batch; one that does not fit the GPU's memory is halved until it does. Raises Problem (503)
    where even a single item does not fit."""
    try:
        with _quiet():
            return list(network(torch.stack(list(items))))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    if len(items) == 1:
        raise OutOfMemory()
    half = len(items) // 2
    return [*run_batch(network, items[:half]), *run_batch(network, items[half:])]


def _within_memory(work: Callable[[], T]) -> T:
    try:
        return work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    raise OutOfMemory()


def best_batch(rate: Callable[[int], float]) -> int:
    """The largest batch up to which each larger one gives a tenth more throughput. rate(size): items a second."""
    best, fastest = 1, rate(1)
    for size in _SIZES[1:]:
        found = rate(size)
        if found < _WORTH * fastest:
            break
        best, fastest = size, found
    return best


def best_threads(most: int, rate: Callable[[int], float]) -> int:
    """All of the threads, or one where they give no tenth more. rate(threads): items a second."""
    return most if most > 1 and rate(most) >= _WORTH * rate(1) else 1


def _rate(network: Network, item: Tensor, size: int) -> float:
    """Items a second, after one batch to warm up; the best of those that fit into a short time. 0 for a batch that does
    not fit the device's memory."""
    batch = torch.stack([item] * size)
    times: list[float] = []
    try:
        network(batch)
        end = time.perf_counter() + _TIMED_S
        while len(times) < _TIMED or time.perf_counter() < end:
            started = time.perf_counter()
            network(batch)
            times.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return 0.0
    return size / min(times)


def device_of(name: str) -> str:
    """auto -> cuda where there is one, else cpu."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _quiet() -> AbstractContextManager[Any]:
    return torch.inference_mode() if not torch.is_inference_mode_enabled() else nullcontext()


def _with_threads(threads: int, work: Callable[[], T]) -> T:
    torch.set_num_threads(threads)
    return work()
