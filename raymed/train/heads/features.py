"""What a frozen encoder makes of every image: computed once, kept on disk, and refused where it would flatter.

An encoder belongs to its seed and to the set of patients it was trained on. A head that is scored on one of them would
look better than it is, so a unit that takes such an encoder is refused before it starts (`refuse_seen`); and the key
under which features are kept holds a hash of that set.
"""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from raymed.config import UserError, to_dict
from raymed.data.dataset import DataSet
from raymed.data.problems import rows_text
from raymed.storage import exists, local_copy
from raymed.tasks.task import Phase
from raymed.train.checkpoints.checkpoint import load_weights, origin_of
from raymed.train.compute import Compute
from raymed.train.evaluate import Feed
from raymed.train.nets import Networks

_TRAINED_ON = "trained_on.npy"


def note_trained_on(folder: Path, data: DataSet) -> None:
    """Keep, in a unit's folder, which images its networks are trained on (`DataSet.content`)."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid.uuid4().hex}.npy"
    np.save(temporary, np.sort(data.content[data.splits["train"]]))
    os.replace(temporary, folder / _TRAINED_ON)


def trained_on(source: Path) -> np.ndarray:
    """Sorted content hashes of the images that a checkpoint inside a unit's folder was trained on; empty if unknown."""
    for folder in (source, *source.parents):
        if exists(folder / _TRAINED_ON):
            return np.load(local_copy(folder / _TRAINED_ON))
    return np.empty(0, np.uint64)


def refuse_seen(data: DataSet, origin: str) -> None:
    """Raise UserError where validation or test has a patient of whom the encoder at `origin` has seen an image."""
    source = origin_of(origin)
    seen = np.unique(data.patients[np.isin(data.content, trained_on(source))])
    for split in ("val", "test"):
        indices = data.splits[split]
        known = indices[np.isin(data.patients[indices], seen)]
        if len(known):
            rows = rows_text(data.rows[known].tolist())
            raise UserError(
                f"the encoder {source} was trained on patients of the {split} split ({rows}): "
                "scores there would be too good. Train an encoder on this split, or take the split it was trained on"
            )


def encoder_features(phase: Phase, data: DataSet, seed: int, compute: Compute, cache: Path) -> np.ndarray:
    """The frozen encoder's features of all images, (N, D) float32, as a memory map (private: nothing is written).

    phase: one that starts from a checkpoint's encoder (`starts_from`) and keeps it frozen.
    """
    source = origin_of(phase.starts_from["encoder"])
    networks = Networks(phase, seed, compute)
    path = cache / f"features-{_key(networks, source, data, compute)}.npy"
    if not path.is_file():
        networks.load_part("encoder", load_weights(source), source)
        feed = Feed(data, compute.resolved_device())
        feed.keep_frozen(phase, networks)
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f".{path.name}.{uuid.uuid4().hex}.npy"
        np.save(temporary, feed.cached["encoder"].numpy())
        os.replace(temporary, path)
    return np.load(path, mmap_mode="c")


def _key(networks: Networks, source: Path, data: DataSet, compute: Compute) -> str:
    """Whatever the features depend on: weights, architecture, what they were trained on, images, preprocessing."""
    described: list[Any] = [
        json.loads((source / "state.json").read_text())["sha256"],
        repr(networks.module("encoder")),
        hashlib.sha256(trained_on(source).tobytes()).hexdigest(),
        hashlib.sha256(data.content.tobytes()).hexdigest(),
        to_dict(data.preprocess),
        compute.precision,
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]
