"""Figures of a clinical evaluation: the numbers that are drawn, and that they reach the picture."""

from dataclasses import replace

import clinical_example
import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from test_figures import area, picture

from raymed.metrics.operating import at_prevalence
from raymed.report import clinical_figures as draw
from raymed.report.clinical_figures import Level
from raymed.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION

HAND = Level("case", np.array([0.9, 0.8, 0.4, 0.6, 0.3, 0.2, 0.1]), np.array([1, 1, 1, 0, 0, 0, 0]), 0.5, {})
FEW = {"auroc": None, "sensitivity": None, "specificity": None}


@pytest.fixture(scope="module")
def record():
    return clinical_example.record(num_cards=0)


def figure(mean, low, high):
    return {"mean": mean, "ci_low": low, "ci_high": high}


def test_operating_point_by_hand():
    assert draw.operating_point(HAND) == pytest.approx((2 / 3, 3 / 4, 2 / 3))
    none = Level("case", np.array([0.1, 0.2]), np.array([0, 0]), 0.5, {})
    sensitivity, specificity, ppv = draw.operating_point(none)
    assert np.isnan(sensitivity) and specificity == 1 and np.isnan(ppv)
    at = Level("case", np.array([0.5]), np.array([1]), 0.5, {})
    assert draw.operating_point(at)[0] == 1  # decided positive at the threshold


def test_rows_with_thresholds_of_their_own():
    folds = replace(HAND, threshold=np.nan, thresholds=np.array([0.95, 0.5, 0.4, 0.7, 0.3, 0.5, 0.5]))
    assert folds.decided.tolist() == [False, True, True, False, True, False, False]
    assert draw.operating_point(folds) == pytest.approx((2 / 3, 3 / 4, 2 / 3))


def test_area_under_the_steps_is_the_average_precision(record):
    for level in (HAND, *record.levels):
        recall, precision = draw.precision_steps(level.scores, level.targets)
        assert recall[0] == 0 and (np.diff(recall) >= 0).all()
        area_below = np.sum(np.diff(recall) * precision[1:])
        assert area_below == pytest.approx(average_precision_score(level.targets, level.scores), abs=1e-12)
    assert draw.precision_steps(np.array([0.9, 0.1]), np.array([0, 1]))[1][0] == 0.5  # not the 1 of the library


def test_bayes_by_hand_and_as_the_metric():
    ppv, npv = draw.bayes(0.9, 0.8, np.array([0.1, 0.5]))
    assert ppv == pytest.approx([0.09 / (0.09 + 0.18), 0.9 / 1.1])
    assert npv == pytest.approx([0.72 / (0.72 + 0.01), 0.8 / 0.9])
    at = np.linspace(0, 1, 11)
    assert np.array(draw.bayes(0.9, 0.8, at)) == pytest.approx(np.array(at_prevalence(0.9, 0.8, at)), nan_ok=True)
    assert np.isnan(draw.bayes(0.0, 1.0, at)[0]).all()


def test_roc_pr_shows_levels_readers_and_their_names(tmp_path, record):
    readers = {name: of["reference"] for name, of in record.readers.items()}
    draw.roc_pr(tmp_path / "all.png", record.levels, readers)
    draw.roc_pr(tmp_path / "none.png", record.levels[:1], {})
    with_readers, without = picture(tmp_path / "all.png"), picture(tmp_path / "none.png")
    assert area(with_readers, BLUE) > 1000 and area(with_readers, PURPLE) > 300
    assert area(without, PURPLE) == 0 and area(without, GREY) < area(with_readers, GREY)


def test_readers_who_are_many_all_get_a_mark(tmp_path):
    def marks(num):
        readers = {
            f"R{i}": dict.fromkeys(("sensitivity", "specificity"), figure(0.05 + 0.09 * i, 0, 1)) for i in range(num)
        }
        draw.roc_pr(tmp_path / "roc.png", [HAND], readers)
        return area(picture(tmp_path / "roc.png"), PURPLE)

    assert marks(8) > marks(6) > marks(1) > 0  # more than there are kinds of marks


def test_calibration_curve_draws_the_last_curve_in_blue(tmp_path, record):
    draw.calibration_curve(tmp_path / "both.png", record.calibration, record.levels[0])
    pixels = picture(tmp_path / "both.png")
    assert area(pixels, BLUE) > 1000 and area(pixels, GREY) > 500 and area(pixels, VERMILION) > 1000
    shown = replace(record.calibration["after"], scores=np.full(120, 0.05))
    draw.calibration_curve(tmp_path / "own.png", record.calibration | {"after": shown}, record.levels[0])
    assert not np.array_equal(picture(tmp_path / "own.png"), pixels)  # the histogram is of what was grouped last
    draw.calibration_curve(tmp_path / "one.png", {"as trained": record.calibration["before"]}, record.levels[0])
    assert area(picture(tmp_path / "one.png"), BLUE) > 1000


def test_decision_curve_marks_where_the_model_is_above_both(tmp_path, record):
    draw.decision_curve(tmp_path / "useful.png", record.decision, 0.4)
    useless = record.decision | {"gain_low": np.full(len(record.decision["gain_low"]), -0.1)}
    draw.decision_curve(tmp_path / "useless.png", useless, 0.4)
    pixels = picture(tmp_path / "useful.png")
    assert area(pixels, BLUE) > 1000 and area(pixels, ORANGE) > 300 and area(pixels, GREEN) > 1000
    assert area(picture(tmp_path / "useless.png"), GREEN) == 0
    draw.decision_curve(tmp_path / "folds.png", record.decision, np.nan)
    assert area(picture(tmp_path / "folds.png"), GREY) < area(pixels, GREY)


def test_subgroups_with_too_few_have_no_mark(tmp_path, record):
    def blue(groups):
        draw.subgroup_forest(tmp_path / "forest.png", groups, overall)
        return area(picture(tmp_path / "forest.png"), BLUE)

    overall = {"group": "all", "num": 120, "num_positive": 32, **record.levels[0].figures}
    told = [group for group in record.subgroups if not group["too_few"]]
    assert len(told) < len(record.subgroups)
    assert blue(record.subgroups) == pytest.approx(blue(told), rel=0.1) and blue(told) > 500
    assert blue([group | FEW for group in told]) == 0


def test_the_wider_interval_is_shown():
    sure = figure(1.0, 1.0, 1.0) | {"analytic_low": 0.8, "analytic_high": 1.0}
    assert draw.widest(sure) == sure | {"ci_low": 0.8}
    clustered = figure(0.5, 0.2, 0.9) | {"analytic_low": 0.3, "analytic_high": 0.7}
    assert draw.widest(clustered) == clustered
    assert draw.widest(figure(0.5, 0.2, 0.9)) == figure(0.5, 0.2, 0.9)
    assert draw._forest_limits([sure])[0] == pytest.approx(0.74)


def test_forest_reaches_from_below_the_lowest_interval():
    assert draw._forest_limits([figure(0.9, 0.8, 1), None, figure(0.7, 0.6, 0.8)]) == pytest.approx((0.54, 1.02))
    assert draw._forest_limits([figure(0.9, None, None)])[0] == pytest.approx(-0.01)


def test_predictive_values_show_stated_prevalences(tmp_path):
    stated = {0.05: {"ppv": figure(0.2, 0.1, 0.4), "npv": figure(0.99, 0.98, 1)}}
    areas = []
    for name, of in (("without", {}), ("with", stated)):
        draw.predictive_values(tmp_path / f"{name}.png", 0.9, 0.8, 0.3, of)
        areas.append(area(picture(tmp_path / f"{name}.png"), VERMILION))
    assert areas[1] > areas[0] > 500


def test_a_side_of_a_case_is_called_side():
    assert Level("case+side", HAND.scores, HAND.targets, 0.5, {}).unit == "side"
