"""Time and GPU-hours that a run may use, counted over all the processes that have worked on it.

One process, the driver of the job, holds the budget. What is used stands in `budget.json` in the run's folder and is
written every few seconds, so that a run that was killed goes on with what was left.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from raymed.config import UserError, check_range
from raymed.storage import write_atomic

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_FORM = re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in _UNITS))
_SAVE_EVERY = 5.0  # seconds: as much is forgotten by a kill


def parse_duration(text: str) -> float:
    """Seconds of "2h", "90m", "30s", "1h30m" or "1d12h". Raises UserError for anything else, and for nothing."""
    found = _FORM.fullmatch(text.strip().lower())
    parts = zip(found.groups(), _UNITS.values(), strict=True) if found else ()
    seconds = sum(float(number) * unit for number, unit in parts if number)
    if not seconds:
        raise UserError(f"a time must be written like 2h, 90m, 30s or 1h30m, and be more than nothing, got {text!r}")
    return seconds


@dataclass
class Budget:
    """What a run may use and has used. Made by `from_config`."""

    path: Path
    time_budget: str | None
    max_gpu_hours: float | None
    clock: Callable[[], float]
    """Seconds; only differences count, and a step back counts as no time."""
    _seconds: float = 0.0
    _gpu_seconds: float = 0.0
    _gpus: dict[str, float] = field(default_factory=dict)
    _read_at: float = 0.0
    _saved_at: float = 0.0

    @classmethod
    def from_config(
        cls,
        time_budget: str | None,
        max_gpu_hours: float | None,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> "Budget":
        """The budget of the run in `folder`, less what its earlier processes have used.

        Raises UserError for a time that cannot be read and for GPU-hours of 0 or less.
        """
        if time_budget is not None:
            parse_duration(time_budget)
        if max_gpu_hours is not None:
            check_range("max_gpu_hours", max_gpu_hours, 0, low_open=True)
        budget = cls(folder / "budget.json", time_budget, max_gpu_hours, clock)
        if budget.path.is_file():
            used = json.loads(budget.path.read_text())
            budget._seconds, budget._gpu_seconds = used["seconds"], used["gpu_hours"] * 3600
        budget._read_at = budget._saved_at = clock()
        return budget

    @property
    def seconds_used(self) -> float:
        """Time in which a process was at work on the run."""
        self._count()
        return self._seconds

    @property
    def gpu_hours_used(self) -> float:
        """GPUs x time, summed over what ran."""
        self._count()
        return self._gpu_seconds / 3600

    def seconds_left(self, gpus: float) -> float:
        """How long work on so many GPUs may still go on; infinite without a budget."""
        self._count()
        left = [math.inf]
        if self.time_budget is not None:
            left.append(parse_duration(self.time_budget) - self._seconds)
        if self.max_gpu_hours is not None and gpus:
            left.append((self.max_gpu_hours * 3600 - self._gpu_seconds) / gpus)
        return min(left)

    def started(self, name: str, gpus: float) -> None:
        """A training runs from now on so many GPUs, or a fraction of one."""
        self._count()
        self._gpus[name] = gpus

    def ended(self, name: str) -> None:
        """It does not run any more; a name that is not running is ignored."""
        self._count()
        self._gpus.pop(name, None)
        self.save()

    @contextmanager
    def running(self, name: str, gpus: float) -> Iterator[None]:
        """Within: a training runs."""
        self.started(name, gpus)
        try:
            yield
        finally:
            self.ended(name)

    def exhausted(self) -> str | None:
        """Why the run has to end now, as a sentence; None while it may go on. Ask often: this also keeps the books."""
        self._count()
        reason = self._reason()
        if reason or self._read_at - self._saved_at >= _SAVE_EVERY:
            self.save()
        return reason

    def _reason(self) -> str | None:
        if self.time_budget is not None and self._seconds >= parse_duration(self.time_budget):
            return f"the time budget of {self.time_budget} is used up (--time-budget)"
        if self.max_gpu_hours is not None and self._gpu_seconds >= self.max_gpu_hours * 3600:
            return f"the budget of {self.max_gpu_hours:g} GPU-hours is used up (--max-gpu-hours)"
        return None

    def save(self) -> None:
        """Write down what is used."""
        self._count()
        self._saved_at = self._read_at
        used = {"seconds": round(self._seconds, 3), "gpu_hours": round(self._gpu_seconds / 3600, 6)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(used) + "\n")

    def _count(self) -> None:
        now = self.clock()
        passed, self._read_at = max(0.0, now - self._read_at), now
        self._seconds += passed
        self._gpu_seconds += passed * sum(self._gpus.values())
