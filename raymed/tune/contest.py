"""A contest of losses: each searched alike, the best of each trained on fresh seeds, judged against the first.

A loss that was tuned beats one that was not, whatever the losses. So every loss, the baseline too, has a search of its
own: as many trials, over the space that it brings, on the same seeds, from the recipe as it stands. Finals begin with
the same weights and see the same batches under a seed, so that they are paired by it. What is compared is retrieval:
the recipes are those of images and their texts (`raymed.tasks.clip`).

    searches    a run and a journal a loss, in a folder of its name, as in any sweep (`raymed.tune.sweep`)
    finals      the best of each search, and what is published, on seeds that chose nothing (`raymed.tune.finals`)
    report      which differences exceed noise; page, tables, figures, model (`raymed.tune.contest_report`)

The same command after any kill goes on where it was.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymed.config import UserError, replace
from raymed.registry.config import RegisterConfig
from raymed.report.sweep_record import count
from raymed.tasks.recipe import Recipe
from raymed.train.places.cluster import gpus_of, require
from raymed.train.places.launch import ADVICE, announce, check_cluster
from raymed.train.places.processes import launched
from raymed.train.runs.job import Job
from raymed.train.unit import Unit
from raymed.tune.config import FinalSeeds, SweepConfig, check_sweep
from raymed.tune.contest_report import report_contest
from raymed.tune.finals import run_finals, seed_replicates
from raymed.tune.journal import Journal
from raymed.tune.results import write_tune_results
from raymed.tune.sweep import check_found, open_units, search, template
from raymed.tune.trials import Trials


@dataclass(frozen=True)
class Contender:
    """One loss and its search."""

    method: str
    sweep: SweepConfig
    trials: Trials
    journal: Journal

    @property
    def folder(self) -> Path:
        """Of its search."""
        return self.trials.template.folder


def check_contest(
    recipe: Recipe, compared: Sequence[str], sweep: SweepConfig, seeds: Sequence[int], finals: FinalSeeds
) -> None:
    """Raise UserError for a contest that cannot be, before anything starts."""
    if len(compared) < 2 or len(set(compared)) < len(compared):
        raise UserError(f"compared must be two different losses or more, the baseline first, got {compared}")
    for method in compared:
        check_sweep(replace(recipe, {"method": method}), sweep_of(sweep, method, compared), seeds, finals)


def sweep_of(sweep: SweepConfig, method: str, compared: Sequence[str]) -> SweepConfig:
    """The sweep of one loss: without the dimensions that the user adds for another one that is compared."""
    others = tuple(f"losses.{other}." for other in compared if other != method)
    return dataclasses.replace(sweep, space=tuple(entry for entry in sweep.space if not entry.startswith(others)))


def run_contest(
    job: Job,
    compared: Sequence[str],
    sweep: SweepConfig,
    seeds: Sequence[int],
    finals: FinalSeeds,
    published: Mapping[str, Mapping[str, Any]],
    registering: RegisterConfig,
) -> Path:
    """Run, or go on with, a contest; returns the path of its summary. Needs a connected Ray.

    compared: methods of the job's recipe, the baseline first. published: further method of the finals -> its fields,
    "method" among them.

    With one worker a training, trials and finals run side by side, as many as the cluster has room for; with several,
    one after the other. A budget that is used up ends it with a report of what is finished. Raises UserError where the
    cluster has no room, and when every trial of a loss failed.
    """
    _check_place(job)
    contenders = [_contender(job, method, sweep_of(sweep, method, compared), seeds) for method in compared]
    own = Trials(template(job), seed_replicates(job, finals.seeds)[1], sweep.metric)
    methods = {method: {"method": method} for method in compared} | dict(published)
    fresh = [
        own.unit(r, dict(params), f"finals/{name}", None) for name, params in methods.items() for r in own.replicates
    ]
    announce(job, [[unit for c in contenders for unit in open_units(c.sweep, c.journal, c.trials)], fresh])
    finished = all(_search(job, contender) for contender in contenders)
    units: dict[str, list[Unit]] = {}
    if finished and not job.budget.exhausted():
        best = _best(contenders)
        units = run_finals(job, finals, best | _others(job.recipe, published, best), own)
    for contender in contenders:
        write_tune_results(contender.folder / "tune", contender.journal, sweep.metric)
    return report_contest(job, sweep, seeds, finals, registering, contenders, units)


def _check_place(job: Job) -> None:
    """Raise UserError where the contest cannot run, before it leaves anything."""
    if launched():
        raise UserError(f"{job.kind} starts its own workers (--compute.workers): start it without torchrun or srun")
    compute = job.config.compute
    require(compute.cpus_per_worker, gpus_of(compute.device), at_least=compute.workers, advice=ADVICE)
    check_cluster(job)


def _contender(job: Job, method: str, sweep: SweepConfig, seeds: Sequence[int]) -> Contender:
    own = dataclasses.replace(
        template(job),
        recipe=replace(job.recipe, {"method": method}),
        folder=job.folder / method,
        key=f"{job.key}/{method}",
        name=method,
        parent=job.key,
    )
    trials = Trials(own, seed_replicates(job, seeds)[1], sweep.metric)
    return Contender(method, sweep, trials, Journal(own.folder / "sweep.jsonl"))


def _search(job: Job, contender: Contender) -> bool:
    """The search of one loss; False when the budget was used up before its end."""
    own, journal = contender.trials.template, contender.journal
    job.go_on()
    own.outbox.open(own.key, own.name, own.parent, {"method": contender.method})
    job.follow(own.outbox)
    if open_units(contender.sweep, journal, contender.trials):
        print(f"search of {contender.method}: {count(contender.sweep.num_trials, 'trial')}", flush=True)
        search(job, contender.sweep, journal, contender.trials)
        if open_units(contender.sweep, journal, contender.trials):
            return False
        check_found(job, journal, contender.trials.mode)
    own.outbox.close("FINISHED")
    return True


def _best(contenders: Sequence[Contender]) -> dict[str, dict[str, Any]]:
    """Method -> fields of the best finished trial, the default included."""
    best = {c.method: c.journal.best(c.trials.mode) for c in contenders}
    return {method: {"method": method} | trial.params for method, trial in best.items() if trial}


def _others(recipe: Recipe, published: Mapping[str, Mapping[str, Any]], best: Mapping[str, Any]) -> dict[str, Any]:
    """What is published and was not chosen anyway: two names for one configuration would be one test too many."""
    chosen = [replace(recipe, dict(params)) for params in best.values()]
    return {name: dict(params) for name, params in published.items() if replace(recipe, dict(params)) not in chosen}
