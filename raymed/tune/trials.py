"""The trials of a search: what each trains, where it is kept, and how an ordinary Ray Tune trial runs.

A trial is one configuration, trained on every replicate (a seed, or a fold of a nested cross-validation) and scored by
the mean. Trials look at validation only.
"""

import dataclasses
import math
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from raymed.config import replace
from raymed.data.folds import RepeatedFold
from raymed.space import Space
from raymed.storage import Mirror
from raymed.tasks.recipe import Recipe
from raymed.tracking.outbox import Outbox
from raymed.train.runs.job import Job
from raymed.train.unit import Unit, UnitRun
from raymed.tune.config import SweepConfig
from raymed.tune.journal import Journal


@dataclass(frozen=True)
class Replicate:
    """What every trial of a search is trained on once."""

    name: str
    seed: int
    fold: RepeatedFold | None = None
    encoder: str | None = None
    """Folder of the checkpoints of the encoder that all trials share; None for one-stage methods."""


@dataclass(frozen=True)
class Trials:
    """From a trial's number and parameters to its units, one a replicate. Travels to actors."""

    template: Unit
    """A unit of the recipe as it stands, in the search's folder."""
    replicates: tuple[Replicate, ...]
    metric: str

    @property
    def mode(self) -> str:
        """Whether more ("max") or less ("min") of the metric is better."""
        return self.template.recipe.metrics[self.metric]

    def name(self, number: int) -> str:
        """For people and folders."""
        return f"trial-{number:04d}"

    def outbox(self, number: int) -> Outbox:
        """What a trial tells the tracker."""
        return Outbox(self.template.folder / self.name(number) / "tracking.jsonl")

    def open(self, number: int, params: dict[str, Any]) -> Outbox:
        """A trial's outbox, opened as a run below the search's."""
        outbox = self.outbox(number)
        outbox.open(f"{self.template.key}/{self.name(number)}", self.name(number), self.template.key, params)
        return outbox

    def recipe(self, replicate: Replicate, params: dict[str, Any]) -> Recipe:
        """The recipe of a trial on one replicate."""
        recipe = replace(self.template.recipe, params)
        return replace(recipe, {"supcon.encoder_from": replicate.encoder}) if replicate.encoder else recipe

    def unit(self, replicate: Replicate, params: dict[str, Any], name: str, parent: str | None) -> Unit:
        """The training of a configuration on one replicate, in a folder below the search's."""
        return dataclasses.replace(
            self.template,
            recipe=self.recipe(replicate, params),
            seed=replicate.seed,
            fold=replicate.fold,
            folder=self.template.folder / name / replicate.name,
            key=f"{self.template.key}/{name}/{replicate.name}",
            name=f"{name}-{replicate.name}",
            parent=parent,
        )

    def units(self, number: int, params: dict[str, Any]) -> list[Unit]:
        """The trainings of one trial."""
        name = self.name(number)
        units = [self.unit(r, params, name, f"{self.template.key}/{name}") for r in self.replicates]
        return [dataclasses.replace(unit, splits=("val",)) for unit in units]


def run_trial(config: dict[str, Any], trials: Trials) -> None:
    """One Ray Tune trial: all its replicates in step, the mean of the metric reported after every evaluation."""
    with Mirror.of(trials.template.folder / trials.name(config["number"])) or nullcontext() as mirror:
        if mirror:  # the driver may be on another node
            mirror.pull()
            mirror.follow()
        _run_trial(config["number"], config["params"], trials)


def _run_trial(number: int, params: dict[str, Any], trials: Trials) -> None:
    from ray import tune

    outbox = trials.open(number, params)
    runs = [UnitRun(unit) for unit in trials.units(number, params)]
    latest = [math.nan] * len(runs)
    for reached, values in enumerate(zip_longest(*(_values(run, trials.metric) for run in runs)), start=1):
        latest = [old if new is None else new for new, old in zip(values, latest, strict=True)]
        mean = sum(latest) / len(latest)
        outbox.metrics({f"val/{trials.metric}": mean}, reached)
        tune.report({"evaluation": reached, trials.metric: mean, "values": latest, "finished": False})
    finals = [run.finish()["val"][trials.metric] for run in runs]
    mean = sum(finals) / len(finals)
    last = sum(phase.evaluations for phase in runs[0].fit.phases)
    outbox.metrics({f"final/val/{trials.metric}": mean}, last)
    tune.report({"evaluation": last + 1, trials.metric: mean, "values": finals, "finished": True})


def _values(run: UnitRun, metric: str) -> Iterator[float]:
    """The metric after every evaluation, from the first: those of an earlier, interrupted run are on record."""
    told = 0
    for evaluation in run.evaluations():
        earlier = recorded(run.unit.outbox, metric)[told : evaluation.number - 1]
        yield from (*earlier, evaluation.metrics[metric])
        told = evaluation.number
    yield from recorded(run.unit.outbox, metric)[told:]


def recorded(outbox: Outbox, metric: str) -> list[float]:
    """A validation metric after every evaluation of a training that is told to this outbox; nan where it was none."""
    kept = [r["values"] for r in outbox.records() if r["op"] == "metrics" and f"val/{metric}" in r["values"]]
    return [math.nan if values[f"val/{metric}"] is None else values[f"val/{metric}"] for values in kept]


def run_trials(
    job: Job,
    sweep: SweepConfig,
    space: Space,
    default: dict[str, Any],
    journal: Journal,
    trials: Trials,
    at_once: int,
    resources: dict[str, float],
) -> None:
    """Run, or go on with, a search as Ray Tune trials, `at_once` side by side in actors that are used again.

    Returns when all have ended, or when the job's budget is used up.
    """
    from ray import tune

    from raymed.tune.recorder import Recorder, WhenOver
    from raymed.tune.search import JournalAsha, JournalSearcher

    left = sweep.num_trials - sum(t.status != "running" for t in journal.trials.values())
    if left <= 0:
        return
    evaluations = trials.template.recipe.stage.evaluations
    with tempfile.TemporaryDirectory(prefix="raymed-tune-") as scratch:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, trials=trials), resources),
            tune_config=tune.TuneConfig(
                num_samples=left,
                max_concurrent_trials=at_once,
                search_alg=JournalSearcher(journal, space, default, sweep.num_trials, sweep.seed, trials.mode),
                scheduler=JournalAsha(journal, sweep.metric, trials.mode, evaluations, sweep.grace, sweep.reduction),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=job.name,
                storage_path=scratch,
                callbacks=[Recorder(job, journal, trials, sweep.num_trials)],
                failure_config=tune.FailureConfig(max_failures=1),
                stop=WhenOver(job),
                verbose=0,
            ),
        ).fit()
    if job.interrupted():
        raise KeyboardInterrupt
