"""Sweep the hyper-parameters of a loss: by default the asymmetric loss of a head on a SupCon encoder.

    python jobs/tune_asl.py                                              # digital HSG phantoms
    python jobs/tune_asl.py --data.manifest pneumoniamnist.npz --data.positive normal
    python jobs/tune_asl.py --cv 5x3                                     # nested cross-validation: few cases
    ray job submit --working-dir . -- python jobs/tune_asl.py            # on a cluster

The encoder of each search seed is trained once; heads are trained a generation at a time and cut by ASHA. The best are
trained again on fresh seeds beside the default: the report says whether the gain is above seed noise, and the winner is
registered. The same command continues a sweep that was stopped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raymed.config import check_range
from raymed.data.folds import CrossValidation
from raymed.registry.config import RegisterConfig
from raymed.registry.next_steps import tell_next_steps
from raymed.tasks.classifier import ClassifierRecipe
from raymed.train.compute import Compute
from raymed.train.places.cluster import connected
from raymed.train.runs.job import RunConfig, main, open_job
from raymed.tune.config import Finals, SweepConfig, check_sweep
from raymed.tune.nested import run_nested
from raymed.tune.sweep import run_sweep


@dataclass(frozen=True)
class TuneAsl:
    """A sweep over the loss of one method."""

    recipe: Annotated[ClassifierRecipe, tyro.conf.arg(name="")] = ClassifierRecipe()
    sweep: SweepConfig = SweepConfig()
    seeds: tuple[int, ...] = (2023, 2024, 2025)
    """Of the search: every trial is trained with each of them, and scored by the mean."""
    finals: Finals = Finals()
    cv: str = ""
    """Nested cross-validation in place of the data's splits: FOLDSxREPEATS, such as 5x3; patients stay whole. Each fold
    has a search of its own, and scores what that chooses, and the default, on patients it has not seen. With the first
    of the seeds; without finals, and no model leaves it."""
    inner_folds: int = 3
    """With cv: parts of what a fold does not hold out. Every configuration is trained on all but each of them."""
    register: RegisterConfig = RegisterConfig()
    foreign: tuple[str, ...] = ()
    """Folders of images of other kinds: the model card says how well the model knows them for foreign."""
    compute: Compute = Compute()
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()

    def __post_init__(self) -> None:
        check_sweep(self.recipe, self.sweep, self.seeds, self.finals)
        check_range("inner_folds", self.inner_folds, 2)


def recipe() -> TuneAsl:
    """The defaults."""
    return TuneAsl()


def tune(config: TuneAsl) -> Path:
    """Encoders, search, finals, report, model; or a nested cross-validation of the search."""
    with open_job("tune_asl", config) as job, connected():
        if config.cv:
            return run_nested(job, config.sweep, CrossValidation.parse(config.cv), config.inner_folds, config.seeds[0])
        summary = run_sweep(job, config.sweep, config.seeds, config.finals, config.register, config.foreign)
    tell_next_steps(summary, config.register, config.run.storage, config.run.tracking)
    return summary


if __name__ == "__main__":
    main(recipe, tune)
