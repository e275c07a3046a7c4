"""A sweep over a recipe's loss, from the search to the model that leaves it.

    encoders    one a search seed (two-stage methods), trained once
    search      trials on the search seeds: generations of heads (`generations`), Ray Tune trials (`trials`), or groups
                of workers one after the other (`in_turn`)
    finals      the best trials and the default on fresh seeds (`finals`)
    report      the verdict, first on validation and then on test; page, tables, figures (`report`)

Everything stands in the run's folder and in a journal (`raymed.tune.journal`): the same command after any kill goes on
where it was.
"""

from collections.abc import Sequence
from pathlib import Path

from raymed.config import UserError
from raymed.registry.config import RegisterConfig
from raymed.results.classifier_model import foreign_folders
from raymed.storage import local_folder
from raymed.train.places.cluster import cpus_for, gpu_share, gpus_of, require
from raymed.train.places.launch import ADVICE, announce, check_single_worker, run_side_by_side, trials_on_a_gpu
from raymed.train.runs.job import Job
from raymed.train.unit import Unit
from raymed.tune.config import Finals, SweepConfig, default_params, search_space
from raymed.tune.finals import finalists, run_finals, seed_replicates
from raymed.tune.generations import run_generations
from raymed.tune.in_turn import run_in_turn
from raymed.tune.journal import Journal
from raymed.tune.report import report_sweep
from raymed.tune.results import write_tune_results
from raymed.tune.trials import Trials, run_trials


def run_sweep(
    job: Job,
    sweep: SweepConfig,
    seeds: Sequence[int],
    finals: Finals,
    registering: RegisterConfig,
    foreign: Sequence[str] = (),
) -> Path:
    """Run, or go on with, the sweep of a job's recipe; returns the path of its summary. Needs a connected Ray.

    A budget that is used up ends it with a report of what is finished. Raises UserError where the cluster has no room
    for a single trial, and when every trial failed.
    """
    check_single_worker(job)
    foreign_folders(foreign)  # told now, not hours later
    encoders, replicates = seed_replicates(job, seeds)
    trials = Trials(template(job), replicates, sweep.metric)
    journal = Journal(job.folder / "sweep.jsonl")
    fresh, fresh_replicates = seed_replicates(job, finals.seeds)
    final = [trials.unit(r, {}, f"finals/{k}", None) for k in range(1 + finals.finalists) for r in fresh_replicates]
    announce(job, [encoders, fresh] if encoders else [open_units(sweep, journal, trials), final])
    units: dict[str, list[Unit]] = {}
    if run_side_by_side(job, [encoders]):
        search(job, sweep, journal, trials)
        check_found(job, journal, trials.mode)
    if journal.best(trials.mode) is not None and not job.budget.exhausted():
        units = run_finals(job, finals, finalists(journal, finals, trials.mode), trials)
    write_tune_results(job.folder / "tune", journal, sweep.metric)
    return report_sweep(job, sweep, finals, registering, foreign, journal, trials, units)


def open_units(sweep: SweepConfig, journal: Journal, trials: Trials) -> list[Unit]:
    """The trainings of trials that have not ended, were none of them stopped early: for an estimate."""
    ended = {trial.number for trial in journal.trials.values() if trial.status != "running"}
    return [unit for number in range(sweep.num_trials) if number not in ended for unit in trials.units(number, {})]


def template(job: Job) -> Unit:
    """A unit of the job's recipe as it stands, in the job's folder."""
    cache = local_folder(job.storage, "cache")
    return Unit(job.recipe, 0, job.folder, job.key, job.name, None, cache, job.config.compute)


def search(job: Job, sweep: SweepConfig, journal: Journal, trials: Trials) -> None:
    """Run, or go on with, the trials. Returns when all have ended, or when the job's budget is used up."""
    compute, recipe = job.config.compute, trials.template.recipe
    space = search_space(recipe, sweep)
    default = default_params(recipe, space)
    if compute.workers > 1:
        run_in_turn(job, sweep, space, default, journal, trials)
        return
    cpus, gpus = compute.cpus_per_worker, float(gpus_of(compute.device))
    if sweep.batched and recipe.two_stage:
        cpus = cpus_for(compute.cpus_per_worker, int(gpus))
        require(cpus, gpus, advice=ADVICE)
        with job.budget.running("search", gpus):
            run_generations(job, sweep, space, default, journal, trials, {"cpu": cpus, "gpu": gpus})
        return
    at_most = sweep.at_once or sweep.num_trials
    if gpus:
        gpus = gpu_share(trials_on_a_gpu(trials.units(0, default)[0], at_most))
    room = require(cpus, gpus, at_most=at_most, advice=ADVICE)
    with job.budget.running("search", gpus * room):
        run_trials(job, sweep, space, default, journal, trials, room, {"cpu": cpus, "gpu": gpus})


def check_found(job: Job, journal: Journal, mode: str) -> None:
    """Raise UserError where all trials have ended and none of them is finished."""
    if journal.best(mode) is None and not job.budget.exhausted():
        raise UserError(f"no trial finished: see the errors above and {journal.path}")
