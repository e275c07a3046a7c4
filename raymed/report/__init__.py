"""What a job shows: summary.json, tables, figures, pages. They take figures and predictions, and compute no metric."""

from raymed.report.figures import calibration, cam_panel, confusion, forest, pr_roc, training_curves
from raymed.report.page import write_page
from raymed.report.summary import write_summary
from raymed.report.sweep import write_sweep_report
from raymed.report.sweep_record import SweepRecord
from raymed.report.tables import (
    comparison_csv,
    comparison_markdown,
    comparison_page,
    comparison_table,
    difference_table,
    split_csv,
)

__all__ = [
    "SweepRecord",
    "calibration",
    "cam_panel",
    "comparison_csv",
    "comparison_markdown",
    "comparison_page",
    "comparison_table",
    "confusion",
    "difference_table",
    "forest",
    "pr_roc",
    "split_csv",
    "training_curves",
    "write_page",
    "write_summary",
    "write_sweep_report",
]
