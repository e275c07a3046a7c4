"""Writes what Ray Tune's trials report into the sweep's journal, and closes their MLflow runs."""

from collections.abc import Sequence
from typing import Any

from ray.tune import Callback, Stopper

from raymed.storage import Mirror
from raymed.tracking.outbox import Status
from raymed.train.runs.job import Job
from raymed.tune.journal import Journal
from raymed.tune.search import TIME
from raymed.tune.trials import Trials


class Recorder(Callback):
    """Lives in the driver."""

    def __init__(self, job: Job, journal: Journal, trials: Trials, num_trials: int):
        self.job, self.journal, self.trials, self.num_trials = job, journal, trials, num_trials

    def __getstate__(self) -> dict:
        """Nothing: Tune pickles its callbacks for a restore of its own, and ours is the journal."""
        return {}

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """The tracker follows the trial and its seeds."""
        number, params = trial.config["number"], trial.config["params"]
        self.job.follow(self.trials.outbox(number))
        for unit in self.trials.units(number, params):
            self.job.follow(unit.outbox)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        """One evaluation."""
        if not result["finished"]:
            self.journal.reach(trial.config["number"], result[TIME], result[self.trials.metric])

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Finished by itself, or stopped by ASHA."""
        if self.job.over():
            return  # cut off where it stood: the next run of the command continues it
        result = trial.last_result
        finished = bool(result.get("finished"))
        if not finished:
            self.trials.outbox(trial.config["number"]).tags({"raymed.stopped_at_evaluation": str(result[TIME])})
        self._close(trial, "FINISHED")
        self._end(trial, "finished" if finished else "stopped", result[self.trials.metric], result["values"])

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Failed for good; the sweep goes on without it."""
        self._close(trial, "FAILED")
        self._end(trial, "failed", None)

    def _end(self, trial: Any, status: Any, value: float | None, values: Sequence[float] = ()) -> None:
        self.journal.end(trial.config["number"], status, value, values)
        done = sum(t.status != "running" for t in self.journal.trials.values())
        told = line(self.journal, trial.config["number"], self.trials.metric)
        print(f"{told}  ({done} of {self.num_trials})", flush=True)

    def _close(self, trial: Any, status: Status) -> None:
        """Before the journal says that the trial has ended, since nobody looks at it again then."""
        close_trial(self.trials, trial.config["number"], trial.config["params"], status)


class WhenOver(Stopper):
    """Ends the whole sweep after Ctrl-C, or when the budget is used up."""

    def __init__(self, job: Job):
        self.job = job

    def __getstate__(self) -> dict:
        return {}

    def __call__(self, trial_id: str, result: dict) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.job.over()


def close_trial(trials: Trials, number: int, params: dict[str, Any], status: Status) -> None:
    """Close the runs of a trial and of its replicates, wherever they were trained."""
    if mirror := Mirror.of(trials.outbox(number).path.parent):
        mirror.pull()
    for outbox in [trials.outbox(number), *(unit.outbox for unit in trials.units(number, params))]:
        if outbox.path.is_file():
            outbox.close(status)


def line(journal: Journal, number: int, metric: str) -> str:
    """What a person reads of a trial that has ended."""
    trial = journal.trials[number]
    params = "  ".join(f"{k.rsplit('.', 1)[-1]} {_short(v)}" for k, v in trial.params.items())
    shown = "" if trial.value is None else f"  {metric} {trial.value:.4f}"
    return f"trial {number:3d} {trial.status:8s}{shown}  {params}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
