"""The classifier that leaves a job: one seed's bundle with calibration, operating point, OOD score, golden inputs and
card, registered.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from raymed.bundle import NOT_STATED, Bundle
from raymed.config import UserError
from raymed.data import readers
from raymed.data.dataset import DataSet
from raymed.data.locations import as_location
from raymed.data.phantoms import hsg
from raymed.registry.card import provenance, write_card
from raymed.registry.config import RegisterConfig, default_name
from raymed.registry.register import Registered, register
from raymed.results.model import MODEL
from raymed.storage import local_folder_copy
from raymed.tasks.classifier import ClassifierRecipe
from raymed.tasks.golden import with_golden
from raymed.tasks.predictor import Predictor, complete, input_contract, with_separation
from raymed.train.runs.job import Job
from raymed.train.runs.results import decided, summarise
from raymed.train.unit import SPLITS, Unit, pin_checkpoints, unit_data

_FOREIGN = 200  # images of a foreign set that are looked at
_PHANTOMS = 50


def leave_classifier(
    job: Job, unit: Unit, figures: dict[str, Any], config: RegisterConfig, foreign: Sequence[str] = ()
) -> tuple[Path, Registered | None]:
    """Write the bundle and card of a trained unit into the run's folder, and register it where that is asked for;
    returns the folder and the version. Arguments as of `write_model`."""
    folder = write_model(job.folder / MODEL, unit, job, figures, foreign, config.intended_use)
    name = default_name(job.config.recipe.data.manifest, job.recipe.label)
    tracking, run_id = job.config.run.tracking, job.tracker.run_id(job.key, timeout=60)
    registered = register(folder, config, name, tracking=tracking, storage=job.storage, run_id=run_id)
    if registered:
        pin_checkpoints(unit, f"registered as {registered.uri}")
    return folder, registered


def write_model(
    folder: Path, unit: Unit, job: Job, figures: dict[str, Any], foreign: Sequence[str], intended_use: str
) -> Path:
    """Write the bundle and card of a trained unit into a folder; returns it.

    figures: {"val": {metric: Figure}, "test": ...} of the unit's method over all its seeds, which stand in the card
    beside the unit's own. foreign: folders of images
    of other kinds, beside those that are made here, from which the OOD score is to tell the unit's test images.
    """
    data = unit_data(unit)
    bundle = Bundle.load(unit.folder / "bundle")
    predictor = Predictor.from_bundle(bundle, unit.compute.resolved_device())
    features = {name: predictor.data_features(data, indices) for name, indices in data.splits.items()}
    train, val = data.splits["train"], data.splits["val"]
    config = unit.recipe.data
    bundle = complete(
        bundle,
        train_features=features["train"],
        train_labels=data.labels[train],
        train_patients=data.patients[train],
        val_features=features["val"],
        val_labels=data.labels[val],
        val_patients=data.patients[val],
        decided={split: decided(unit, split) for split in SPLITS},
        calibration_by=cast(ClassifierRecipe, unit.recipe).decide.calibration,
        contract=input_contract(data, modality=config.modality, body_part=config.body_part),
        licences={"weights": _weights(unit), "data": {"name": config.licence, "source": config.source}},
        intended_use=intended_use,
    )
    others = _foreign_images(data, config.manifest, foreign)
    seen = {name: predictor.features(images) for name, images in others.items()}
    bundle = with_separation(bundle, features["test"], seen)
    bundle.metrics = summarise([unit]) | {"seeds": {"test": figures["test"]}}
    bundle.provenance |= provenance(data, job.config) | {"run_key": job.key}
    with_golden(bundle).save(folder)
    write_card(folder)
    return folder


def _weights(unit: Unit) -> dict[str, str]:
    """Where the encoder's first weights are from."""
    model = cast(ClassifierRecipe, unit.recipe).model
    if model.weights == "none":
        return {"name": "none needed", "source": f"{model.backbone}, trained from random weights"}
    return {"name": NOT_STATED, "source": f"{model.backbone}, started from {model.weights}"}


def _foreign_images(data: DataSet, manifest: str, folders: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """Name -> decoded images that are none of the data set's kind."""
    size = data.preprocess.size or 64
    random = np.random.default_rng(0)
    test = data.batch(data.splits["test"][:_FOREIGN]).image
    assert test is not None
    grey = test.numpy()[:, 0]
    found = {
        "the same images, grey values inverted": list(np.iinfo(grey.dtype).max - grey),
        "noise": list(random.integers(0, 256, (_PHANTOMS, size, size), np.uint8)),
    }
    if "phantoms" not in manifest:
        found["digital HSG phantoms"] = [hsg(patient, seed=1)[0] for patient in range(_PHANTOMS)]
    places = foreign_folders(folders)
    return found | {"/".join(place.parts[-2:]): _read_folder(place) for place in places}  # many are called "images"


def foreign_folders(folders: Sequence[str]) -> list[Path]:
    """The folders of images of other kinds, or copies of those in a bucket. Raises UserError where one is not there."""
    return [local_folder_copy(as_location(folder)) for folder in folders]


def _read_folder(folder: Path) -> list[np.ndarray]:
    images = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and len(images) < _FOREIGN:
            try:
                images.append(readers.read(path))
            except readers.ImageProblem:
                continue
    if not images:
        raise UserError(f"foreign: there is no image that can be read in {folder}")
    return images
