"""Sweep the hyper-parameters of a loss: by default the asymmetric loss of a head on a SupCon encoder.

    python jobs/tune_asl.py                                              # digital HSG phantoms
    python jobs/tune_asl.py --data.manifest pneumoniamnist.npz --data.positive normal
    ray job submit --working-dir . -- python jobs/tune_asl.py            # on a cluster

The encoder of each seed is trained once; Ray Tune (ASHA + Optuna) then trains a head a trial. The same command
continues a sweep that was stopped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raymed.tasks.classifier import ClassifierRecipe
from raymed.train.cluster import connected
from raymed.train.compute import Compute
from raymed.train.job import RunConfig, main, open_job
from raymed.tune.sweep import SweepConfig, run_sweep, search_space


@dataclass(frozen=True)
class TuneAsl:
    """A sweep over the loss of one method."""

    recipe: Annotated[ClassifierRecipe, tyro.conf.arg(name="")] = ClassifierRecipe()
    sweep: SweepConfig = SweepConfig()
    seeds: tuple[int, ...] = (2023,)
    """Every trial is trained with each of them, and scored by the mean."""
    compute: Compute = Compute()
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()

    def __post_init__(self) -> None:
        search_space(self.recipe, self.sweep)  # a range that cannot be is told before anything starts


def recipe() -> TuneAsl:
    """The defaults."""
    return TuneAsl()


def tune(config: TuneAsl) -> Path:
    """Train the encoders, sweep the heads, report the best trial."""
    with open_job("tune_asl", config) as job, connected():
        return run_sweep(job, config.sweep, config.seeds)


if __name__ == "__main__":
    main(recipe, tune)
