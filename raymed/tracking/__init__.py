"""Tracking: training writes an outbox file; the driver process reads it and fills MLflow.

`outbox` is the file, `upload` brings one file into one MLflow run, `mlflow` does so for all runs of a driver in the
background, and `environment` is what a run records of the machine and the code. Only the driver imports MLflow.
"""

from raymed.tracking.credentials import without_credentials
from raymed.tracking.environment import SystemMetrics, environment, git_state, installed_packages
from raymed.tracking.mlflow import Tracker, connect
from raymed.tracking.outbox import Outbox

__all__ = [
    "Outbox",
    "SystemMetrics",
    "Tracker",
    "connect",
    "environment",
    "git_state",
    "installed_packages",
    "without_credentials",
]
