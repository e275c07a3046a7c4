"""Every column of column_metrics is what binary_metrics says of it."""

import numpy as np
import pytest

from raymed.metrics.classification import binary_metrics
from raymed.metrics.columns import COLUMN_METRICS, column_metrics


def check(scores, targets):
    found = column_metrics(scores, targets)
    assert tuple(found) == COLUMN_METRICS
    for k in range(scores.shape[1]):
        expected = binary_metrics(scores[:, k], targets, 0.5)
        for name in COLUMN_METRICS:
            np.testing.assert_allclose(found[name][k], expected[name], rtol=0, atol=1e-12, err_msg=f"{name} of {k}")


@pytest.mark.parametrize("decimals", [16, 2, 1, 0])
@pytest.mark.parametrize("num_rows", [2, 7, 300])
def test_equals_binary_metrics_column_by_column(num_rows, decimals):
    """Rounding makes ties: none with 16 decimals, nothing but 0 and 1 (the ends of the bins) with 0."""
    rng = np.random.default_rng(num_rows + decimals)
    targets = np.append(rng.integers(0, 2, num_rows - 2), [0, 1])
    scores = np.clip(rng.random((num_rows, 9)) + 0.2 * targets[:, None], 0, 1).round(decimals)
    check(scores, targets)


def test_a_constant_column_is_one_tie():
    targets = np.array([1, 0, 0, 1, 0])
    check(np.full((5, 2), [0.0, 1.0]), targets)
    found = column_metrics(np.full((5, 1), 0.3), targets)
    assert found["auroc"][0] == 0.5 and found["auprc"][0] == pytest.approx(0.4)


@pytest.mark.parametrize("label", [0, 1])
def test_undefined_where_a_class_is_missing(label):
    scores = np.random.default_rng(0).random((20, 4))
    check(scores, np.full(20, label))
    assert np.isnan(column_metrics(scores, np.full(20, label))["auroc"]).all()


def test_undefined_without_rows():
    assert all(
        np.isnan(values).all() and values.shape == (3,) for values in column_metrics(np.empty((0, 3)), []).values()
    )


def test_no_columns():
    assert all(values.shape == (0,) for values in column_metrics(np.empty((4, 0)), [0, 1, 0, 1]).values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_column_is_nan_and_alone(bad):
    rng = np.random.default_rng(1)
    scores, targets = rng.random((50, 3)), rng.integers(0, 2, 50)
    clean = column_metrics(scores, targets)
    scores[7, 1] = bad
    found = column_metrics(scores, targets)
    for name in COLUMN_METRICS:
        assert np.isnan(found[name][1])
        assert np.array_equal(found[name][[0, 2]], clean[name][[0, 2]])
