"""Operating points against exhaustive search, figures against published worked examples, intervals in simulations."""

import json
import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import class_likelihood_ratios, roc_curve

from raymed.config import UserError, to_json
from raymed.metrics import binary_metrics, bootstrap_ci
from raymed.metrics.operating import (
    OperatingPoint,
    at_prevalence,
    choose,
    confusion,
    decision_figures,
    decision_statistic,
    fixed_rate_statistic,
    ratio_interval,
    wilson,
)


def example(seed, n=120, decimals=2):
    random = np.random.default_rng(seed)
    targets = (random.random(n) < 0.3).astype(int)
    scores = np.round(1 / (1 + np.exp(-random.normal(2 * targets - 1, 1.5))), decimals)
    return scores, targets


def table(tp, fn, fp, tn):
    """Decisions and targets of a 2 x 2 table."""
    return np.repeat([1, 0, 1, 0], [tp, fn, fp, tn]), np.repeat([1, 1, 0, 0], [tp, fn, fp, tn])


def figures(tp, fn, fp, tn, **options):
    return decision_figures(*table(tp, fn, fp, tn), np.arange(tp + fn + fp + tn), n_boot=300, **options)


LIVER_SCAN = 231, 27, 32, 54
"""Altman and Bland, BMJ 308, 1994 (diagnostic tests 1 and 2)."""


def test_liver_scan():
    found = figures(*LIVER_SCAN, prevalences=[0.25])
    published = {"sensitivity": 0.90, "specificity": 0.63, "ppv": 0.88, "npv": 0.67}
    published |= {"ppv_at_0.25": 0.45, "npv_at_0.25": 0.95}
    for name, value in published.items():
        assert round(found[name]["mean"], 2) == value, name
    assert round(found["lr_positive"]["mean"], 1) == 2.4  # Deeks and Altman, BMJ 329, 2004
    counted = {name: (figure["count"], figure["total"]) for name, figure in found.items()}
    expected = {"sensitivity": (231, 258), "specificity": (54, 86), "accuracy": (285, 344)}
    expected |= {"ppv": (231, 263), "npv": (54, 81)}
    expected |= dict.fromkeys(("lr_positive", "lr_negative", "ppv_at_0.25", "npv_at_0.25"), (None, None))
    assert counted == expected
    assert confusion(*table(*LIVER_SCAN)) == {"tp": 231, "fn": 27, "fp": 32, "tn": 54}


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(count, total, low, high):
    """Newcombe, Stat Med 17, 1998, table I, method 3."""
    assert wilson(count, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(total - count, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_inverts_the_score_test():
    for count, total, level in ((7, 9, 0.95), (3, 50, 0.9), (40, 40, 0.99)):
        for end in wilson(count, total, level):
            if 0 < end < 1:
                z = (count / total - end) / math.sqrt(end * (1 - end) / total)
                assert abs(z) == pytest.approx(norm.ppf((1 + level) / 2), abs=1e-9)
    assert wilson(40, 40)[1] == 1 and wilson(0, 40)[0] == 0
    assert all(map(math.isnan, wilson(0, 0)))


def test_likelihood_ratios_equal_scikit_learn():
    decided, targets = table(*LIVER_SCAN)
    positive, negative = class_likelihood_ratios(targets, decided)
    found = figures(*LIVER_SCAN)
    assert found["lr_positive"]["mean"] == pytest.approx(positive, rel=1e-12)
    assert found["lr_negative"]["mean"] == pytest.approx(negative, rel=1e-12)


def test_log_interval_by_hand():
    found = figures(*LIVER_SCAN, prevalences=[0.25])
    error = math.sqrt(1 / 231 - 1 / 258 + 1 / 32 - 1 / 86)
    ends = [2.40625 * math.exp(sign * 1.959964 * error) for sign in (-1, 1)]
    lr = found["lr_positive"]
    assert (lr["analytic_low"], lr["analytic_high"]) == pytest.approx(ends, rel=1e-6)
    ppv = found["ppv_at_0.25"]  # odds of 1 to 3
    expected = [end / 3 / (1 + end / 3) for end in ends]
    assert (ppv["analytic_low"], ppv["analytic_high"]) == pytest.approx(expected, rel=1e-6)
    negative, npv = found["lr_negative"], found["npv_at_0.25"]
    assert npv["analytic_low"] == pytest.approx(1 / (1 + negative["analytic_high"] / 3), rel=1e-9)
    assert npv["analytic_low"] < npv["mean"] < npv["analytic_high"]


@pytest.mark.filterwarnings("error")
def test_intervals_of_empty_cells():
    found = figures(20, 0, 0, 30, prevalences=[0.1])
    assert found["sensitivity"]["mean"] == found["sensitivity"]["ci_low"] == 1  # no resample differs
    assert found["sensitivity"]["analytic_low"] == pytest.approx(20 / (20 + norm.ppf(0.975) ** 2))
    positive, negative = found["lr_positive"], found["lr_negative"]
    assert positive["mean"] == positive["ci_low"] == positive["analytic_high"] == math.inf
    corrected, error = (20.5 / 21) / (0.5 / 31), math.sqrt(1 / 20.5 - 1 / 21 + 1 / 0.5 - 1 / 31)
    assert positive["analytic_low"] == pytest.approx(corrected * math.exp(-1.959964 * error), rel=1e-6)
    assert negative["mean"] == negative["analytic_low"] == 0 < negative["analytic_high"] < 1
    assert (
        found["ppv_at_0.1"]["mean"] == found["ppv_at_0.1"]["analytic_high"] == 1 > found["ppv_at_0.1"]["analytic_low"]
    )
    assert json.loads(to_json(found))["lr_positive"]["mean"] is None


@pytest.mark.filterwarnings("error")
def test_undefined_figures():
    no_positive = figures(0, 0, 3, 7, prevalences=[0.5])
    for name in ("sensitivity", "lr_positive", "lr_negative", "ppv_at_0.5"):
        assert math.isnan(no_positive[name]["mean"]) and math.isnan(no_positive[name]["analytic_low"]), name
    assert no_positive["specificity"]["mean"] == 0.7
    none_decided = figures(0, 3, 0, 7)
    assert math.isnan(none_decided["ppv"]["mean"]) and none_decided["npv"]["mean"] == 0.7
    assert math.isnan(none_decided["lr_positive"]["mean"]) and none_decided["lr_negative"]["mean"] == 1
    all_decided = figures(3, 0, 7, 0)
    assert all_decided["lr_positive"]["mean"] == 1
    assert all_decided["lr_positive"]["analytic_low"] < 1 < all_decided["lr_positive"]["analytic_high"]
    assert math.isnan(ratio_interval(0, 5, 0, 5)[0])


def test_infinite_ratios_of_resamples_count_as_large():
    """One false positive of 20: 36 % of resamples have none. Left out, they would make the upper end finite."""
    found = figures(15, 5, 1, 19)["lr_positive"]
    assert found["mean"] == pytest.approx(15) and found["ci_high"] == math.inf
    assert 3 < found["ci_low"] < 15
    plain = bootstrap_ci([decision_statistic(*table(15, 5, 1, 19))], [np.arange(40)], n_boot=300)["lr_positive"]
    assert plain["num_undefined"] > 80 and plain["ci_high"] < math.inf


def test_ratios_of_0_in_resamples_count_as_small():
    """Two of ten positives found: in 11 % of resamples none is. Left out, they would put the lower end above 1."""
    found = figures(2, 8, 5, 95)["lr_positive"]
    assert found["mean"] == pytest.approx(4) and found["ci_low"] == 0 and found.get("num_undefined", 0) == 0


def test_wilson_covers_where_the_bootstrap_does_not():
    """Sensitivity of 0.95 with 20 positives."""
    random = np.random.default_rng(0)
    analytic = [wilson(k, 20) for k in random.binomial(20, 0.95, size=4000)]
    resampled = {k: np.quantile(random.binomial(20, k / 20, 4000) / 20, [0.025, 0.975]) for k in range(21)}
    boot = [resampled[k] for k in random.binomial(20, 0.95, size=4000)]
    assert np.mean([low <= 0.95 <= high for low, high in analytic]) > 0.91
    assert np.mean([low <= 0.95 <= high for low, high in boot]) < 0.75


def test_the_bootstrap_knows_patients():
    decided, targets = table(45, 15, 10, 50)
    alone = decision_figures(decided, targets, np.arange(120))["sensitivity"]
    copies = [np.repeat(values, 4) for values in (decided, targets, np.arange(120))]
    four = decision_figures(*copies)["sensitivity"]
    assert four["ci_low"] == pytest.approx(alone["ci_low"], abs=1e-12)
    assert four["analytic_high"] - four["analytic_low"] < 0.6 * (four["ci_high"] - four["ci_low"])


def test_statistic_equals_repeated_rows():
    random = np.random.default_rng(0)
    decided, targets = random.integers(2, size=40), random.integers(2, size=40)
    counts = random.multinomial(40, np.full(40, 1 / 40), size=20)
    found = decision_statistic(decided, targets, [0.2])(counts)
    for r, count in enumerate(counts):
        again = np.repeat(decided, count), np.repeat(targets, count)
        alone = decision_figures(*again, np.arange(40), prevalences=[0.2], n_boot=2)
        for name, values in found.items():
            expected = alone[name]["mean"] if math.isfinite(alone[name]["mean"]) else math.nan
            assert values[r] == pytest.approx(expected, abs=1e-12, nan_ok=True), name
        metrics = binary_metrics(again[0], again[1], 0.5)
        assert found["ppv"][r] == pytest.approx(metrics["precision"], abs=1e-12)
        assert found["accuracy"][r] == pytest.approx(metrics["accuracy"], abs=1e-12)


def test_prevalence_of_the_data_changes_nothing():
    ppv, npv = at_prevalence(231 / 258, 54 / 86, 258 / 344)
    assert (ppv, npv) == pytest.approx((231 / 263, 54 / 81))
    ppv, npv = at_prevalence(0.9, 0.8, [0.01, 0.5])
    assert ppv == pytest.approx([0.009 / 0.207, 0.9 / 1.1]) and npv == pytest.approx([0.792 / 0.793, 0.8 / 0.9])


@pytest.mark.parametrize("rule", [{"sensitivity": 0.95}, {"sensitivity": 1}, {"specificity": 0.9}, "specificity=0.75"])
@pytest.mark.parametrize("decimals", [1, 2, 16])
def test_fixed_rates_equal_exhaustive_search(rule, decimals):
    wanted = OperatingPoint.parse(rule)
    other = {"sensitivity": "specificity", "specificity": "sensitivity"}[wanted.criterion]
    for seed in range(5):
        scores, targets = example(seed, decimals=decimals)
        at = [binary_metrics(scores, targets, t) for t in [*scores, 1.0]]
        best = max(m[other] for m in at if m[wanted.criterion] >= wanted.at_least)
        most = max(m[wanted.criterion] for m in at if m[other] == best)
        chosen = choose(scores, targets, rule)
        assert chosen["met"] and chosen["criterion"] == str(wanted)
        assert (chosen[other], chosen[wanted.criterion]) == (best, most)
        assert chosen[other] == binary_metrics(scores, targets, chosen["threshold"])[other]


def test_the_threshold_lies_in_the_middle_of_the_gap():
    scores, targets = [0.1, 0.3, 0.35, 0.6, 0.8], [0, 0, 1, 0, 1]
    assert choose(scores, targets, {"sensitivity": 0.5})["threshold"] == pytest.approx(0.7)
    assert choose(scores, targets, {"sensitivity": 0.51})["threshold"] == pytest.approx(0.325)
    assert choose(scores, targets, {"specificity": 0.6})["threshold"] == pytest.approx(0.325)
    assert choose(scores, targets, {"specificity": 0.7})["threshold"] == pytest.approx(0.7)
    assert choose(scores, targets, "youden")["threshold"] == pytest.approx(0.325)
    # Nothing is lost by a sensitivity above what was asked for: both positives are above all negatives.
    assert choose([0.1, 0.5, 0.9], [0, 1, 1], {"sensitivity": 0.5})["threshold"] == pytest.approx(0.3)


def test_rates_at_the_ends():
    saturated = choose([0.2, 1.0, 1.0, 1.0], [0, 0, 1, 1], {"specificity": 0.9})
    assert not saturated["met"] and saturated["specificity"] == 0.5 and saturated["threshold"] <= 1
    assert choose([0.2, 1.0], [0, 1], {"sensitivity": 1.0})["threshold"] == pytest.approx(0.6)
    assert choose([0.0, 0.0, 0.5], [1, 0, 1], {"sensitivity": 1.0})["threshold"] == 0
    assert choose([0.4, 0.4], [1, 0], {"specificity": 1.0})["threshold"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("youden", OperatingPoint()),
        ("f1", OperatingPoint("f1")),
        ("sensitivity=0.95", OperatingPoint("sensitivity", 0.95)),
        ({"specificity": 0.9}, OperatingPoint("specificity", 0.9)),
    ],
)
def test_rules_are_read(given, expected):
    assert OperatingPoint.parse(given) == OperatingPoint.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("sensitivity", "needs a value, as in sensitivity=0.95"),
        ("youden=0.9", "takes no value"),
        ("sensitivty=0.9", "did you mean 'sensitivity'"),
        ("sensitivity=95", "<= 1, got 95"),
        ({"specificity": 0}, "> 0"),
        ("sensitivity=high", "number between 0 and 1, got 'high'"),
        ({"sensitivity": 0.9, "specificity": 0.9}, "must be one rule"),
    ],
)
def test_rules_that_are_none(rule, message):
    with pytest.raises(UserError, match=message):
        OperatingPoint.parse(rule)


@pytest.mark.parametrize("decimals", [1, 16])
def test_fixed_rates_are_points_of_the_roc_curve(decimals):
    scores, targets = example(3, decimals=decimals)
    counts = np.random.default_rng(1).multinomial(120, np.full(120, 1 / 120), size=20)
    found = fixed_rate_statistic(scores, targets, [0.9, 1.0], [0.95])(counts)
    for r, count in enumerate(counts):
        fpr, tpr, _ = roc_curve(np.repeat(targets, count), np.repeat(scores, count), drop_intermediate=False)
        assert found["sensitivity_at_specificity_0.9"][r] == pytest.approx(tpr[1 - fpr >= 0.9 - 1e-9].max())
        assert found["sensitivity_at_specificity_1"][r] == pytest.approx(tpr[fpr == 0].max())
        assert found["specificity_at_sensitivity_0.95"][r] == pytest.approx(1 - fpr[tpr >= 0.95 - 1e-9].min())


@pytest.mark.filterwarnings("error")
def test_fixed_rates_without_a_class():
    found = fixed_rate_statistic([0.2, 0.7, 0.9], [0, 1, 1], [0.9], [0.9])(np.array([[3, 0, 0], [0, 1, 2], [1, 1, 1]]))
    assert np.isnan(found["sensitivity_at_specificity_0.9"]).tolist() == [True, True, False]
    assert np.isnan(found["specificity_at_sensitivity_0.9"]).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("decided", "targets", "prevalences", "message"),
    [
        ([0, 1], [0], (), r"\(2,\) and \(1,\)"),
        ([0, 0.5], [0, 1], (), "decisions must be 0 or 1, got 0.5"),
        ([0, 1], [0, 2], (), "targets must be 0 or 1, got 2"),
        ([0, 1], [0, 1], [1.0], "prevalence must be > 0 and < 1, got 1"),
    ],
)
def test_bad_decisions(decided, targets, prevalences, message):
    with pytest.raises(UserError, match=message):
        decision_figures(decided, targets, np.arange(2), prevalences=prevalences)
