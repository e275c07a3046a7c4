"""The interval to expect, against scipy and against a simulation of the model the formula is derived from."""

import numpy as np
import pytest
from scipy.stats import binomtest

from raymed.report.data_sheet_precision import auroc_interval, num_for_half_width, proportion_interval


@pytest.mark.parametrize(("hits", "num"), [(0, 7), (9, 10), (36, 40), (141, 141), (1, 2)])
def test_wilson_is_that_of_scipy(hits, num):
    known = binomtest(hits, num).proportion_ci(0.95, "wilson")
    assert proportion_interval(hits / num, num) == pytest.approx((known.low, known.high), abs=1e-6)


def test_the_number_needed_is_the_smallest():
    for fraction, half_width in ((0.9, 0.05), (0.5, 0.1), (0.8, 0.2)):
        num = num_for_half_width(fraction, half_width)
        widths = [np.diff(proportion_interval(fraction, n)).item() for n in (num - 1, num)]
        assert widths[0] > 2 * half_width >= widths[1]
    assert num_for_half_width(0.9, 0.05) == 141


def test_hanley_and_mcneil_by_hand():
    # A = 0.893 of 51 abnormal and 58 normal images: SE² = (0.095551 + 50 * 0.009232 + 57 * 0.045080) / 2958.
    low, high = auroc_interval(0.893, 51, 58)
    assert (high - low) / 2 / 1.959964 == pytest.approx(0.032512, abs=2e-5)
    assert (low + high) / 2 == pytest.approx(0.893)
    assert auroc_interval(0.95, 3, 3)[1] == 1.0 and auroc_interval(0.05, 3, 3)[0] == 0.0


def test_hanley_and_mcneil_are_exact_for_exponential_scores():
    # Positive and negative scores are exponential with rates (1 - A) / A and 1: then P(positive > negative) = A.
    random, auroc, num_positive, num_negative = np.random.default_rng(0), 0.8, 12, 30
    positive = random.exponential(auroc / (1 - auroc), (20_000, num_positive, 1))
    negative = random.exponential(1, (20_000, 1, num_negative))
    aurocs = (positive > negative).mean((1, 2))
    low, high = auroc_interval(auroc, num_positive, num_negative)
    assert aurocs.mean() == pytest.approx(auroc, abs=0.003)
    assert aurocs.std() == pytest.approx((high - low) / 2 / 1.959964, rel=0.02)
