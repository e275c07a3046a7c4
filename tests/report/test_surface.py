"""The surface over two hyper-parameters: it finds a planted optimum, and is silent where the trials say little."""

import clip_example
import numpy as np
import pytest
from test_figures import area, picture

from raymed.report.page import Picture, Text
from raymed.report.style import ORANGE, VERMILION
from raymed.report.surface import fit_surface, surface_block
from raymed.space import Float

SPACE = clip_example.SPACE
BETA, TEMPERATURE, LR = SPACE


def test_it_finds_the_planted_optimum():
    surface = fit_surface(clip_example.trials(40), SPACE, "max")
    assert surface is not None and len(surface.values) == 36  # cut trials have the value of another time
    grid = np.linspace(0, 1, 41)
    for name, optimum in ((BETA, 0.3), (TEMPERATURE, 0.6), (LR, 0.66)):
        mean, deviation, known = surface.mean(surface.through_best([name], grid[:, None]))
        assert abs(grid[mean.argmax()] - optimum) < 0.15
        assert known.mean() > 0.9 and (deviation[known] < 0.05).all()


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_band_holds_the_true_mean(mode):
    sign = 1 if mode == "max" else -1
    trials = [dict(t, value=sign * t["value"]) for t in clip_example.trials(40, seed=1)]
    surface = fit_surface(trials, SPACE, mode)
    assert surface.values[surface.best] == sign * max(sign * surface.values)
    places = np.random.default_rng(2).random((300, 3))
    mean, deviation, known = surface.mean(places)
    truth = sign * (0.7 - (0.2, 0.3, 0.4) * (places - (0.3, 0.6, 0.66)) ** 2 @ np.ones(3))
    inside = np.abs(mean - truth) < 1.96 * deviation
    assert inside[known].mean() > 0.85


def test_places_without_trials_are_not_known():
    near = [t for t in clip_example.trials(120) if t["params"][BETA] < 0.3][:20]
    surface = fit_surface(near, SPACE, "max")
    _, deviation, known = surface.mean(surface.through_best([BETA], np.array([[0.1], [0.2], [0.6], [1.0]])))
    assert known.tolist() == [True, True, False, False]
    assert deviation[3] > 2 * deviation[1]
    values = np.random.default_rng(0).normal(size=20)
    noise = fit_surface([dict(t, value=value) for t, value in zip(near, values, strict=True)], SPACE, "max")
    mean, deviation, known = noise.mean(noise.at)
    assert (deviation[known] > 0.1).all()  # values without a law are not drawn through


def test_too_few_or_equal_trials_have_no_surface():
    trials = clip_example.trials(40)
    assert fit_surface(trials[:8], SPACE, "max") is None  # 7 of them finished
    assert fit_surface([dict(t, value=0.5) for t in trials], SPACE, "max") is None
    assert fit_surface([dict(t, params=t["params"] | {BETA: 7.0}) for t in trials], SPACE, "max") is None


def test_picture_and_sentence(tmp_path):
    trials = clip_example.trials(40)
    block = surface_block(tmp_path / "s.png", trials, SPACE, (BETA, TEMPERATURE), "mean recall", "max")
    assert isinstance(block, Picture) and "36 finished trials" in block.caption and "lr = " in block.caption
    pixels = picture(tmp_path / "s.png")
    assert area(pixels, ORANGE) > 500 and area(pixels, VERMILION) > 100
    alone = {TEMPERATURE: SPACE[TEMPERATURE]}
    block = surface_block(tmp_path / "t.png", trials, alone, (BETA, TEMPERATURE), "mean recall", "max")
    assert isinstance(block, Picture) and "need not lie" not in block.caption
    assert picture(tmp_path / "t.png").shape[1] < pixels.shape[1] / 2
    few = surface_block(tmp_path / "u.png", trials[:3], SPACE, (BETA, TEMPERATURE), "mean recall", "max")
    assert few == Text("No surface is shown: 3 finished trials where 8 that differ are needed.", quiet=True)
    other = surface_block(tmp_path / "u.png", trials, {"x": Float(0, 1)}, (BETA,), "mean recall", "max")
    assert isinstance(other, Text) and not (tmp_path / "u.png").exists()
