"""What a sweep has done, as JSON lines: enough to continue it after any kill, readable with a text editor.

One line an event: {"trial": n, "params": {...}} when a trial is chosen, {"trial": n, "rung": k, "value": v} after each
evaluation, {"trial": n, "status": "finished" | "stopped" | "failed", "value": v, "values": [...]} at its end; `values`
are those of the seeds or folds whose mean is the value.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass
class TrialRecord:
    """One trial so far."""

    number: int
    params: dict[str, Any]
    rungs: dict[int, float] = field(default_factory=dict)
    """Evaluation number -> objective."""
    status: Status = "running"
    value: float | None = None
    """The objective at the trial's end: the mean over seeds or folds."""
    values: list[float] = field(default_factory=list)
    """The same of each seed or fold."""


class Journal:
    """The trials of one sweep. Only the driver writes it."""

    def __init__(self, path: Path):
        self.path = path
        self.trials: dict[int, TrialRecord] = {}
        for event in _complete_lines(path):
            self._apply(event)

    def choose(self, number: int, params: Mapping[str, Any]) -> None:
        """A new trial."""
        self._write({"trial": number, "params": dict(params)})

    def reach(self, number: int, rung: int, value: float) -> None:
        """A trial was evaluated; a repetition after a restart is not written again."""
        if rung not in self.trials[number].rungs:
            self._write({"trial": number, "rung": rung, "value": value})

    def end(self, number: int, status: Status, value: float | None, values: Sequence[float] = ()) -> None:
        """A trial has ended."""
        self._write({"trial": number, "status": status, "value": value, "values": list(values)})

    def unfinished(self) -> list[int]:
        """Numbers of trials that were chosen and have not ended."""
        return [t.number for t in self.trials.values() if t.status == "running"]

    def ended(self) -> list[TrialRecord]:
        """Trials with an objective: finished, or stopped early at their last rung."""
        return [t for t in self.trials.values() if t.status in ("finished", "stopped") and t.value is not None]

    def ranked(self, mode: str) -> list[TrialRecord]:
        """The finished trials, the best objective first; of equal ones the earlier."""
        sign = -1 if mode == "max" else 1
        finished = [t for t in self.ended() if t.status == "finished"]
        return sorted(finished, key=lambda t: (sign * (t.value or 0.0), t.number))

    def best(self, mode: str) -> TrialRecord | None:
        """The finished trial with the best objective."""
        return next(iter(self.ranked(mode)), None)

    def _write(self, event: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._apply(event)

    def _apply(self, event: dict[str, Any]) -> None:
        number = event["trial"]
        if "params" in event:
            self.trials[number] = TrialRecord(number, event["params"])
        elif "rung" in event:
            self.trials[number].rungs[event["rung"]] = event["value"]
        else:
            trial = self.trials[number]
            trial.status, trial.value, trial.values = event["status"], event["value"], event["values"]


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The events; a last line torn by a kill is cut off, so that the next one stands on its own."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]
