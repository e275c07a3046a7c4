"""Figures of a sweep: places on an axis, local means, importance, and that what is drawn reaches the picture."""

import dataclasses
import math

import numpy as np
import pytest
import sweep_example
from PIL import Image
from test_figures import area, example

from raymed.report import sweep_figures
from raymed.report.axis import Axis, option_text
from raymed.report.figures import _confusion, confusion, forest
from raymed.report.importance import importance, importance_figure
from raymed.report.style import BLUE, ORANGE, VERMILION
from raymed.report.sweep_record import finished, short_names, stopped
from raymed.space import Choice, Float, Int

MARKED = {0: ("default", "D"), 5: ("chosen", "*")}


def picture(path):
    """Pixels (H, W, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def trial(number, value, params=None, status="finished", seeds=(0.0,)):
    per_seed = [] if value is None else [value + shift for shift in seeds]
    return {"number": number, "params": params or {}, "value": value, "status": status, "rungs": {}} | {
        "per_seed": per_seed
    }


def test_places_on_an_axis():
    assert Axis(Float(0, 4), []).place([0, 1, 4, 5, None]).tolist()[:4] == [0, 0.25, 1, 1]
    assert math.isnan(Axis(Float(0, 4), []).place([None])[0])
    assert Axis(Float(1e-4, 1, log=True), []).place([1e-4, 1e-2, 1.0, 0.0]) == pytest.approx([0, 0.5, 1, 0])
    choice = Axis(Choice((None, 0.5)), [0.25, None])
    assert choice.options == [None, 0.5, 0.25]
    assert choice.place([None, 0.5, 0.25]) == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    spread = Axis(Choice(("a", "b")), []).place(["a"] * 50, spread=0.4)
    assert 0.15 <= spread.min() < 0.17 and 0.33 < spread.max() <= 0.35


def test_ticks_of_an_axis():
    assert Axis(Float(1e-4, 1e-1, log=True), []).ticks()[1] == ["0.0001", "0.001", "0.01", "0.1"]
    assert Axis(Int(0, 20), []).ticks()[1] == ["0", "5", "10", "15", "20"]
    assert Axis(Choice((None, True, 0.123456)), []).ticks()[1] == ["none", "true", "0.1235"]
    positions, _ = Axis(Float(2e-3, 4e-3, log=True), []).ticks()  # no power of ten inside
    assert len(positions) >= 2 and 0 <= min(positions) and max(positions) <= 1
    assert option_text(False) == "false" and option_text(3) == "3"


def test_short_names_are_the_shortest_that_differ():
    names = ["losses.asl.clip", "head.optim.clip", "head.optim.lr"]
    assert list(short_names(names).values()) == ["asl.clip", "optim.clip", "lr"]


def test_local_mean_follows_the_values_seed_by_seed():
    at = np.linspace(0.1, 0.9, 200)
    curve = sweep_figures.local_mean(at, np.stack([at, 2 * at + 1], axis=1))
    middle = slice(40, 61)
    assert curve[middle, 0] == pytest.approx(sweep_figures.GRID[middle], abs=0.02)
    assert curve[middle, 1] == pytest.approx(2 * sweep_figures.GRID[middle] + 1, abs=0.04)
    assert np.isnan(curve[:10]).all() and np.isnan(curve[91:]).all()


def test_local_mean_is_not_drawn_where_a_single_trial_lies():
    curve = sweep_figures.local_mean(np.array([0.0, 0.02, 0.04, 0.9]), np.ones((4, 1)))
    assert np.isfinite(curve[:5]).all() and np.isnan(curve[60:91]).all()


def test_view_leaves_outliers_out():
    trials = [trial(i, 0.90 + 0.001 * i) for i in range(20)] + [trial(20, 0.1)]
    view = sweep_figures._View.of(trials)
    assert view.limits[0] > 0.85 and view.limits[1] < 0.95
    placed, outside = view.place(np.array([0.1, 0.91, 0.99]))
    assert outside.tolist() == [True, False, True]
    assert view.limits[0] < placed[0] < 0.9 and placed[1] == 0.91 and 0.919 < placed[2] < view.limits[1]


def test_finished_and_stopped_need_a_finite_value():
    trials = [trial(0, 0.9), trial(1, math.nan), trial(2, None), trial(3, 0.8, status="stopped")]
    assert [t["number"] for t in finished(trials)] == [0] and [t["number"] for t in stopped(trials)] == [3]


@pytest.mark.parametrize("mode", ["max", "min"])
def test_history_sensitivity_and_parallel(tmp_path, mode):
    trials = sweep_example.trials(24)
    if mode == "min":
        trials = [dict(t, value=None if t["value"] is None else -t["value"]) for t in trials]
        trials = [dict(t, per_seed=[-v for v in t["per_seed"]]) for t in trials]
    sweep_figures.history(tmp_path / "history.png", trials, "AUPRC", mode, 32, MARKED)
    sweep_figures.sensitivity(tmp_path / "sensitivity.png", trials, sweep_example.SPACE, "AUPRC", MARKED, 3)
    sweep_figures.parallel(tmp_path / "parallel.png", trials, sweep_example.SPACE, "AUPRC", mode, MARKED)
    history, sensitivity, parallel = (picture(tmp_path / f"{n}.png") for n in ("history", "sensitivity", "parallel"))
    assert area(history, BLUE) > 300 and area(history, ORANGE) > 500 and area(history, VERMILION) > 100
    assert area(sensitivity, BLUE) > 1000 and area(sensitivity, ORANGE) > 1000
    assert area(parallel, VERMILION) > 1000 and area(parallel, "#c9c9c9") > 1000


def test_stopped_trials_enter_no_line(tmp_path):
    space = {"a": Float(0, 1)}
    done = [trial(i, 0.9 + 0.001 * i, {"a": i / 10}, seeds=(0, 0.001)) for i in range(11)]
    cut = [trial(11 + i, 0.89, {"a": i / 10}, status="stopped", seeds=(0, 0)) for i in range(11)]
    lines = []
    for trials in (done, done + cut):
        sweep_figures.sensitivity(tmp_path / "s.png", trials, space, "AUPRC", {}, 2)
        pixels = picture(tmp_path / "s.png")
        rows = np.flatnonzero((pixels == [230, 159, 0]).all(axis=-1).any(axis=1))
        lines.append(rows.max() - rows.min())
    assert lines[1] < lines[0]  # the same line on a longer axis; pulled down by 0.89 it would be flat
    assert lines[1] > 0.3 * lines[0]


def test_importance_finds_what_matters_and_is_the_same_again():
    random = np.random.default_rng(0)
    space = {"matters": Float(0, 1), "idle": Float(0, 1), "word": Choice((None, "x"))}
    trials = [
        trial(i, a + 0.01 * b, {"matters": a, "idle": b, "word": (None, "x")[i % 2]}, seeds=(0, 0.1))
        for i, (a, b) in enumerate(random.random((30, 2)).tolist())
    ]
    shares = importance(trials, space, 2)
    assert np.mean(shares["matters"]) > 0.9 and sum(map(np.mean, shares.values())) == pytest.approx(1)
    assert shares == importance(trials, space, 2)
    outside = trial(99, 0.5, {"matters": 7.0, "idle": 0.5, "word": None}, seeds=(0, 0.1))
    assert importance([*trials, outside], space, 2) == shares


def test_importance_is_silent_where_it_would_say_nothing():
    space = {"a": Float(0, 1), "b": Float(0, 1)}
    random = np.random.default_rng(0)
    trials = [trial(i, a, {"a": a, "b": b}) for i, (a, b) in enumerate(random.random((10, 2)).tolist())]
    assert importance(trials, space, 1) is not None
    assert importance(trials[:9], space, 1) is None
    assert importance(trials, {"a": Float(0, 1)}, 1) is None
    assert importance([dict(t, per_seed=[0.9]) for t in trials], space, 1) is None
    assert importance([dict(t, per_seed=[math.nan]) for t in trials], space, 1) is None


def test_importance_figure(tmp_path):
    importance_figure(tmp_path / "importance.png", {"head.lr": [0.8, 0.7], "losses.asl.clip": [0.2, 0.3]})
    assert area(picture(tmp_path / "importance.png"), BLUE) > 300


def test_confusion_counts_decisions_at_the_threshold():
    scores, targets = np.array([0.1, 0.5, 0.6, 0.4, 0.9]), np.array([0, 0, 0, 1, 1])
    assert _confusion(scores, targets, 0.5).tolist() == [[1, 2], [1, 1]]


def test_confusion_and_forest(tmp_path):
    curves = {"ce": [example(0), example(1)], "asl": [example(2)]}
    confusion(tmp_path / "confusion.png", curves, {"ce": [0.5, 0.4], "asl": [0.5]}, ("a very long class name", "sick"))
    assert picture(tmp_path / "confusion.png").var() > 1000
    figure = {"mean": 0.01, "std": 0.01, "n": 5, "ci_low": 0.002, "ci_high": 0.02}
    crossing = figure | {"mean": 0.007, "ci_low": -0.001, "ci_high": 0.017}  # as long an interval
    others = {"wide": {"difference": figure | {"ci_low": -0.05, "ci_high": 0.05}}}
    others["undefined"] = {"difference": dict.fromkeys(figure)}
    forest(tmp_path / "excludes.png", {"Test": {"asl": {"difference": figure}, **others}}, "AUPRC")
    forest(tmp_path / "crosses.png", {"Test": {"asl": {"difference": crossing}, **others}}, "AUPRC")
    filled, hollow = (area(picture(tmp_path / f"{name}.png"), BLUE) for name in ("excludes", "crosses"))
    assert filled > hollow + 50


def test_record_is_plain_data():
    record = sweep_example.record(num_trials=1, num_finalists=0, num_seeds=1, num_images=60, n_boot=5)
    assert record.finalists == [] and record.objective == "validation AUPRC"
    assert dataclasses.replace(record, metric="brier").objective == "validation Brier"
