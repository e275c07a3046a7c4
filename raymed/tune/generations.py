"""A search over heads, a generation at a time: one actor trains all its heads as one bank, ASHA cuts it at the rungs.

The encoders' features go into Ray's object store once; the actor keeps them for all generations. Suggestions of one
generation see the results of those before it, not one another's. A generation that was cut short is trained again from
its start, which is seconds of work; what is in the journal is not written twice.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from raymed.space import Space
from raymed.tasks.classifier import ClassifierRecipe
from raymed.train.heads.features import encoder_features
from raymed.train.runs.job import Job
from raymed.train.unit import unit_data
from raymed.tune.config import SweepConfig
from raymed.tune.journal import Journal, Status
from raymed.tune.recorder import line
from raymed.tune.search import cut, rungs, suggest
from raymed.tune.trials import Replicate, Trials


@dataclass(frozen=True)
class Reached:
    """Where one trial stands after an evaluation."""

    values: list[float]
    """The metric on each replicate; nan where the head diverged."""
    ended: bool


class Heads:
    """Trains generations of heads; a Ray actor. features: a reference a replicate."""

    def __init__(self, trials: Trials, features: Sequence[Any], threads: int | None):
        import ray
        import torch

        from raymed.train.heads.bank import Replica

        if threads:
            torch.set_num_threads(threads)
        self.trials = trials
        self.replicas = [
            Replica(unit_data(_unit(trials, replicate)), array, replicate.seed)
            for replicate, array in zip(trials.replicates, ray.get(list(features)), strict=True)
        ]

    def begin(self, params: dict[int, dict[str, Any]]) -> None:
        """A new generation: trial -> its parameters."""
        from raymed.train.heads.bank import HeadBank, group

        numbers, anywhere = list(params), self.trials.replicates[0]
        recipes = [cast(ClassifierRecipe, self.trials.recipe(anywhere, params[number])) for number in numbers]
        device = self.trials.template.compute.resolved_device()
        self.banks = [
            ([numbers[i] for i in members], HeadBank([recipes[i] for i in members], self.replicas, device))
            for members in group(recipes)
        ]

    def advance(self, live: Sequence[int]) -> dict[int, Reached]:
        """Drop all trials but these, train to the next evaluation, and say where they stand."""
        found: dict[int, Reached] = {}
        for numbers, bank in self.banks:
            bank.keep([i for i in bank.alive if numbers[i] in live])
            if bank.finished:
                continue
            reached = bank.advance()
            gone = {*reached.ended, *reached.failed}
            values = reached.metrics[self.trials.metric].T.tolist()
            for i, of_trial in zip(reached.alive, values, strict=True):
                found[numbers[i]] = Reached(of_trial, bank.finished or i in gone)
        return found

    def best(self, live: Sequence[int]) -> dict[int, list[float]]:
        """The metric on each replicate at each trial's best evaluation."""
        return {
            numbers[i]: best.metrics[self.trials.metric].tolist()
            for numbers, bank in self.banks
            for i, best in bank.best().items()
            if numbers[i] in live
        }


def _unit(trials: Trials, replicate: Replicate):
    return trials.unit(replicate, {}, "features", None)


def features_of(trials: Trials, replicate: Replicate) -> np.ndarray:
    """The features of all images by a replicate's encoder; on disk they wait for the next run of the command."""
    unit = _unit(trials, replicate)
    data = unit_data(unit)
    return encoder_features(unit.recipe.phases(data)[0], data, unit.seed, unit.compute, unit.cache)


def run_generations(
    job: Job,
    sweep: SweepConfig,
    space: Space,
    default: dict[str, Any],
    journal: Journal,
    trials: Trials,
    resources: dict[str, float],
) -> None:
    """Run, or go on with, a search. Returns when all trials have ended, or when the job's budget is used up.

    resources: {"cpu": ..., "gpu": ...} of the one actor.
    """
    import ray

    left = [
        range(first, min(first + sweep.generation, sweep.num_trials))
        for first in range(0, sweep.num_trials, sweep.generation)
    ]
    left = [numbers for numbers in left if any(_is_open(journal, number) for number in numbers)]
    if not left:
        return
    options: dict[str, Any] = {"num_cpus": resources["cpu"], "num_gpus": resources["gpu"]}
    compute = ray.remote(**options)(features_of)
    features = [compute.remote(trials, replicate) for replicate in trials.replicates]
    if wait_for(job, features) is None:
        return
    threads = job.config.compute.threads or int(resources["cpu"])
    actor = ray.remote(**options)(Heads).remote(trials, features, threads)
    for numbers in left:
        asked = suggest(journal, space, default, numbers[0], len(numbers), sweep.seed, trials.mode)
        for number, params in zip(numbers, asked, strict=True):
            if number not in journal.trials:
                journal.choose(number, params)
        if not _Generation(job, sweep, journal, trials, actor).train([n for n in numbers if _is_open(journal, n)]):
            break
    ray.kill(actor)  # type: ignore[arg-type]


def wait_for(job: Job, references: list[Any]) -> list[Any] | None:
    """What Ray's tasks give, or None when the job's budget is used up before; Ctrl-C ends the waiting. Both are looked
    at before anything else: tasks may be so short that there is nothing to wait for."""
    import ray

    while True:
        if job.interrupted():
            raise KeyboardInterrupt
        if job.budget.exhausted():
            return None
        if len(ray.wait(references, num_returns=len(references), timeout=0.5)[0]) == len(references):
            return ray.get(references)


def _is_open(journal: Journal, number: int) -> bool:
    return number not in journal.trials or journal.trials[number].status == "running"


@dataclass(frozen=True)
class _Generation:
    """One generation as the driver sees it."""

    job: Job
    sweep: SweepConfig
    journal: Journal
    trials: Trials
    actor: Any

    def train(self, live: list[int]) -> bool:
        """Train to the end what ASHA leaves of these trials; False when the budget was used up before."""
        import ray

        recipe, numbers, began = self.trials.template.recipe, list(live), time.monotonic()
        marks = rungs(recipe.stage.evaluations, self.sweep.grace, self.sweep.reduction)
        self.job.start()
        for number in live:
            self.job.follow(self.trials.open(number, self.journal.trials[number].params))
        ray.get(self.actor.begin.remote({number: self.journal.trials[number].params for number in live}))
        for rung in range(1, recipe.stage.evaluations + 1):
            found = wait_for(self.job, [self.actor.advance.remote(live)])
            if found is None:
                return False
            live = self._record(rung, found[0])
            if rung in marks:
                values = {t.number: t.rungs[rung] for t in self.journal.trials.values() if rung in t.rungs}
                for number in cut(values, live, self.sweep.reduction, self.trials.mode):
                    self._end(number, "stopped", found[0][number].values)
                    live.remove(number)
            if not live:
                break
        self._tell(numbers, time.monotonic() - began)
        return True

    def _tell(self, numbers: list[int], seconds: float) -> None:
        ended = [self.journal.trials[number] for number in numbers]
        finished = sum(trial.status == "finished" for trial in ended)
        best = self.journal.best(self.trials.mode)
        shown = "" if best is None else f"; best so far {line(self.journal, best.number, self.trials.metric)}"
        print(
            f"trials {numbers[0]} to {numbers[-1]} of {self.sweep.num_trials}: {finished} finished, "
            f"{len(ended) - finished} cut, {seconds:.1f} s{shown}",
            flush=True,
        )

    def _record(self, rung: int, reached: dict[int, Reached]) -> list[int]:
        """Write down an evaluation; returns the trials that go on."""
        import ray

        metric = f"val/{self.trials.metric}"
        for number, trial in reached.items():
            self.journal.reach(number, rung, _mean(trial.values))
            named = zip(self.trials.replicates, trial.values, strict=True)
            of_each = {f"{replicate.name}/{metric}": value for replicate, value in named}
            self.trials.outbox(number).metrics({metric: _mean(trial.values)} | of_each, rung)
        ended = [number for number, trial in reached.items() if trial.ended]
        best: dict[int, list[float]] = ray.get(self.actor.best.remote(ended)) if ended else {}  # type: ignore[assignment]
        for number in ended:
            self._end(number, "finished", best.get(number, reached[number].values))
        return [number for number in reached if number not in ended]

    def _end(self, number: int, status: Status, values: list[float]) -> None:
        outbox, value = self.trials.outbox(number), _mean(values)
        if math.isnan(value):
            outbox.close("FAILED")
            self.journal.end(number, "failed", None)
        else:
            rung = max(self.journal.trials[number].rungs)
            kind = "final" if status == "finished" else "stopped"
            outbox.metrics({f"{kind}/val/{self.trials.metric}": value}, rung)
            outbox.close("FINISHED")
            self.journal.end(number, status, value, values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
