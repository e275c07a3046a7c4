"""What a job's trainings tell of themselves, shown to Prometheus by the driver's Ray node.

Everything is read from the outboxes that the driver brings to MLflow, wherever they were written, so that workers know
nothing of it. Ray adds "ray_" to the names; a job without Ray shows nothing.

    raymed_images_per_second{run}            of all trainings that run now
    raymed_seconds_total{run, part}          where their time went (`raymed.ledger.NAMES`)
    raymed_runs{run, kind, status}           trainings and trials; status as MLflow has it
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Self

from raymed.tracking.outbox import Outbox, read
from raymed.train.timing import SPEED, TIME

PERIOD = 5.0
_TRIAL = "trial-"


class _Reader:
    """One outbox, read as it grows.

    start: bytes of it that an earlier process has shown.
    """

    def __init__(self, outbox: Outbox, start: int):
        self.outbox, self._start, self._offset = outbox, start, 0
        self.kind, self.status, self.speed = "", "", 0.0

    def look(self) -> Counter[str]:
        """Read on; returns seconds by part, of what was not shown before."""
        seconds: Counter[str] = Counter()
        for record, behind in read(self.outbox.path, self._offset):
            self._offset = behind
            if record["op"] == "open":
                name = record["key"].rpartition("/")[2]
                self.kind, self.status = "trial" if name.startswith(_TRIAL) else "training", "RUNNING"
            elif record["op"] == "close":
                self.status, self.speed = record["status"], 0.0
            elif record["op"] == "metrics" and behind > self._start:
                values = {name: value for name, value in record["values"].items() if value is not None}
                seconds.update({n.removeprefix(TIME): v for n, v in values.items() if n.startswith(TIME)})
                self.speed = next((v for n, v in values.items() if n.startswith(SPEED)), self.speed)
        return seconds


class Board:
    """What all outboxes of a job amount to.

    run: the job's name.
    children: its outboxes so far, each with its size when this process found it.
    """

    def __init__(self, run: str, children: Callable[[], Sequence[tuple[Outbox, int]]]):
        self.run, self._children = run, children
        self._readers: dict[str, _Reader] = {}
        self.seconds: Counter[str] = Counter()
        self.runs: Counter[tuple[str, str]] = Counter()

    def look(self) -> Counter[str]:
        """Read what is new; returns the seconds that have been added."""
        new: Counter[str] = Counter()
        for outbox, size in list(self._children()):
            reader = self._readers.setdefault(str(outbox.path), _Reader(outbox, size))
            new.update(reader.look())
        gone = dict.fromkeys(self.runs, 0)  # a status that nobody has any more is shown as none
        self.runs = Counter(gone | Counter((r.kind, r.status) for r in self._readers.values() if r.kind))
        self.seconds.update(new)
        return new

    @property
    def speed(self) -> float:
        """Images a second, of what runs."""
        return sum(reader.speed for reader in self._readers.values())


class Shown:
    """Within: a job's board is brought up to date every few seconds, where Ray is connected."""

    def __init__(self, run: str, children: Callable[[], Sequence[tuple[Outbox, int]]]):
        self._board, self._gauges = Board(run, children), {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="raymed-metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._is_over.wait(PERIOD):
            if _connected():
                self._show()

    def _show(self) -> None:
        if not self._gauges:
            self._gauges = _gauges()
        new, run = self._board.look(), {"run": self._board.run}
        self._gauges["speed"].set(self._board.speed, run)
        for part, seconds in new.items():
            if seconds > 0:
                self._gauges["seconds"].inc(seconds, run | {"part": part})
        for (kind, status), count in self._board.runs.items():
            self._gauges["runs"].set(count, run | {"kind": kind, "status": status})


def _connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _gauges() -> dict[str, Any]:
    from ray.util.metrics import Counter, Gauge

    return {
        "speed": Gauge("raymed_images_per_second", "Images a second of a job's trainings", ("run",)),
        "seconds": Counter("raymed_seconds", "Where the time of a job's trainings went", ("run", "part")),
        "runs": Gauge("raymed_runs", "A job's trainings and trials", ("run", "kind", "status")),
    }
