"""Which configurations a sweep tries, and which it stops: Optuna's TPE and ASHA, both rebuilt from the journal.

Neither keeps state of its own between processes. A suggestion is a function of the sweep's seed, the trial's number and
the trials that have ended; ASHA's rungs are filled again from the recorded ones.
"""

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

from raymed.random import derive
from raymed.space import Space
from raymed.tune.journal import Journal

TIME = "evaluation"


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
            self.journal.choose(number, self._ask(number))
        else:
            return Searcher.FINISHED
        return {"number": number, "params": self.journal.trials[number].params}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Nothing to keep: the journal has it."""

    def _ask(self, number: int) -> dict[str, Any]:
        if number == 0:
            return self.default
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions: dict[str, Any] = {name: dimension.distribution() for name, dimension in self.space.items()}
        sampler = optuna.samplers.TPESampler(
            seed=derive(self.seed, "suggestion", number) % 2**32, multivariate=True, n_startup_trials=8
        )
        study = optuna.create_study(direction="maximize" if self.mode == "max" else "minimize", sampler=sampler)
        for trial in self.journal.ended():
            if all(self.space[name].contains(trial.params[name]) for name in self.space):
                study.add_trial(
                    optuna.trial.create_trial(params=trial.params, distributions=distributions, value=trial.value)
                )
        return study.ask(distributions).params


class JournalAsha(AsyncHyperBandScheduler):
    """Ray's asynchronous successive halving over evaluations, its rungs filled with what the journal has.

    Trials are known by their number, so that one that is continued stands once in a rung it had reached before.
    Source: Li et al. 2020, "A system for massively parallel hyperparameter tuning".
    """

    def __init__(self, journal: Journal, metric: str, mode: str, evaluations: int, grace: int, reduction: int):
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
        """Trial 0, what all others are compared with, goes to its end."""
        decision = super().on_trial_result(tune_controller, _numbered(trial), result)
        return TrialScheduler.CONTINUE if trial.config["number"] == 0 else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        super().on_trial_complete(tune_controller, _numbered(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _numbered(trial))


def _numbered(trial: Any) -> Any:
    return SimpleNamespace(trial_id=f"trial-{trial.config['number']:04d}")
