"""The figure of a run that was killed, over one that was not."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from raymed.report import survival
from raymed.report.survival import Event, draw_survival, running_mean


def test_a_running_mean_is_that_of_the_neighbours_there_are():
    assert running_mean(np.array([0.0, 3.0, 6.0, 0.0]), 3) == pytest.approx([1.5, 3, 3, 3])
    assert running_mean(np.array([1.0, 2.0]), 1) == pytest.approx([1, 2])
    assert running_mean(np.full(7, 5.0), 5) == pytest.approx([5] * 7)


def test_both_curves_show_and_no_text_lies_on_them(tmp_path, monkeypatch):
    drawn: list[Figure] = []
    saved = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), saved(self, *args, **kwargs))
    )
    losses = {step: 1 / step for step in range(1, 301)}
    events = [
        Event(0, "", "2 workers, ZeRO 2"),
        Event(90, "a worker killed", "2 workers, ZeRO 2"),
        Event(150, "all killed, the disk lost", "1 worker, plain"),
        Event(230, "stopped", "2 workers, ZeRO 3"),
    ]
    draw_survival(tmp_path / "figure.png", losses, {step: 1.01 * loss for step, loss in losses.items()}, events)
    assert survival.ORANGE != survival.BLUE and (tmp_path / "figure.png").stat().st_size > 10_000
    above, below = drawn[0].axes
    peaceful, shaken = above.lines[:2]
    assert peaceful.get_linewidth() > 2 * shaken.get_linewidth() and shaken.get_zorder() >= peaceful.get_zorder()
    assert below.lines[0].get_ydata() == pytest.approx([0.01] * 300)
    boxes = [text.get_window_extent() for text in above.texts]
    boxes += [text.get_window_extent() for text in drawn[0].legends[0].get_texts()]
    assert len(boxes) == 7 + 3 and all(box.y0 >= above.bbox.y1 for box in boxes)
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
