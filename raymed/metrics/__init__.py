"""Metrics from scores and targets: values, operating points, confidence intervals, and meters that collect them."""

from raymed.metrics.bootstrap import (
    Figure,
    bootstrap_ci,
    mean_statistic,
    paired_bootstrap_difference,
    summarise_difference,
    summarise_seeds,
)
from raymed.metrics.classification import binary_metrics, binary_statistic, tune_threshold
from raymed.metrics.meters import BinaryMeter, Meter

__all__ = [
    "BinaryMeter",
    "Figure",
    "Meter",
    "binary_metrics",
    "binary_statistic",
    "bootstrap_ci",
    "mean_statistic",
    "paired_bootstrap_difference",
    "summarise_difference",
    "summarise_seeds",
    "tune_threshold",
]
