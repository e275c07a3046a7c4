"""Nested cross-validation of a whole sweep: inner folds choose the configuration, outer folds say what that is worth.

Every outer fold has a search of its own: what the fold does not hold out is dealt into inner folds, and every trial is
trained on all of them. The configuration it chooses, and the default, are then trained as any training of that fold is
(`RepeatedFold`), and score its held-out patients, whom nothing has seen. Their threshold and calibration come from the
inner folds too: from the scores of the same configuration for the cases that each of them leaves out. The figures are
those of the procedure; the model to use comes from a sweep without this.

Folds share training patients, so that no p-value is given for the difference (Bengio and Grandvalet 2004: the variance
of k-fold cross-validation has no unbiased estimator).

Source: Varma and Simon, "Bias in error estimation when using cross-validation for model selection", 2006.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raymed.config import UserError
from raymed.data.folds import CrossValidation, Parts, RepeatedFold
from raymed.data.splits import deal
from raymed.results.folds import report_folds
from raymed.storage import address
from raymed.train.places.launch import announce, check_single_worker, encoder_units, flat, run_side_by_side
from raymed.train.runs.job import Job
from raymed.train.unit import Unit
from raymed.tune.config import SweepConfig
from raymed.tune.finals import DEFAULT
from raymed.tune.journal import Journal
from raymed.tune.recorder import line
from raymed.tune.sweep import open_units, search, template
from raymed.tune.trials import Replicate, Trials

CHOSEN = "chosen on inner folds"


@dataclass(frozen=True)
class InnerFold(RepeatedFold):
    """One training inside an outer fold: the rest of the outer fold, less one part of it for validation."""

    inner: int
    num_inner: int

    @property
    def name(self) -> str:
        """For people and folders."""
        return f"{super().name}-inner-{self.inner}"

    def parts(self, labels: Sequence[str], groups: Sequence[str], positive: str, what: str = "patient") -> Parts:
        """Training and validation within what the outer fold leaves, and what it holds out.

        Raises UserError as the outer fold, and where there are too few patients of a class for the inner folds.
        """
        labels, groups = list(labels), list(groups)
        train, val, held_out = super().parts(labels, groups, positive, what)
        rest = np.sort(np.concatenate([train, val]))
        equal, seed = [1 / self.num_inner] * self.num_inner, f"{self.cv.seed}/{super().name}/inner"
        side = np.array(deal([groups[i] for i in rest], [labels[i] for i in rest], positive, equal, seed))
        inner = rest[side != self.inner], rest[side == self.inner]
        for name, indices in zip(("train", "val"), inner, strict=True):
            if len({labels[i] == positive for i in indices}) < (2 if positive else 1):
                raise UserError(f"{self.name} lacks a class in {name}: use fewer folds, or fewer inner ones")
        return *inner, held_out


@dataclass(frozen=True)
class _Outer:
    """An outer fold: its search, a run below the job's, and what is trained for its figures."""

    fold: RepeatedFold
    trials: Trials
    replicate: Replicate
    """Of the held-out patients."""
    encoders: list[Unit]
    journal: Journal


def run_nested(job: Job, sweep: SweepConfig, cv: CrossValidation, num_inner: int, seed: int) -> Path:
    """Run, or go on with, a nested cross-validation; returns the path of its summary. Needs a connected Ray.

    A budget that is used up ends it with a report of the repeats that are finished.
    """
    check_single_worker(job)
    outer = [_outer(job, sweep, fold, num_inner, seed) for fold in cv.trainings()]
    announce(job, [[u for fold in outer for u in fold.encoders or open_units(sweep, fold.journal, fold.trials)]])
    methods: dict[str, list[Unit]] = {DEFAULT: [], CHOSEN: []}
    inner: dict[str, list[Unit]] = {}
    choices: list[dict[str, Any]] = []
    for fold in outer:
        choice = _choose(job, sweep, fold)
        if choice is None:
            break
        units = {method: _trainings(job, fold, method, of) for method, of in _compared(choice).items()}
        for unit in flat(units):
            job.follow(unit.outbox)
        if not run_side_by_side(job, [flat(units)]):
            break
        for method, (held_out, *inside) in units.items():
            methods[method].append(held_out)
            inner[held_out.key] = inside
        choices.append({"repeat": fold.fold.repeat, "fold": fold.fold.fold} | choice)
        fold.trials.template.outbox.close("FINISHED")
        chosen = line(fold.journal, choice["trial"], sweep.metric)
        print(f"{fold.fold.name}: chosen {chosen}  ({len(choices)} of {len(outer)} folds)", flush=True)
    if len(choices) < len(outer):
        print(f"{len(choices)} of {len(outer)} folds are finished: {job.budget.exhausted()}. The same command goes on")
    whole = len(choices) - len(choices) % cv.folds  # a repeat's figures are of all its folds
    methods = {method: units[:whole] for method, units in methods.items()}
    record = {"folds": cv.folds, "repeats": cv.repeats, "inner_folds": num_inner, "choices": choices}
    return report_folds(job, methods, baseline=DEFAULT, best=CHOSEN, inner=inner, nested=record)


def _outer(job: Job, sweep: SweepConfig, fold: RepeatedFold, num_inner: int, seed: int) -> _Outer:
    folds = [*(InnerFold(fold.cv, fold.repeat, fold.fold, inner, num_inner) for inner in range(num_inner)), fold]
    encoders = encoder_units(job, [seed], folds) if job.recipe.two_stage else []
    folders = [address(unit.folder / "checkpoints" / "supcon") for unit in encoders] or [None] * len(folds)
    *inside, held_out = [Replicate(f.name, seed, f, folder) for f, folder in zip(folds, folders, strict=True)]
    own = dataclasses.replace(
        template(job), folder=job.folder / fold.name, key=f"{job.key}/{fold.name}", name=fold.name, parent=job.key
    )
    trials = Trials(own, tuple(inside), sweep.metric)
    return _Outer(fold, trials, held_out, encoders, Journal(own.folder / "sweep.jsonl"))


def _choose(job: Job, sweep: SweepConfig, fold: _Outer) -> dict[str, Any] | None:
    """The best configuration on the inner folds; None when the budget is used up before."""
    own = fold.trials.template
    own.outbox.open(own.key, own.name, job.key, {"repeat": fold.fold.repeat, "fold": fold.fold.fold})
    job.follow(own.outbox)
    if not run_side_by_side(job, [fold.encoders]):
        return None
    search(job, sweep, fold.journal, fold.trials)
    best = fold.journal.best(fold.trials.mode)
    if best is None or job.budget.exhausted():
        return None
    return {"trial": best.number, "params": best.params, "inner_value": best.value}


def _compared(choice: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {DEFAULT: {}, CHOSEN: choice["params"]}


def _trainings(job: Job, fold: _Outer, method: str, params: dict[str, Any]) -> list[Unit]:
    """The training that scores the held-out patients, and those of the inner folds, which look at validation only."""
    name = method.replace(" ", "-")
    of_job = dataclasses.replace(fold.trials, template=template(job))
    inside = [
        fold.trials.unit(replicate, params, name, fold.trials.template.key) for replicate in fold.trials.replicates
    ]
    return [
        of_job.unit(fold.replicate, params, name, job.key),
        *(dataclasses.replace(unit, splits=("val",)) for unit in inside),
    ]
