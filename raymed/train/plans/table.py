"""A plan as tables for a terminal, and as JSON."""

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from raymed.train.plans.estimate import in_bytes, in_milliseconds, in_time

if TYPE_CHECKING:
    from raymed.train.plans.plan import PhasePlan, PlanReport

_WIDTH = 100
_LINKS = (
    "weak scaling: speed of so many GPUs with as many images each, of that many times one, were a step as long as "
    "here; NVLink of 450 GB/s a GPU, InfiniBand of 400 and Ethernet of 12.5 GB/s a node"
)
_CUT = "ZeRO 3: networks are built, and scored, whole on every device; it needs room for their weights at least"
_NAMES = {
    "weights": "weights",
    "fixed": "frozen, statistics",
    "gradients": "gradients",
    "optimizer": "optimiser state",
    "master": "fp32 copy",
    "average": "running average",
    "buffers": "for communication",
    "host": "(on the host)",
}


def lines(report: "PlanReport") -> list[str]:
    """The plan at a width of 100 columns, coloured where it is printed on a terminal."""
    from rich.console import Console
    from rich.padding import Padding

    console = Console(width=_WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(_heading(report))
        for phase in report.phases:
            console.print(f"\n[bold]{_title(phase)}[/]")
            console.print(_table(report, phase))
            for line in _measures(report, phase):
                console.print(Padding(line, (0, 0, 0, 2), expand=False))
        if any(phase.cost for phase in report.phases):
            console.print(f"\n{_LINKS}")
        if any(place.stage == 3 for place in report.places):
            console.print(f"\n{_CUT}")
        console.print(f"\n[bold]advice[/]  {report.advice}")
    return capture.get().rstrip("\n").split("\n")


def _heading(report: "PlanReport") -> str:
    compute = report.compute
    workers = f"{compute.workers} worker{'s' if compute.workers > 1 else ''}"
    room = in_bytes(report.whole) + (f", {in_bytes(report.memory)} a worker" if report.memory < report.whole else "")
    return (
        f"[bold]plan[/]: {workers}, {report.asked}, {compute.precision}; {report.device} has {room}. "
        "Bytes of one worker:"
    )


def _table(report: "PlanReport", phase: "PhasePlan") -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for place in report.places:
        marks = ["asked"] * (place == report.asked) + ["advised"] * (place == report.advised)
        head = [f"ZeRO {place.stage}", *["+ offload"] * place.offload, *marks]
        table.add_column("\n".join(head), justify="right", no_wrap=True, style="bold" if marks else "")
    for label, values in _rows(report, phase):
        table.add_row(label, *values)
    table.add_section()
    table.add_row("needed", *(_needed(report, phase, place) for place in report.places), style="bold")
    table.add_row("of its memory", *(f"{100 * phase.needed(place) / report.memory:.0f} %" for place in report.places))
    table.add_row("sent a step", *(in_bytes(phase.sent(place, phase.workers)) for place in report.places))
    return table


def _title(phase: "PhasePlan") -> str:
    p = phase.phase
    micro = f", in {p.accumulate} micro-batches" if p.accumulate > 1 else ""
    return f"{p.name}: {p.steps} steps of {p.batch_size} images{micro}, {phase.micro_batch} at a time on a worker"


def _rows(report: "PlanReport", phase: "PhasePlan") -> Iterator[tuple[str, list[str]]]:
    from raymed.train.plans.plan import CONTEXT

    several = len(phase.sizes) > 1
    for network, sizes in phase.sizes.items():
        parts = [phase.memory(network, place) for place in report.places]
        if several:
            trained = f"{_count(sizes.trained)} trained" if sizes.trained else "not trained"
            yield f"[italic]{network}[/] ({trained})", [""] * len(report.places)
        for name, label in _NAMES.items():
            values = [getattr(part, name) for part in parts]
            if any(values):
                yield ("  " if several else "") + label, [in_bytes(value) if value else "-" for value in values]
    yield "activations", [in_bytes(phase.activations) if phase.cost else "?"] * len(report.places)
    if phase.gpu:  # in brackets, as what is offloaded: not on the device
        yield "(checkpoint's copy)", [in_bytes(phase.copied)] * len(report.places)
    else:
        yield "checkpoint's copy", [in_bytes(phase.copy_share())] * len(report.places)
    yield "the process itself", [in_bytes(CONTEXT)] * len(report.places)


def _needed(report: "PlanReport", phase: "PhasePlan", place: Any) -> str:
    needed = in_bytes(phase.needed(place))
    return needed if phase.needed(place) <= report.room else f"[red]{needed}[/]"


def _measures(report: "PlanReport", phase: "PhasePlan") -> Iterator[str]:
    cost, place = phase.cost, report.asked
    shared = f", shared by {phase.workers} workers" if phase.workers > 1 and not phase.gpu else ""
    yield f"a checkpoint is written from a copy of {in_bytes(phase.copied)} in the memory of rank 0's host{shared}"
    if cost is None:
        yield "not measured: an unsharded copy does not fit on this machine; activations and times are unknown"
        return
    yield (
        f"a step {in_milliseconds(cost.step_seconds)} without communication, {in_time(phase.seconds)} in all; "
        f"checkpoints {in_bytes(cost.disk_bytes)}"
    )
    yield (
        f"{_count(cost.flops_per_sample)} FLOPs an image; that is {100 * phase.mfu:.2g} % of the "
        f"{_count(cost.peak_flops)} FLOP/s of a worker ({cost.peak_source})"
    )
    links: dict[str, list[str]] = {}
    for p in phase.projected(place):
        links.setdefault(p.link.name, []).append(f"{p.workers}: {100 * p.efficiency:.0f} %")
    yield "weak scaling: " + "; ".join(f"{link} {', '.join(shares)}" for link, shares in links.items())


def as_dict(report: "PlanReport") -> dict[str, Any]:
    """The plan in numbers and names alone."""
    return {
        "workers": report.compute.workers,
        "precision": report.compute.precision,
        "device": report.device,
        "memory_bytes": report.memory,
        "asked": str(report.asked),
        "advised": None if report.advised is None else str(report.advised),
        "advice": report.advice,
        "refusal": report.refusal,
        "phases": {phase.phase.name: _phase_dict(report, phase) for phase in report.phases},
    }


def _phase_dict(report: "PlanReport", phase: "PhasePlan") -> dict[str, Any]:
    cost = phase.cost
    return {
        "steps": phase.phase.steps,
        "micro_batch": phase.micro_batch,
        "checkpoint_copy_bytes": phase.copied,
        "trained_parameters": {name: sizes.trained for name, sizes in phase.sizes.items()},
        "bytes": {
            str(place): {name: dataclasses.asdict(phase.memory(name, place)) for name in phase.sizes}
            | {"needed": phase.needed(place), "sent_a_step": round(phase.sent(place, phase.workers))}
            for place in report.places
        },
        "measured": None if cost is None else dataclasses.asdict(cost),
        "seconds": None if math.isnan(phase.seconds) else phase.seconds,
        "mfu": None if math.isnan(phase.mfu) else phase.mfu,
        "weak_scaling": [
            {"workers": p.workers, "link": p.link.name, "step_seconds": p.step_seconds, "efficiency": p.efficiency}
            for p in phase.projected(report.asked)
        ],
    }


def _count(number: float) -> str:
    """129, 12.3 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:.0f}"
