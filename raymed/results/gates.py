"""Candidate against champion: the gates of `raymed.registry.gates`, with the comparison as a run of its own.

The comparison is what `jobs/compare_models.py` does on the same images, with its tables, its MLflow run and its count
of how often the test set was opened; of two CLIPs it is `raymed.results.compare_clips`, with a run and a count too.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.data.captions import CaptionConfig
from raymed.data.manifest import DataConfig
from raymed.registry.gates import (
    Examination,
    Gate,
    GateConfig,
    calibration_gate,
    golden_gate,
    latency_gate,
    model_of,
    not_worse_gate,
)
from raymed.registry.promote import CHAMPION
from raymed.registry.store import alias_of, load_model
from raymed.results.compare_bundles import Comparison, compare_bundles
from raymed.results.compare_clips import ClipComparison, compare_clips
from raymed.tasks.external import CaptionedPairs, LabelledData
from raymed.train.compute import Compute
from raymed.train.runs.job import RunConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def gates(
    client: "MlflowClient", version: "ModelVersion", config: GateConfig, data: DataConfig, run: RunConfig
) -> Examination:
    """Every gate of a version that is to take the champion's place, and which version that is.

    data: how the images of config.manifest are read. run: where things are kept. What cannot be compared on these
    images, or with this champion, is a gate that is not passed; without images the comparison is one that nobody looked
    at.
    """
    champion = alias_of(client, version.name, CHAMPION)
    found = _gates(version, champion, config, data, run)
    return Examination(tuple(found), champion and int(champion.version))


def _gates(
    version: "ModelVersion", champion: "ModelVersion | None", config: GateConfig, data: DataConfig, run: RunConfig
) -> list[Gate]:
    device, candidate = str(Compute().resolved_device()), _uri(version)
    try:
        mine = load_model(candidate, run.tracking, run.storage)
        model = model_of(mine, device)
        found = [golden_gate(model)]
    except Exception as error:  # a network that cannot be built from what the bundle says fails in any way
        return [Gate("golden inputs", False, _said(error))]
    if champion is None or champion.version == version.version:
        return [*found, Gate("comparison", None, "there is no other champion to compare it with")]
    try:
        theirs = load_model(_uri(champion), run.tracking, run.storage)
        found.append(latency_gate(model, model_of(theirs, device), config.slower, config.predictions))
    except Exception as error:  # as the candidate's; whoever is sure can still replace such a champion
        return [*found, Gate("comparison", False, f"the champion cannot be used: {_said(error)}")]
    if config.manifest is None:
        return [*found, Gate("comparison", None, "not compared: no images were named (--gate.manifest)")]
    try:
        data = dataclasses.replace(data, manifest=config.manifest)
        return found + _compared({candidate: mine, _uri(champion): theirs}, config, data, run)
    except UserError as error:
        return [*found, Gate("comparison", False, str(error))]


def _compared(models: Mapping[str, Bundle], config: GateConfig, data: DataConfig, run: RunConfig) -> list[Gate]:
    """What the images tell of (candidate, champion). Raises UserError where they cannot be compared on them."""
    if all(bundle.kind == "clip" for bundle in models.values()):
        pairs = CaptionConfig(**_fields(data) | {"label": "", "caption": config.caption})
        summary = compare_clips(ClipComparison(CaptionedPairs(pairs), tuple(models), run=run), list(models.values()))
        return [not_worse_gate("mean recall", _read(summary)["mean_recall"], config.margin)]
    summary = compare_bundles(Comparison(LabelledData(data), tuple(models), run=run), list(models.values()))
    differences = next(iter(_read(summary).values()))  # at the level that is decided about
    return [
        not_worse_gate("AUROC", differences["auroc"], config.margin),
        calibration_gate(differences["ece"], config.calibration),
    ]


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else repr(error)


def _uri(version: "ModelVersion") -> str:
    return f"models:/{version.name}/{version.version}"


def _read(summary: Path) -> dict[str, Any]:
    """The differences (first model - second) that a comparison has found."""
    return json.loads(summary.read_text())["differences"]


def _fields(data: DataConfig) -> dict[str, Any]:
    return {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
