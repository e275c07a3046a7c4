"""One training: a recipe with one seed, in one folder. Jobs, comparisons and sweeps are made of these.

A unit that has finished has `result.json` in its folder and is not trained again; one that was interrupted continues.
"""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raymed.config import to_dict, to_json
from raymed.data.dataset import DataSet
from raymed.data.folds import RepeatedFold
from raymed.data.manifest import DataConfig
from raymed.distributed import rank, world_size
from raymed.storage import Mirror, exists, local_copy, lock, write_atomic
from raymed.storage.network import local_root, moved
from raymed.tasks.recipe import Outcome, Recipe
from raymed.tasks.task import Phase
from raymed.tracking.outbox import Outbox
from raymed.train.checkpoints.checkpoint import Checkpoints, origin_of
from raymed.train.compute import Compute
from raymed.train.elastic import for_world
from raymed.train.evaluate import evaluate
from raymed.train.heads.features import encoder_features, note_trained_on, refuse_seen, trained_on
from raymed.train.loop import Evaluation, Fit

SPLITS = ("val", "test")
TRAINED_ON = "trained_on"
"""Name of a bundle's extra: the contents (`DataSet.content`, as int64) of what it was trained and tuned on."""


@dataclass(frozen=True)
class Unit:
    """What to train and where it is kept."""

    recipe: Recipe
    seed: int
    folder: Path
    key: str
    """Names the unit for ever, e.g. for its MLflow run."""
    name: str
    """What people see."""
    parent: str | None
    """Key of the run it belongs to."""
    cache: Path
    """Folder of decoded images."""
    compute: Compute = Compute()
    part: Literal["all", "encoder"] = "all"
    """encoder: only the SupCon phase, to be shared by several heads."""
    fold: RepeatedFold | None = None
    """Of a cross-validation, in place of the data's own splits."""
    splits: tuple[str, ...] = SPLITS
    """What is scored at the end; trials of a sweep do not look at test."""
    tags: dict[str, str] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Callable, tuple]:
        """Another machine may have its disk for working copies and caches elsewhere: there the unit lies on that."""
        return _arrived, (local_root(), self.__dict__)

    @property
    def outbox(self) -> Outbox:
        """What it tells the tracker."""
        return Outbox(self.folder / "tracking.jsonl")

    @property
    def encoder_checkpoint(self) -> Path:
        """Where an encoder unit leaves its encoder."""
        return self.folder / json.loads(local_copy(self.folder / "result.json").read_text())["checkpoint"]

    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, here or on another node, or None while it is not finished."""
        path = self.folder / "result.json"
        if not path.is_file() and exists(path) and (mirror := Mirror.of(self.folder)):
            mirror.pull()
        return json.loads(path.read_text()) if path.is_file() else None


def _arrived(root: Path, values: dict[str, Any]) -> Unit:
    unit = Unit(**values)
    return replace(unit, folder=moved(unit.folder, root), cache=moved(unit.cache, root))


def phases_of(unit: Unit, data: DataSet) -> tuple[Phase, ...]:
    """What a unit trains."""
    return (unit.recipe.encoder_phase(data),) if unit.part == "encoder" else unit.recipe.phases(data)


class UnitRun:
    """A unit in progress, on this process or as one of several workers."""

    def __init__(self, unit: Unit, interrupted: Callable[[], bool] = lambda: False):
        self.unit = unit
        self.mirror = Mirror.of(unit.folder) if rank() == 0 else None
        if self.mirror:  # what an earlier process has left, maybe on another node
            self.mirror.pull()
        self.data = unit_data(unit)
        phases = phases_of(unit, self.data)
        if unit.compute.min_workers:
            phases = tuple(for_world(phase, unit.compute.workers, world_size()) for phase in phases)
        if unit.part == "all" and unit.recipe.encoder_from:
            refuse_seen(self.data, unit.recipe.encoder_from)
        outbox = unit.outbox if rank() == 0 else None
        frozen = self._features(phases)
        self.fit = Fit(phases, self.data, unit.folder, unit.seed, unit.compute, outbox, interrupted, frozen)

    def _features(self, phases: tuple[Phase, ...]) -> dict[str, Tensor] | None:
        """Where one process trains a head on an encoder from elsewhere: the features that all such heads share."""
        if world_size() > 1 or not (self.unit.recipe.encoder_from and phases[0].cache):
            return None
        unit = self.unit
        features = encoder_features(phases[0], self.data, unit.seed, unit.compute, unit.cache)
        return {"encoder": torch.from_numpy(features)}

    def evaluations(self) -> Iterator[Evaluation]:
        """Train. Collective."""
        self.unit.compute.use_threads()
        if rank() == 0:
            note_trained_on(self.unit.folder, self.data)
        if self.fit.outbox:
            params = {"seed": self.unit.seed, **to_dict(self.unit.recipe), "compute": to_dict(self.unit.compute)}
            tags = {"raymed.data": self.data.fingerprint, **self.unit.tags}
            self.fit.outbox.open(self.unit.key, self.unit.name, self.unit.parent, params, tags)
        with self.mirror or nullcontext() as mirror:
            if mirror:
                mirror.follow()
            yield from self.fit.run()

    def finish(self) -> dict[str, Any]:
        """Score validation and test at the best checkpoint and write predictions, bundle and result. Collective."""
        result = self._encoder_result() if self.unit.part == "encoder" else self._scores()
        if rank() == 0:
            self.unit.outbox.close("FINISHED")  # first: whoever finds the result does not train again
            write_atomic(self.unit.folder / "result.json", to_json(result))
        if self.mirror:
            self.mirror.push()
        return result

    def _encoder_result(self) -> dict[str, Any]:
        best = self.fit.checkpoints("supcon").find("best")
        return {"checkpoint": str(best.relative_to(self.unit.folder)) if best else None}

    def _scores(self) -> dict[str, Any]:
        phase, folder = self.fit.phases[-1], self.unit.folder
        networks, feed = self.fit.best()
        splits = (*self.unit.splits, *self.unit.recipe.also_scored)
        scored = {split: evaluate(phase, networks, feed, split) for split in splits}
        outcome = self.unit.recipe.outcome(scored, self.data)
        figures = outcome.figures
        if rank() > 0:
            return figures
        arrays: dict[str, Any] = self._arrays(outcome)
        np.savez(folder / "predictions.npz", **arrays)
        bundle = phase.task.bundle(networks)
        bundle.operating_point = outcome.operating_point
        bundle.extras |= outcome.extras
        bundle.metrics = figures
        bundle.extras |= {TRAINED_ON: self._trained_on()}
        bundle.provenance = {"run_key": self.unit.key, "seed": self.unit.seed, "data": self.data.fingerprint}
        bundle.save(folder / "bundle")
        outbox = self.unit.outbox
        outbox.artifact(folder / "bundle", "bundle")
        outbox.artifact(folder / "predictions.npz")
        step = sum(phase.steps for phase in self.fit.phases)
        outbox.metrics({f"final/{s}/{name}": v for s in self.unit.splits for name, v in figures[s].items()}, step)
        return figures

    def _trained_on(self) -> Tensor:
        """(M,) int64: the contents of all images that had a say in weights, checkpoint or threshold, those that an
        encoder of another run was trained on included, and the keys of their patients (`DataSet.patient_keys`)."""
        here = np.concatenate([self.data.splits["train"], self.data.splits["val"]])
        keys = self.data.patient_keys[here]
        seen = [self.data.content[here], keys[keys != 0]]
        if origin := self.unit.recipe.encoder_from:
            seen.append(trained_on(origin_of(origin)))
        return torch.from_numpy(np.unique(np.concatenate(seen).view(np.int64)))

    def _arrays(self, outcome: Outcome) -> dict[str, np.ndarray]:
        """SPLIT_NAME -> what was predicted, with whom each row is of and where it stands in the data."""
        arrays = {}
        for split, values in outcome.arrays.items():
            where = np.searchsorted(self.data.rows, values["rows"])
            values = values | {"where": where, "patients": self.data.patients[where]}
            arrays |= {f"{split}_{name}": value for name, value in values.items()}
        return arrays


def train_unit(unit: Unit, interrupted: Callable[[], bool] = lambda: False, report=lambda evaluation: None) -> dict:
    """Train and finish a unit in this process; a finished one returns its result at once."""
    done = unit.result()
    if done is not None:
        return done
    with lock(unit.folder / "lock"):
        run = UnitRun(unit, interrupted)
        for evaluation in run.evaluations():
            report(evaluation)
        return run.finish()


def pin_checkpoints(unit: Unit, reason: str) -> None:
    """Keep the best checkpoint of each of a finished unit's phases for ever."""
    for phase in phases_of(unit, unit_data(unit)):
        Checkpoints(unit.folder / "checkpoints" / phase.name).pin("best", reason)


def predictions(unit: Unit, split: str) -> dict[str, np.ndarray]:
    """What a finished unit predicted (`Outcome.arrays`: rows of the manifest; of a classifier scores and targets), with
    patients (codes) and where (indices of its data)."""
    with np.load(unit.folder / "predictions.npz") as arrays:
        return {name.removeprefix(f"{split}_"): arrays[name] for name in arrays if name.startswith(f"{split}_")}


def unit_data(unit: Unit) -> DataSet:
    """The data that a unit sees: those of its recipe, or a fold of them."""
    if unit.fold is None:
        return load_data(unit.recipe, unit.cache)
    return _fold_data(unit.recipe.read, unit.recipe.resolved_data, unit.cache, unit.fold)


def load_data(recipe: Recipe, cache: Path) -> DataSet:
    """A recipe's data set; a process that trains several units on it reads it once."""
    return _data(recipe.read, recipe.resolved_data, cache)


@functools.lru_cache(maxsize=1)
def _data(read: Callable, config: DataConfig, cache: Path) -> DataSet:
    return read(config, cache)


@functools.lru_cache(maxsize=8)
def _fold_data(read: Callable, config: DataConfig, cache: Path, fold: RepeatedFold) -> DataSet:
    return fold.apply(_data(read, config, cache))
