"""A sweep over a recipe's loss: Ray Tune trials, each the training loop itself, on one worker of a reused actor.

The loss brings its search space; the user adds to it or narrows it. Trials, rungs and results stand in a journal of our
own (`raymed.tune.journal`): the same command after any kill goes on with it.
"""

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from raymed.config import UserError, check_choice, check_range, flatten, replace
from raymed.report.figures import sweep_figure
from raymed.space import Choice, Space, parse
from raymed.storage import local_folder
from raymed.tasks.classifier import ClassifierRecipe
from raymed.tracking.outbox import Outbox
from raymed.train.cluster import gpus_of, require
from raymed.train.job import Job
from raymed.train.launch import ADVICE, check_single_worker, encoder_units, run_side_by_side
from raymed.train.results import report
from raymed.train.unit import Unit, UnitRun
from raymed.tune.journal import Journal, TrialRecord

METRICS = {"auroc": "max", "auprc": "max", "accuracy_at_0.5": "max", "brier": "min", "ece": "min"}


@dataclass(frozen=True)
class SweepConfig:
    """How many configurations are tried, and how they are chosen."""

    num_trials: int = 24
    """The first is the recipe as it stands."""
    metric: str = "auprc"
    """Validation metric to optimise: auroc, auprc, accuracy_at_0.5, brier or ece."""
    space: tuple[str, ...] = ()
    """Further dimensions, or others for the loss's own: "head.optim.lr=1e-3..1e-1:log", "losses.asl.clip=0|0.05"."""
    grace: int = 2
    """Evaluations before a trial may be stopped early."""
    reduction: int = 3
    """ASHA keeps one in so many at each rung."""
    at_once: int | None = None
    """Trials side by side; None = as many as the cluster has room for."""
    seed: int = 0
    """Of the suggestions."""

    @property
    def mode(self) -> str:
        """Whether more ("max") or less ("min") of the metric is better."""
        return METRICS[self.metric]

    def __post_init__(self) -> None:
        check_range("sweep.num_trials", self.num_trials, 1)
        check_choice("sweep.metric", self.metric, METRICS)
        if self.at_once is not None:
            check_range("sweep.at_once", self.at_once, 1)
        check_range("sweep.grace", self.grace, 1)
        check_range("sweep.reduction", self.reduction, 2)
        for entry in self.space:
            if "=" not in entry:
                raise UserError(f"sweep.space must be NAME=RANGE such as head.optim.lr=1e-3..1e-1:log, got {entry!r}")


def search_space(recipe: ClassifierRecipe, sweep: SweepConfig) -> Space:
    """Field of the recipe -> dimension: the loss's own space, and what the user adds.

    Raises UserError for a field that does not exist or changes nothing, and for values that the field cannot have.
    """
    loss = getattr(recipe.losses, recipe.loss_name)
    space = {f"losses.{recipe.loss_name}.{name}": dimension for name, dimension in loss.space.items()}
    for entry in sweep.space:
        name, _, text = entry.partition("=")
        _check_has_effect(recipe, name)
        space[name] = dimension = parse(text)
        for value in dimension.options if isinstance(dimension, Choice) else (dimension.low, dimension.high):
            replace(recipe, {name: value})
    if not space:
        raise UserError(f"the loss {recipe.loss_name!r} has nothing to sweep: add --sweep.space NAME=RANGE")
    return space


def _check_has_effect(recipe: ClassifierRecipe, name: str) -> None:
    """Two-stage trials share an encoder, and the features it gives each image."""
    _field(recipe, name)
    parts = (f"losses.{recipe.loss_name}.", *(("head.",) if recipe.two_stage else ("single.", "augment.", "model.")))
    if not name.startswith(parts):
        useful = " or ".join(parts)
        raise UserError(f"sweep.space: {name} changes nothing in a trial of {recipe.method}: sweep fields of {useful}")


def _field(recipe: Any, name: str) -> Any:
    fields = flatten(recipe)
    if name not in fields:
        import difflib

        near = difflib.get_close_matches(name, fields, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"sweep.space: the recipe has no field {name!r}{hint}")
    return fields[name]


@dataclass(frozen=True)
class Trials:
    """From a trial's number and parameters to its units, one a seed. Travels to the trials' actors."""

    template: Unit
    """A unit of the recipe as it stands, in the run's folder."""
    seeds: tuple[int, ...]
    encoders: dict[int, str]
    """Seed -> folder of the encoder that all trials share; empty for single-stage methods."""
    metric: str

    def outbox(self, number: int) -> Outbox:
        """What a trial tells the tracker."""
        return Outbox(self.template.folder / f"trial-{number:04d}" / "tracking.jsonl")

    def key(self, number: int) -> str:
        """Names a trial's run for ever."""
        return f"{self.template.key}/trial-{number:04d}"

    def units(self, number: int, params: dict[str, Any]) -> list[Unit]:
        """The trainings of one trial."""
        recipe = replace(self.template.recipe, params)
        return [
            dataclasses.replace(
                self.template,
                recipe=replace(recipe, {"supcon.encoder_from": self.encoders[seed]}) if self.encoders else recipe,
                seed=seed,
                folder=self.template.folder / f"trial-{number:04d}" / f"seed-{seed}",
                key=f"{self.key(number)}/seed-{seed}",
                name=f"trial-{number:04d}-seed-{seed}",
                parent=self.key(number),
            )
            for seed in self.seeds
        ]


def run_trial(config: dict[str, Any], trials: Trials) -> None:
    """One Tune trial: all its seeds in step, the mean of the metric reported after every evaluation."""
    from ray import tune

    number, params = config["number"], config["params"]
    outbox = trials.outbox(number)
    outbox.open(trials.key(number), f"trial-{number:04d}", trials.template.key, params)
    runs = [UnitRun(unit) for unit in trials.units(number, params)]
    latest = [math.nan] * len(runs)
    for reached, values in enumerate(zip_longest(*(_values(run, trials.metric) for run in runs)), start=1):
        latest = [old if new is None else new for new, old in zip(values, latest, strict=True)]
        mean = sum(latest) / len(latest)
        outbox.metrics({f"val/{trials.metric}": mean}, reached)
        tune.report({"evaluation": reached, trials.metric: mean, "finished": False})
    results = [run.finish() for run in runs]
    mean = sum(result["val"][trials.metric] for result in results) / len(results)
    last = sum(phase.evaluations for phase in runs[0].fit.phases)
    outbox.metrics({f"final/val/{trials.metric}": mean}, last)
    tune.report({"evaluation": last + 1, trials.metric: mean, "finished": True})


def _values(run: UnitRun, metric: str) -> Iterator[float]:
    """The metric after every evaluation, from the first: those of an earlier, interrupted run are on record."""
    told = 0
    for evaluation in run.evaluations():
        earlier = _recorded(run, metric)[told : evaluation.number - 1]
        yield from (*earlier, evaluation.metrics[metric])
        told = evaluation.number
    yield from _recorded(run, metric)[told:]


def _recorded(run: UnitRun, metric: str) -> list[float]:
    kept = [r["values"] for r in run.unit.outbox.records() if r["op"] == "metrics" and f"val/{metric}" in r["values"]]
    return [math.nan if values[f"val/{metric}"] is None else values[f"val/{metric}"] for values in kept]


def run_sweep(job: Job, sweep: SweepConfig, seeds: Sequence[int]) -> Path:
    """Run, or go on with, the sweep of a job's recipe, and report its best trial. Needs a connected Ray.

    Raises UserError where the cluster has no room for a single trial, and when every trial failed.
    """
    compute = job.config.compute
    check_single_worker(job)
    space = search_space(job.recipe, sweep)
    room = require(
        compute.cpus_per_worker, gpus_of(compute.device), at_most=sweep.at_once or sweep.num_trials, advice=ADVICE
    )
    encoders = encoder_units(job, seeds) if job.recipe.two_stage else []
    run_side_by_side(job, [encoders])
    folders = {unit.seed: str(unit.folder / "checkpoints" / "supcon") for unit in encoders}
    cache = local_folder(job.storage, "cache")
    template = Unit(job.recipe, seeds[0], job.folder, job.key, job.name, None, cache, compute)
    trials = Trials(template, tuple(seeds), folders, sweep.metric)
    journal = Journal(job.folder / "sweep.jsonl")
    left = sweep.num_trials - sum(t.status != "running" for t in journal.trials.values())
    if left > 0:
        _tune(job, sweep, space, journal, trials, room, left)
    return _report(job, sweep, journal, trials)


def _report(job: Job, sweep: SweepConfig, journal: Journal, trials: Trials) -> Path:
    best = journal.best(sweep.mode)
    if best is None:
        raise UserError(f"no trial finished: see the errors above and {journal.path}")
    picture = job.folder / "figures" / "sweep.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    sweep_figure(picture, _table(journal), f"validation {sweep.metric}", sweep.mode == "max")
    chosen = f"trial {best.number}"
    units = {chosen: trials.units(best.number, best.params)}
    if best.number and journal.trials[0].status == "finished":
        units = {"default": trials.units(0, journal.trials[0].params)} | units
    sweep_record = {"num_trials": len(journal.trials), "best_trial": best.number, "best_params": best.params}
    return report(job, units, next(iter(units)), [picture], best=chosen, sweep=sweep_record)


def _table(journal: Journal) -> list[dict[str, Any]]:
    """Trials for the sweep's figure."""

    def row(trial: TrialRecord) -> dict[str, Any]:
        params = {name.rsplit(".", 1)[-1]: value for name, value in trial.params.items()}
        return {"params": params, "value": trial.value, "stopped": trial.status == "stopped"}

    return [row(trial) for trial in journal.ended()]


def _tune(job: Job, sweep: SweepConfig, space: Space, journal: Journal, trials: Trials, room: int, left: int) -> None:
    from ray import tune

    from raymed.tune.recorder import Recorder, WhenInterrupted
    from raymed.tune.search import JournalAsha, JournalSearcher

    recipe = trials.template.recipe
    default = {name: _field(recipe, name) for name in space}
    evaluations = (recipe.head if recipe.two_stage else recipe.single).evaluations
    check_range("sweep.grace", sweep.grace, 1, evaluations)
    compute = job.config.compute
    resources = {"cpu": compute.cpus_per_worker, "gpu": gpus_of(compute.device)}
    with tempfile.TemporaryDirectory(prefix="raymed-tune-") as scratch:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, trials=trials), resources),
            tune_config=tune.TuneConfig(
                num_samples=left,
                max_concurrent_trials=room,
                search_alg=JournalSearcher(journal, space, default, sweep.num_trials, sweep.seed, sweep.mode),
                scheduler=JournalAsha(journal, sweep.metric, sweep.mode, evaluations, sweep.grace, sweep.reduction),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=job.name,
                storage_path=scratch,
                callbacks=[Recorder(job, journal, trials)],
                failure_config=tune.FailureConfig(max_failures=1),
                stop=WhenInterrupted(job),
                verbose=0,
            ),
        ).fit()
    if job.interrupted():
        raise KeyboardInterrupt
