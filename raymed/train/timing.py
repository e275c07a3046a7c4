"""Where the time of a training went and how fast it was: as metrics beside its losses (`time/forward` and its like, in
seconds since the evaluation before; `speed/PHASE`, images a second), and summed up for its report."""

import statistics
from collections.abc import Mapping
from typing import Any

from raymed.ledger import NAMES
from raymed.tracking.outbox import Outbox

TIME, SPEED = "time/", "speed/"


def timing(phase: str, seconds: Mapping[str, float], images_per_second: float) -> dict[str, float]:
    """Metrics of one stretch between two evaluations."""
    return {f"{TIME}{name}": value for name, value in seconds.items()} | {f"{SPEED}{phase}": images_per_second}


def time_spent(outbox: Outbox) -> dict[str, float]:
    """Seconds by name over a whole training; what a restart repeated counts once."""
    records = _metrics(outbox)
    totals = {name: sum(values.get(f"{TIME}{name}") or 0.0 for values in records) for name in NAMES}
    return {name: round(total, 3) for name, total in totals.items() if total}


def speeds(outbox: Outbox, costs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | str]]:
    """Phase -> images a second, in the median of its evaluations, and FLOPs an image and MFU for phases whose cost was
    measured. costs: phase -> the fields of its StepCost."""
    from raymed.train.plans.flops import mfu

    told: dict[str, dict[str, float | str]] = {}
    for phase, values in _by_phase(outbox).items():
        told[phase] = {"images_per_second": round(statistics.median(values), 1)}
        if cost := costs.get(phase):
            used = mfu(cost["flops_per_sample"], statistics.median(values), cost["peak_flops"], cost["workers"])
            told[phase] |= {"flops_per_image": cost["flops_per_sample"], "mfu": round(used, 4)}
            told[phase] |= {"peak": cost["peak_source"]}
    return told


def _metrics(outbox: Outbox) -> list[dict[str, float | None]]:
    return [record["values"] for record in outbox.records() if record["op"] == "metrics"]


def _by_phase(outbox: Outbox) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for values in _metrics(outbox):
        for name, value in values.items():
            if name.startswith(SPEED) and value:
                found.setdefault(name.removeprefix(SPEED), []).append(value)
    return found
