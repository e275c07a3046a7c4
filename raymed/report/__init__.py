"""What a job shows: summary.json, tables and figures. They take figures and predictions, and compute no metric."""

from raymed.report.figures import calibration, cam_panel, pr_roc, sweep_figure, training_curves
from raymed.report.summary import write_summary
from raymed.report.tables import comparison_csv, comparison_markdown, comparison_table, difference_table

__all__ = [
    "calibration",
    "cam_panel",
    "comparison_csv",
    "comparison_markdown",
    "comparison_table",
    "difference_table",
    "pr_roc",
    "sweep_figure",
    "training_curves",
    "write_summary",
]
