"""Nested cross-validation of a whole sweep: inner folds choose the configuration, outer folds say what that is worth.

Every outer fold has a search of its own, whose trials are trained on all its inner folds. The configuration it chooses,
and the default, are then scored on the outer fold's test patients, whom nothing has seen: each inner fold's training
gives one set of predictions. The figures are those of the procedure; the model to use comes from a sweep without this.

Outer folds share training patients, so that no p-value is given for the difference (Bengio and Grandvalet 2004: the
variance of k-fold cross-validation has no unbiased estimator).
"""

import dataclasses
from pathlib import Path

from raymed.data.folds import Fold
from raymed.storage import address
from raymed.train.places.launch import announce, check_single_worker, flat, run_side_by_side
from raymed.train.runs.job import Job
from raymed.train.runs.results import report
from raymed.train.unit import Unit
from raymed.tune.config import Nested, SweepConfig
from raymed.tune.finals import DEFAULT
from raymed.tune.journal import Journal
from raymed.tune.sweep import open_units, search, template
from raymed.tune.trials import Replicate, Trials

CHOSEN = "chosen on inner folds"


def run_nested(job: Job, sweep: SweepConfig, nested: Nested, seed: int) -> Path:
    """Run, or go on with, a nested cross-validation; returns the path of its summary. Needs a connected Ray.

    A budget that is used up ends it with a report of the outer folds that are finished.
    """
    check_single_worker(job)
    methods: dict[str, list[Unit]] = {DEFAULT: [], CHOSEN: []}
    choices = []
    parts = [_outer(job, sweep, nested, outer, seed) for outer in range(nested.outer or 0)]
    journals = [Journal(trials.template.folder / "sweep.jsonl") for trials, _ in parts]
    announce(job, [e or open_units(sweep, journal, t) for (t, e), journal in zip(parts, journals, strict=True)])
    for outer, ((trials, encoders), journal) in enumerate(zip(parts, journals, strict=True)):
        trials.template.outbox.open(trials.template.key, trials.template.name, job.key, {"outer": outer})
        job.follow(trials.template.outbox)
        if not run_side_by_side(job, [encoders]):
            break
        search(job, sweep, journal, trials)
        best = journal.best(trials.mode)
        if best is None or job.budget.exhausted():
            break
        units = {
            method: [trials.unit(r, params, method.replace(" ", "-"), trials.template.key) for r in trials.replicates]
            for method, params in ((DEFAULT, {}), (CHOSEN, best.params))
        }
        for unit in flat(units):
            job.follow(unit.outbox)
        if not run_side_by_side(job, [flat(units)]):
            break
        for method in methods:
            methods[method] += units[method]
        choices.append({"outer": outer, "trial": best.number, "params": best.params, "inner_value": best.value})
        trials.template.outbox.close("FINISHED")
    record = {"outer_folds": nested.outer, "inner_folds": nested.inner, "finished": len(choices), "choices": choices}
    return report(job, methods, baseline=DEFAULT, best=CHOSEN, nested=record)


def _outer(job: Job, sweep: SweepConfig, nested: Nested, outer: int, seed: int) -> tuple[Trials, list[Unit]]:
    """The search of one outer fold, which will be a run below the job's, and the encoders that it needs."""
    name = f"outer-{outer}"
    own = dataclasses.replace(
        template(job), folder=job.folder / name, key=f"{job.key}/{name}", name=name, parent=job.key
    )
    folds = [Fold(outer, nested.outer or 2, inner, nested.inner) for inner in range(nested.inner)]
    encoders = [dataclasses.replace(job.unit(f"{name}/encoder/{f.name}", seed, part="encoder"), fold=f) for f in folds]
    encoders = encoders if job.recipe.two_stage else []
    folders = [address(unit.folder / "checkpoints" / "supcon") for unit in encoders] or [None] * len(folds)
    replicates = tuple(Replicate(f.name, seed, f, folder) for f, folder in zip(folds, folders, strict=True))
    return Trials(own, replicates, sweep.metric), encoders
