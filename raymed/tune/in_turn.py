"""Trials on several workers each, one after the other.

Every trial is a group of Ray Train workers that the driver starts (`raymed.train.places.ray_train`), with all that such
a group has: lost workers and nodes, room for more of them, budget. Ray Tune is left out. A Tune trial that starts Ray
Train holds a place of its own while its workers wait for theirs, so that trials side by side can keep each other from
ever starting; and only the driver decides about attempts, which a trial's actor is not. A trial that fills the cluster
loses nothing by waiting for its turn.

The journal and the suggestions are those of other searches, and a sweep may go on with another number of workers. None
is cut early: a trial's replicates take turns too, and ASHA's rungs want the mean of all of them.
"""

from collections.abc import Sequence
from typing import Any

from raymed.space import Space
from raymed.train.places.ray_train import train_with_workers
from raymed.train.places.room import NoRoom
from raymed.train.runs.job import Job
from raymed.train.unit import Unit
from raymed.tune.config import SweepConfig
from raymed.tune.journal import Journal
from raymed.tune.recorder import close_trial, line
from raymed.tune.search import suggest
from raymed.tune.trials import Trials, recorded


def run_in_turn(
    job: Job, sweep: SweepConfig, space: Space, default: dict[str, Any], journal: Journal, trials: Trials
) -> None:
    """Run, or go on with, a search. Returns when all trials have ended, or when the job's budget is used up.

    A trial that fails is journaled as failed and the search goes on, but for the default: without it there is nothing
    to compare with, and what it fails of, others will. One that finds no room is none that failed: NoRoom ends the
    search, and the same command goes on with that trial.
    """
    for number in range(sweep.num_trials):
        if number not in journal.trials:
            (params,) = suggest(journal, space, default, number, 1, sweep.seed, trials.mode)
            journal.choose(number, params)
        if journal.trials[number].status == "running":
            if not _train(job, journal, trials, number):
                return
            print(f"{line(journal, number, trials.metric)}  ({number + 1} of {sweep.num_trials})", flush=True)


def _train(job: Job, journal: Journal, trials: Trials, number: int) -> bool:
    """One trial, to its end; False when the budget is used up before."""
    params = journal.trials[number].params
    units = trials.units(number, params)
    for outbox in (trials.open(number, params), *(unit.outbox for unit in units)):
        job.follow(outbox)
    try:
        if not all(unit.result() or train_with_workers(unit, job.budget, job.interrupted) for unit in units):
            return False
    except NoRoom:
        raise
    except Exception as error:
        close_trial(trials, number, params, "FAILED")
        if number == 0:
            raise
        print(f"trial {number}: {error}", flush=True)
        journal.end(number, "failed", None)
        return True
    values = [(unit.result() or {})["val"][trials.metric] for unit in units]
    _record(journal, trials, number, units)
    close_trial(trials, number, params, "FINISHED")
    journal.end(number, "finished", sum(values) / len(values), values)
    return True


def _record(journal: Journal, trials: Trials, number: int, units: Sequence[Unit]) -> None:
    """The mean over the replicates after every evaluation that all of them had."""
    outbox = trials.outbox(number)
    for rung, values in enumerate(
        zip(*(recorded(unit.outbox, trials.metric) for unit in units), strict=False), start=1
    ):
        mean = sum(values) / len(values)
        outbox.metrics({f"val/{trials.metric}": mean}, rung)
        journal.reach(number, rung, mean)
