"""One figure: the loss curve of a run that was killed and moved, over that of the same run left in peace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raymed.report.style import BLUE, GREY, ORANGE, VERMILION, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST = 1e-9  # relative difference that is drawn, since a logarithm knows no 0


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
    """Losses of both runs by step with the peaceful one's running mean, and below |shaken - peaceful| / |peaceful|.
    Events are vertical lines, named above the curves.

    peaceful, shaken: step -> loss. events: the beginning first, in the order of their steps.
    """
    steps = np.array(sorted(peaceful.keys() & shaken.keys()))
    wanted, found = (np.array([losses[step] for step in steps]) for losses in (peaceful, shaken))
    with figure(path, 8, 5.4) as drawn:
        above, below = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
        above.plot(steps, wanted, color=ORANGE, linewidth=3.5, alpha=0.5, label="left in peace: one process")
        above.plot(steps, found, color=BLUE, linewidth=0.8, label="killed, moved and continued")
        width = max(1, len(steps) // 12) | 1
        above.plot(steps, running_mean(wanted, width), "k", linewidth=1.6, label=f"running mean of {width} steps")
        below.semilogy(steps, np.maximum(np.abs(found - wanted) / np.abs(wanted), _LEAST), color=GREY, linewidth=1)
        _name(above, below, events, int(steps[-1]))
        above.set(ylabel="training loss", xlim=(0, steps[-1]))
        below.set(xlabel="step", ylabel="relative\ndifference", ylim=(_LEAST, 1))
        drawn.legend(loc="outside upper center", ncols=3)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of `width` (odd) neighbours about each of the values (N,), of those that there are at both ends."""
    window = np.ones(width)
    counts = np.convolve(np.ones(len(values)), window)
    return (np.convolve(values, window) / counts)[width // 2 :][: len(values)]


def _name(above: "Axes", below: "Axes", events: Sequence[Event], last: int) -> None:
    """Events as lines through both axes; in two rows above them what happened, and between them who trained."""
    ends = [*(event.step for event in events[1:]), last]
    for event, end in zip(events, ends, strict=True):
        place = {"transform": above.get_xaxis_transform(), "va": "bottom", "ha": "center"}
        above.text((event.step + end) / 2, 1.01, event.then, fontsize=8, color=BLUE, **place)
        if event.what:
            above.text(event.step, 1.07, event.what, fontsize=8, color=VERMILION, **place)
            for axes, height in ((above, 1.06), (below, 1)):
                axes.axvline(event.step, ymax=height, color=VERMILION, linewidth=1, linestyle="--", clip_on=False)
