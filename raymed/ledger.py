"""A ledger of time: how many seconds of a run went where. Code names what it does with `span`; a `Ledger` adds it up.

    ledger = Ledger(device)
    with ledger.active():
        with span("forward"): ...          # in a library that knows nothing of the ledger
        seconds = ledger.take()            # {"forward": 0.41, ..., "other": 0.02}, together the time that has passed

`span` costs a fraction of a microsecond while no ledger is active and a few microseconds while one is. A ledger keeps
one stamp for each beginning and end of a span, and the time between two stamps belongs to the innermost span: nothing
is counted twice and nothing is lost.

**Which time counts.** On the CPU that of the host's clock. On a GPU every stamp is an event on the stream that the work
is queued in, since kernels run later than they are called: a name has the time that the *stream* spent between its
stamps. Forward, backward, communication and optimiser are then the time of their kernels (or of the wait for the host
to launch them), and waiting for data counts as far as the GPU stood still for it: a wait that is hidden behind kernels
costs nothing and counts nothing. Events are read in `take`, which waits for the stream.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

DATA, HOST_TO_DEVICE, FORWARD, BACKWARD = "data", "host_to_device", "forward", "backward"
COMMUNICATION, OPTIMIZER, CHECKPOINT, EVALUATION = "communication", "optimizer", "checkpoint", "evaluation"
OTHER = "other"
NAMES = (DATA, HOST_TO_DEVICE, FORWARD, BACKWARD, COMMUNICATION, OPTIMIZER, CHECKPOINT, EVALUATION, OTHER)
"""What a training step spends its time on."""

_MOST_STAMPS = 100_000  # kept between two takes; then they are added up at once


class Clock(Protocol):
    """Gives stamps, and says how long it was from one to another."""

    def stamp(self) -> Any:
        """This moment."""

    def seconds(self, stamps: list[Any]) -> list[float]:
        """The time between each two neighbours. Afterwards the stamps but the last may be used again."""
        ...


class Ledger:
    """Seconds by name. Measures the thread that activates it, and autograd's threads while they work for a backward
    pass; spans in other threads (uploads, prefetching) pass unseen."""

    def __init__(self, device: Any = "cpu", clock: Clock | None = None):
        """
        Args:
            device: where the work is done, a torch.device or its name; "cuda" measures on the current stream.
            clock: in place of the device's.
        """
        self._clock = clock or (_StreamClock(device) if str(device).startswith("cuda") else _HostClock())
        self._open: list[str] = [OTHER]
        self._ended: list[str] = []
        """Names of the stretches between the stamps."""
        self._stamps: list[Any] = []
        self._seconds: dict[str, float] = {}
        self.thread = 0

    @contextmanager
    def active(self) -> Iterator["Ledger"]:
        """Within, spans are written into this ledger; one ledger is active at a time, the innermost."""
        global _active
        before, self.thread = _active, threading.get_ident()
        self._stamps = [self._clock.stamp()]
        _active = self
        try:
            yield self
        finally:
            _active = before
            self._add_up()
            self._stamps = []

    def take(self) -> dict[str, float]:
        """Seconds by name since the last take (or since it was activated): only names that came up, and "other" for
        what was in no span. Together they are the time that has passed."""
        self._add_up()
        seconds, self._seconds = self._seconds, {}
        return {OTHER: 0.0} | seconds

    def enter(self, name: str) -> None:
        """A span begins."""
        self._end_stretch()
        self._open.append(name)

    def leave(self) -> None:
        """The innermost span ends."""
        self._end_stretch()
        self._open.pop()

    def _end_stretch(self) -> None:
        self._ended.append(self._open[-1])
        self._stamps.append(self._clock.stamp())
        if len(self._ended) >= _MOST_STAMPS:
            self._add_up()

    def _add_up(self) -> None:
        if not self._stamps:  # not active: no time passes
            return
        self._ended.append(self._open[-1])
        self._stamps.append(self._clock.stamp())
        for name, seconds in zip(self._ended, self._clock.seconds(self._stamps), strict=True):
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._ended, self._stamps = [], self._stamps[-1:]


def span(name: str) -> "_Span | _Nothing":
    """A context: the time within belongs to `name`, but for that of spans inside it. Without an active ledger, or in a
    thread that it does not measure, nothing happens."""
    ledger = _active
    if ledger is None or (threading.get_ident() != ledger.thread and not _in_backward()):
        return _NOTHING
    return _Span(ledger, name)


def within(name: str, function: Callable) -> Callable:
    """The function, each call of it in a span of that name."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        with span(name):
            return function(*args, **kwargs)

    return measured


def describe(seconds: dict[str, float]) -> str:
    """Shares of the whole in descending order, such as "forward 41 %, backward 38 %, data 9 %"; those under 1 % are
    left out."""
    total = sum(seconds.values())
    if not total:
        return "nothing yet"
    shares = sorted(((100 * value / total, name) for name, value in seconds.items()), reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {share:.0f} %" for share, name in shares if share >= 1)


class _Span:
    __slots__ = ("ledger", "name")

    def __init__(self, ledger: Ledger, name: str):
        self.ledger, self.name = ledger, name

    def __enter__(self) -> None:
        self.ledger.enter(self.name)

    def __exit__(self, *error: object) -> None:
        self.ledger.leave()


class _Nothing:
    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


_NOTHING = _Nothing()
_active: Ledger | None = None


def _in_backward() -> bool:
    """Whether this thread is computing a backward pass: on GPUs autograd has threads of its own, and the one that
    called it waits for them."""
    import torch

    return torch._C._current_graph_task_id() != -1


class _HostClock:
    """Seconds of the host's monotonic clock."""

    stamp = staticmethod(time.perf_counter)

    def seconds(self, stamps: list[float]) -> list[float]:
        """Differences."""
        return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]


class _StreamClock:
    """Events on the current stream of a GPU."""

    def __init__(self, device: Any):
        import torch

        self._cuda = torch.cuda
        self._device = torch.device(device)
        self._spare: list[Any] = []

    def stamp(self) -> Any:
        """An event, recorded now."""
        event = self._spare.pop() if self._spare else self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return event

    def seconds(self, stamps: list[Any]) -> list[float]:
        """After the last of them has happened."""
        stamps[-1].synchronize()
        passed = [before.elapsed_time(after) / 1000 for before, after in zip(stamps, stamps[1:], strict=False)]
        self._spare.extend(stamps[:-1])
        return passed
