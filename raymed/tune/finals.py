"""The finals of a search: its best configurations and the default, trained again on seeds that chose nothing.

A sweep's best score is the luckiest of many. What it is worth shows on fresh seeds, paired by seed with the default,
since the heads of a seed share its encoder.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from raymed.storage import address
from raymed.train.places.launch import encoder_units, flat, run_one_by_one, run_side_by_side
from raymed.train.runs.job import Job
from raymed.train.unit import Unit
from raymed.tune.config import Finals, FinalSeeds
from raymed.tune.journal import Journal
from raymed.tune.trials import Replicate, Trials

DEFAULT = "default"


def seed_replicates(job: Job, seeds: Sequence[int]) -> tuple[list[Unit], tuple[Replicate, ...]]:
    """The encoders to be trained first (none for one-stage methods), and a replicate a seed."""
    encoders = encoder_units(job, seeds) if job.recipe.two_stage else []
    folders = {unit.seed: address(unit.folder / "checkpoints" / "supcon") for unit in encoders}
    return encoders, tuple(Replicate(f"seed-{seed}", seed, encoder=folders.get(seed)) for seed in seeds)


def finalists(journal: Journal, finals: Finals, mode: str) -> dict[str, dict[str, Any]]:
    """Method -> parameters: the default first, then the best trials by validation."""
    best = [trial for trial in journal.ranked(mode) if trial.number > 0][: finals.finalists]
    return {DEFAULT: {}} | {f"trial {trial.number}": trial.params for trial in best}


def run_finals(
    job: Job, finals: FinalSeeds, methods: Mapping[str, Mapping[str, Any]], search: Trials
) -> dict[str, list[Unit]]:
    """Train every method on every fresh seed; returns the units, or {} when the job's budget is used up before.

    Side by side where a training has one worker, else one after the other.
    """
    encoders, replicates = seed_replicates(job, finals.seeds)
    trials = dataclasses.replace(search, replicates=replicates)
    units = {
        method: [
            trials.unit(replicate, dict(params), f"finals/{method.replace(' ', '-')}", job.key)
            for replicate in replicates
        ]
        for method, params in methods.items()
    }
    for unit in flat(units):
        job.follow(unit.outbox)
    if job.config.compute.workers > 1:
        return units if run_one_by_one(job, [*encoders, *flat(units)]) else {}
    return units if run_side_by_side(job, [encoders, flat(units)]) else {}
