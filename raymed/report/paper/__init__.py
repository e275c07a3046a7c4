"""The publication pack of a study: tables, figures, methods and checklists, made of recorded facts alone."""

from raymed.report.paper.cohort import cohort_of
from raymed.report.paper.from_config import config_facts
from raymed.report.paper.from_evaluation import evaluation_facts
from raymed.report.paper.pack import Pack, paper_pack
from raymed.report.paper.record import (
    Confusion,
    Curve,
    Curves,
    Flow,
    Group,
    Model,
    OperatingPoint,
    PaperRecord,
    Phase,
    Preprocessing,
    Recalibration,
    Split,
    Spread,
    Statistics,
    Study,
    Subgroup,
    Training,
)

__all__ = [
    "Confusion",
    "Curve",
    "Curves",
    "Flow",
    "Group",
    "Model",
    "OperatingPoint",
    "Pack",
    "PaperRecord",
    "Phase",
    "Preprocessing",
    "Recalibration",
    "Split",
    "Spread",
    "Statistics",
    "Study",
    "Subgroup",
    "Training",
    "cohort_of",
    "config_facts",
    "evaluation_facts",
    "paper_pack",
]
