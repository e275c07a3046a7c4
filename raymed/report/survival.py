"""One figure: the loss curve of a run that was killed and moved, over that of the same run left in peace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raymed.report.style import BLUE, GREY, ORANGE, VERMILION, figure


@dataclass(frozen=True)
class Event:
    """Something that happened to a run, and how it went on."""

    step: int
    what: str
    """Such as "a worker killed"; "" for its beginning."""
    then: str = ""
    """Who trained from there on, such as "2 workers, ZeRO 2"."""


def draw_survival(
    path: Path, peaceful: Mapping[int, float], shaken: Mapping[int, float], events: Sequence[Event]
) -> None:
    """Losses of both runs by step, and below |shaken - peaceful| / |peaceful|, with the events as vertical lines.

    peaceful, shaken: step -> loss. events: the beginning first, in the order of their steps.
    """
    steps = np.array(sorted(peaceful.keys() & shaken.keys()))
    wanted, found = (np.array([losses[step] for step in steps]) for losses in (peaceful, shaken))
    with figure(path, 8, 5.2) as drawn:
        above, below = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
        above.plot(steps, wanted, color=ORANGE, linewidth=4, alpha=0.55, label="left in peace: one process")
        above.plot(steps, found, color=BLUE, linewidth=1, label="killed, moved and continued")
        below.semilogy(steps, np.maximum(np.abs(found - wanted) / np.abs(wanted), 1e-9), color=GREY, linewidth=1)
        top = above.get_ylim()[1]
        ends = [*(event.step for event in events[1:]), steps[-1]]
        for event, end in zip(events, ends, strict=True):
            above.text((event.step + end) / 2, top, event.then, ha="center", va="bottom", fontsize=8, color=BLUE)
            for axes in (above, below) if event.what else ():
                axes.axvline(event.step, color=VERMILION, linewidth=1, linestyle="--")
            if event.what:
                height = above.get_ylim()[0] + 0.97 * (top - above.get_ylim()[0])
                above.text(event.step + 2, height, event.what, rotation=90, va="top", fontsize=7, color=VERMILION)
        above.set(ylabel="training loss", xlim=(0, steps[-1]))
        above.legend(loc="upper right", bbox_to_anchor=(1, 0.8))
        below.set(xlabel="step", ylabel="relative\ndifference", ylim=(1e-9, 1))
