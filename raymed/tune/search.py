"""Which configurations a sweep tries, and which it stops: Optuna's TPE and ASHA, both rebuilt from the journal.

Neither keeps state of its own between processes. A suggestion is a function of the sweep's seed, the trial's number and
the trials that have ended; ASHA's rungs are filled again from the recorded ones. Heads are asked for a generation at a
time (`suggest`, `cut`); ordinary Ray Tune trials one by one (`JournalSearcher`, `JournalAsha`).
"""

import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

from raymed.random import derive
from raymed.space import Space
from raymed.tune.journal import Journal

TIME = "evaluation"


def suggest(
    journal: Journal, space: Space, default: dict[str, Any], first: int, count: int, seed: int, mode: str
) -> list[dict[str, Any]]:
    """Parameters of the trials first, ..., first + count - 1: trial 0 is the default, the others are TPE's.

    All of them see the trials that have ended before `first`; among themselves they are kept apart by counting those
    asked for already as bad (Optuna's constant liar).
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    distributions: dict[str, Any] = {name: dimension.distribution() for name, dimension in space.items()}
    sampler = optuna.samplers.TPESampler(
        seed=derive(seed, "suggestion", first) % 2**32, multivariate=True, n_startup_trials=8, constant_liar=count > 1
    )
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize", sampler=sampler)
    for trial in journal.ended():
        if trial.number < first and all(space[name].contains(trial.params[name]) for name in space):
            study.add_trial(
                optuna.trial.create_trial(params=trial.params, distributions=distributions, value=trial.value)
            )
    asked = [default] if first == 0 else []
    return asked + [study.ask(distributions).params for _ in range(count - len(asked))]


def rungs(evaluations: int, grace: int, reduction: int) -> list[int]:
    """The evaluations after which trials are cut: grace, grace x reduction, ..., before the last one."""
    reached, found = grace, []
    while reached < evaluations:
        found.append(reached)
        reached *= reduction
    return found


def cut(values: Mapping[int, float], live: list[int], reduction: int, mode: str) -> list[int]:
    """ASHA's rule at a rung: which of the trials in `live` stop there.

    values: trial -> objective of all trials that have ever reached the rung, those of `live` among them. Kept is what
    is at least as good as the best 1 / reduction of them (Ray's `AsyncHyperBandScheduler`, which sees trials one at a
    time; here a generation arrives together). Trial 0, what all others are compared with, is never stopped.
    """
    sign = 1 if mode == "max" else -1
    signed = {number: sign * value for number, value in values.items()}
    known = [value for value in signed.values() if not np.isnan(value)]
    cutoff = np.percentile(known, 100 * (1 - 1 / reduction)) if known else -np.inf
    return [number for number in live if number and not signed[number] >= cutoff]


class JournalSearcher(Searcher):
    """Hands out unfinished trials first, then the default configuration, then TPE's suggestions."""

    def __init__(self, journal: Journal, space: Space, default: dict[str, Any], num_trials: int, seed: int, mode: str):
        super().__init__(mode=mode)
        self.journal, self.space, self.default = journal, space, default
        self.num_trials, self.seed = num_trials, seed
        self.waiting = journal.unfinished()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's number and parameters, or FINISHED."""
        if self.waiting:
            number = self.waiting.pop(0)
        elif len(self.journal.trials) < self.num_trials:
            number = len(self.journal.trials)
            (params,) = suggest(self.journal, self.space, self.default, number, 1, self.seed, str(self.mode))
            self.journal.choose(number, params)
        else:
            return Searcher.FINISHED
        return {"number": number, "params": self.journal.trials[number].params}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Nothing to keep: the journal has it."""


class JournalAsha(AsyncHyperBandScheduler):
    """Ray's asynchronous successive halving over evaluations, its rungs filled with what the journal has.

    Trials are known by their number, so that one that is continued stands once in a rung it had reached before.
    Source: Li et al. 2020, "A system for massively parallel hyperparameter tuning".
    """

    def __init__(self, journal: Journal, metric: str, mode: str, evaluations: int, grace: int, reduction: int):
        self.evaluations = evaluations
        last = evaluations + 1  # the report after the last evaluation must not be cut off
        super().__init__(TIME, metric, mode, max_t=last, grace_period=grace, reduction_factor=reduction)
        for trial in journal.trials.values():
            stand_in = SimpleNamespace(config={"number": trial.number})
            self.on_trial_add(None, stand_in)
            for rung, value in sorted(trial.rungs.items()):
                self.on_trial_result(None, stand_in, {TIME: rung, metric: value})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _numbered(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """Trial 0, what all others are compared with, goes to its end; who has come to the last evaluation is there."""
        decision = super().on_trial_result(tune_controller, _numbered(trial), result)
        kept = trial.config["number"] == 0 or result[TIME] >= self.evaluations
        return TrialScheduler.CONTINUE if kept else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        super().on_trial_complete(tune_controller, _numbered(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _numbered(trial))


def _numbered(trial: Any) -> Any:
    return SimpleNamespace(trial_id=f"trial-{trial.config['number']:04d}")
