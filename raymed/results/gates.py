"""Candidate against champion: the gates of `raymed.registry.gates`, with the comparison as a run of its own.

The comparison is what `jobs/compare_models.py` does on the same images, with its tables, its MLflow run and its count
of how often the test set was opened.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.data.manifest import DataConfig
from raymed.registry.gates import (
    Gate,
    GateConfig,
    auroc_gate,
    calibration_gate,
    golden_gate,
    latency_gate,
    model_of,
)
from raymed.registry.promote import CHAMPION
from raymed.registry.store import alias_of, load_model
from raymed.results.compare_bundles import Comparison, compare_bundles
from raymed.tasks.external import LabelledData
from raymed.train.compute import Compute
from raymed.train.runs.job import RunConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def gates(
    client: "MlflowClient", version: "ModelVersion", config: GateConfig, data: DataConfig, run: RunConfig
) -> tuple[list[Gate], int | None]:
    """Every gate of a version that is to take the champion's place, and which version that is, None without one.

    data: how the images of config.manifest are read. run: where things are kept. What cannot be compared is a gate that
    is not passed.
    """
    champion = alias_of(client, version.name, CHAMPION)
    found = _gates(version, champion, config, data, run)
    return found, champion and int(champion.version)


def _gates(
    version: "ModelVersion", champion: "ModelVersion | None", config: GateConfig, data: DataConfig, run: RunConfig
) -> list[Gate]:
    device, candidate = str(Compute().resolved_device()), _uri(version)
    try:
        mine = load_model(candidate, run.tracking, run.storage)
        found = [golden_gate(model_of(mine, device))]
    except Exception as error:  # a network that cannot be built from what the bundle says fails in any way
        return [Gate("golden inputs", False, str(error) if isinstance(error, UserError) else repr(error))]
    if champion is None or champion.version == version.version:
        return [*found, Gate("comparison", None, "there is no other champion to compare it with")]
    if config.manifest is None:
        return [*found, Gate("comparison", None, "not compared: no images were named (--gate.manifest)")]
    try:
        theirs = load_model(_uri(champion), run.tracking, run.storage)
        data = dataclasses.replace(data, manifest=config.manifest)
        differences = _differences({candidate: mine, _uri(champion): theirs}, data, run)
        models = model_of(mine, device), model_of(theirs, device)
    except UserError as error:
        return [*found, Gate("comparison", False, str(error))]
    return [
        *found,
        auroc_gate(differences["auroc"], config.margin),
        calibration_gate(differences["ece"], config.calibration),
        latency_gate(*models, config.slower, config.predictions),
    ]


def _uri(version: "ModelVersion") -> str:
    return f"models:/{version.name}/{version.version}"


def _differences(models: Mapping[str, Bundle], data: DataConfig, run: RunConfig) -> dict[str, Any]:
    """Figures of (first model - second) at the level that is decided about. Raises UserError as `compare_bundles`."""
    summary = compare_bundles(Comparison(LabelledData(data), tuple(models), run=run), list(models.values()))
    by_level = json.loads(summary.read_text())["differences"]
    return next(iter(by_level.values()))
