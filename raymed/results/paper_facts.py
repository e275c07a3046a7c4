"""facts.json: what an evaluation found, kept in its run's folder until a paper is written.

A `ClinicalRecord` has scores and pictures; of it stay the facts that a paper tells (`evaluation_facts`): figures with
intervals, decisions, subgroups, readers and the lines of the figures. They name no case and no patient.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymed.config import UserError, to_json
from raymed.report.clinical_page import ClinicalRecord
from raymed.report.paper import Confusion, Curve, Curves, OperatingPoint, Subgroup, evaluation_facts
from raymed.storage import write_atomic

FACTS = "facts.json"
_CHECKED = "Heat maps were made by Grad-CAM and compared with those of the same network with random weights."
_HEAT_MAPS = "Heat maps were made by Grad-CAM."


def write_facts(folder: Path, found: ClinicalRecord, run_key: str = "") -> Path:
    """Write facts.json into a run's folder; returns its path.

    Args:
        run_key: of the training that made the model (`Bundle.provenance`), so that a paper is not made of two models.
    """
    facts = evaluation_facts(found) | {"explanation": _explanation(found)}
    write_atomic(folder / FACTS, to_json({"run_key": run_key, "facts": facts}))
    return folder / FACTS


def read_facts(folder: Path) -> tuple[dict[str, Any], str]:
    """Fields of a `PaperRecord` as `write_facts` was given them, and the key of the training; ({}, "") where there is
    no facts.json. Undefined numbers of figures are None. Raises UserError for another file of that name."""
    path = folder / FACTS
    if not path.is_file():
        return {}, ""
    try:
        kept = json.loads(path.read_text())
        facts = kept["facts"]
        return facts | {
            "operating_point": OperatingPoint(**facts["operating_point"]),
            "confusion": Confusion(**facts["confusion"]),
            "subgroups": [Subgroup(**group) for group in facts["subgroups"]],
            "curves": Curves(**{kind: _curves(lines) for kind, lines in facts["curves"].items()}),
        }, kept["run_key"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold what an evaluation found ({error}): evaluate the model anew") from error


def _explanation(found: ClinicalRecord) -> str | None:
    views = [view for case in found.cases for view in case.views]
    if any(view.random_map is not None for view in views):
        return _CHECKED
    return _HEAT_MAPS if any(view.heat_map is not None for view in views) else None


def _curves(lines: Mapping[str, Any]) -> dict[str, Curve]:
    return {name: Curve(**{axis: _numbers(values) for axis, values in line.items()}) for name, line in lines.items()}


def _numbers(values: list[float | None] | None) -> Any:
    """JSON has no nan: it stands there as null."""
    return None if values is None else [math.nan if value is None else value for value in values]
