"""Metrics from scores, targets and embeddings: values, operating points, intervals, and meters that collect them."""

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
from raymed.metrics.retrieval import RetrievalMeter, retrieval_statistic
from raymed.metrics.zero_shot import zero_shot_statistic

__all__ = [
    "BinaryMeter",
    "Figure",
    "Meter",
    "RetrievalMeter",
    "binary_metrics",
    "binary_statistic",
    "bootstrap_ci",
    "mean_statistic",
    "paired_bootstrap_difference",
    "retrieval_statistic",
    "summarise_difference",
    "summarise_seeds",
    "tune_threshold",
    "zero_shot_statistic",
]
