"""Figures: the curves that are drawn, as numbers; and that what is drawn reaches the picture."""

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score

from raymed.report import calibration, cam_panel, figures, pr_roc, training_curves
from raymed.report.style import BLUE, DPI, GREEN, ORANGE, VERMILION, figure

FIGURE = {"mean": 0.9, "std": None, "n": 1, "ci_low": 0.85, "ci_high": 0.95}
OF_METHOD = dict.fromkeys(("auroc", "auprc", "ece"), FIGURE)


def example(seed, n=300):
    random = np.random.default_rng(seed)
    targets = (random.random(n) < 0.3).astype(int)
    return np.round(1 / (1 + np.exp(-random.normal(3 * targets - 1.5, 1.5))), 2), targets


def picture(path):
    """Pixels (H, W, 3) of a PNG of some substance."""
    assert path.stat().st_size > 10_000
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 2 * DPI
        return np.asarray(image.convert("RGB"))


def area(pixels, colour):
    """How many pixels have exactly this colour."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((pixels == rgb).all(axis=-1).sum())


@pytest.mark.parametrize("seed", range(3))
def test_area_under_the_drawn_curves_is_the_metric(seed):
    scores, targets = example(seed)
    fine = np.linspace(0, 1, 200_001)
    precision = figures._precision_at(fine, scores, targets)
    assert precision.mean() == pytest.approx(average_precision_score(targets, scores), abs=1e-4)
    sensitivity = figures._sensitivity_at(fine, scores, targets)
    assert sensitivity.mean() == pytest.approx(roc_auc_score(targets, scores), abs=1e-4)
    assert sensitivity[0] == 0 and sensitivity[-1] == 1
    assert precision[-1] == pytest.approx(targets[scores >= scores[targets == 1].min()].mean())


def test_reliability_pools_seeds_by_bin():
    seeds = [(np.array([0.01, 0.03, 1.0]), np.array([0, 1, 1])), (np.array([0.05, 0.5]), np.array([0, 1]))]
    count, score, observed = figures._reliability(seeds)
    assert count.tolist() == [3, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert score[[0, 7, 14]] == pytest.approx([0.03, 0.5, 1.0])
    assert observed[[0, 7, 14]] == pytest.approx([1 / 3, 1, 1])


def test_wilson_interval_equals_scipy():
    for positive, count in ((0, 5), (3, 7), (40, 40)):
        low, high = figures._wilson(np.array(positive / count), np.array(count))
        expected = binomtest(positive, count).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_pr_roc(tmp_path):
    curves = {"ce": [example(0), example(1)], "asl": [example(2)]}
    pr_roc(tmp_path / "curves.png", curves, {"ce": OF_METHOD, "asl": OF_METHOD})
    pixels = picture(tmp_path / "curves.png")
    assert area(pixels, BLUE) > 1000 and area(pixels, ORANGE) > 1000
    assert pixels.shape[1] == pytest.approx(8 * DPI, rel=0.05)
    edge = np.concatenate([pixels[:3].ravel(), pixels[-3:].ravel(), pixels[:, :3].ravel(), pixels[:, -3:].ravel()])
    assert (edge == 255).all()  # nothing is cut off


def test_calibration(tmp_path):
    curves = {"ce": [example(0), example(1)], "asl": [example(2)], "focal": [example(3)], "supcon": [example(4)]}
    calibration(tmp_path / "calibration.png", curves, dict.fromkeys(curves, OF_METHOD))
    pixels = picture(tmp_path / "calibration.png")
    assert area(pixels, BLUE) > 1000 and area(pixels, ORANGE) > 1000 and area(pixels, GREEN) > 1000


@pytest.mark.parametrize(("score", "expected"), [(0.2, (0.99, 0.02)), (0.6, (0.02, 0.98))])
def test_what_is_told_of_a_calibration_hides_none_of_it(tmp_path, score, expected):
    """A curve of scores that are too high runs where the text stands otherwise."""
    with figure(tmp_path / "panel.png", 3, 4) as drawn:
        upper, lower = drawn.subplots(2, 1)
        figures._reliability_panel(upper, lower, [(np.full(20, score), np.arange(20) % 10 == 0)], BLUE, "ECE")
        assert [text.get_position() for text in upper.texts] == [expected]


def test_cam_panel_marks_correct_and_incorrect(tmp_path):
    image = np.linspace(0, 255, 48 * 48).reshape(48, 48)
    cam = np.outer(np.hanning(48), np.hanning(48))

    def panel(sides):
        path = tmp_path / "cam.png"
        cam_panel(path, [image] * len(sides), [cam] * len(sides), ["occlusion 0.9"] * len(sides), sides)
        pixels = picture(path)
        return area(pixels, GREEN), area(pixels, VERMILION)

    correct, incorrect = panel([("left", "left"), ("right", "right"), None])
    assert correct > 100 and incorrect == 0
    correct, incorrect = panel([("left", "right")])
    assert correct == 0 and incorrect > 100


def test_cam_panel_shows_colour_images(tmp_path):
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 255
    cam_panel(tmp_path / "cam.png", [red], [np.zeros((32, 32))], ["spill 0.1"], [None])
    assert area(picture(tmp_path / "cam.png"), "#ff0000") > 50_000  # also under a map of zero


def test_training_curves(tmp_path):
    steps = np.arange(500)
    noisy = np.exp(-steps / 100) + 0.1 * np.random.default_rng(0).normal(size=500)
    history = {
        "SupCon loss": {"train": list(zip(steps, noisy, strict=True))},
        "AUROC": {"val": [(100, 0.8), (200, 0.9), (300, 0.95)]},
    }
    training_curves(tmp_path / "training.png", history)
    pixels = picture(tmp_path / "training.png")
    assert area(pixels, BLUE) > 1000 and area(pixels, ORANGE) > 1000


def test_running_mean_is_centred():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    points = [(step, 2.0 * step) for step in range(1000, 1303)]
    line = figures._training_line(axes, points, BLUE)
    steps, values = line.get_data()
    assert np.abs(values - 2 * steps).max() <= 1  # half a step, where the window is even
    assert len(steps) == 303 - 12 + 1


def test_good_curves_are_shown_again_from_nearby(tmp_path):
    curves = {"ce": [example(0)]}
    areas = []
    for mean in (0.90, 0.97):
        figure = {metric: FIGURE | {"mean": mean} for metric in ("auroc", "auprc")}
        pr_roc(tmp_path / "curves.png", curves, {"ce": figure})
        areas.append(area(picture(tmp_path / "curves.png"), BLUE))
    assert areas[1] > 1.1 * areas[0]
