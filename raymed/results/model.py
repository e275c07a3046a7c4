"""The model that leaves a job that trained several: one seed's bundle, with contract, figures and card, registered.

Of a method's seeds the one with the median validation score is taken: the best one would be luck.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raymed.bundle import Bundle
from raymed.data.captions import CaptionSet
from raymed.registry.card import provenance, write_card
from raymed.registry.config import RegisterConfig, default_name
from raymed.registry.register import Registered, register
from raymed.results.assess import Assessment, figures
from raymed.tasks.golden import with_golden
from raymed.tasks.predictor import input_contract
from raymed.train.runs.job import Job
from raymed.train.unit import Unit, pin_checkpoints, unit_data

MODEL = "model"
"""The folder of a run where it lies."""
_SHOWN = {"test": "retrieval", "zero_shot": "zero-shot", "zero_shot_shuffled": "shuffled labels"}
"""Of a bundle's figures: which kind of an assessment."""


def median_unit(units: Sequence[Unit], metric: str) -> Unit:
    """The unit with the median validation score; of an even number the lower of the two in the middle."""
    ordered = sorted(units, key=lambda unit: (unit.result() or {})["val"][metric])
    return ordered[(len(ordered) - 1) // 2]


def leave(
    job: Job, unit: Unit, found: Assessment, of_seeds: Mapping[str, Any], config: RegisterConfig
) -> Registered | None:
    """Write the bundle and card of a trained CLIP into the run's folder, and register it where that is asked for.

    found: what the unit can do on the test split. of_seeds: retrieval there of its method over all its seeds.
    """
    folder = _write(job.folder / MODEL, unit, job, found, of_seeds, config.intended_use)
    name = default_name(job.config.recipe.data.manifest, unit.recipe.label)
    tracking, run_id = job.config.run.tracking, job.tracker.run_id(job.key, timeout=60)
    registered = register(folder, config, name, tracking=tracking, storage=job.storage, run_id=run_id)
    if registered:
        pin_checkpoints(unit, f"registered as {registered.uri}")
    return registered


def _write(
    folder: Path, unit: Unit, job: Job, found: Assessment, of_seeds: Mapping[str, Any], intended_use: str
) -> Path:
    data, config = unit_data(unit), unit.recipe.data
    bundle = Bundle.load(unit.folder / "bundle")
    assert isinstance(data, CaptionSet)
    own = figures([found], data)
    bundle.contract = input_contract(data, modality=config.modality, body_part=config.body_part)
    bundle.intended_use = intended_use
    bundle.metrics |= {name: own[kind] for name, kind in _SHOWN.items() if kind in own} | {"seeds": {"test": of_seeds}}
    bundle.calibration = found.pairs.report if found.pairs else {}
    bundle.provenance |= provenance(data, job.config) | {"run_key": job.key}
    with_golden(bundle).save(folder)
    write_card(folder)
    return folder
