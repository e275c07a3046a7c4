"""Compare ways to train on an imbalanced set: every loss there is, alone and after a contrastive phase.

    python jobs/compare_losses.py                                        # digital HSG phantoms
    python jobs/compare_losses.py --data.manifest pneumoniamnist.npz --data.positive normal
    python jobs/compare_losses.py --data.manifest scans.csv --data.positive occluded --cv 5x3 --seeds 2023   # few cases

The table of the HSG tubal-patency work: every method over the same seeds, and folds; the heads of a seed and fold share
its SupCon encoder. The best method is named on the validation split, and every figure is of the test split, or of
cases that were held out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raymed.losses import LOSSES
from raymed.results.folds import folds_of, report_folds
from raymed.tasks.classifier import SUPCON, ClassifierRecipe
from raymed.train.compute import Compute
from raymed.train.places.cluster import connected
from raymed.train.places.launch import announce, encoder_units, flat, head_unit, run_side_by_side, single_unit
from raymed.train.runs.job import RunConfig, main, open_job
from raymed.train.runs.results import report


@dataclass(frozen=True)
class CompareLosses:
    """Methods x seeds."""

    recipe: Annotated[ClassifierRecipe, tyro.conf.arg(name="")] = ClassifierRecipe()
    compared: tuple[str, ...] = tuple(dict.fromkeys(["ce", "focal", "asl", *LOSSES]))
    """Losses, each alone and after SupCon; the first alone is what all others are compared with."""
    seeds: tuple[int, ...] = (2023, 2024, 2025)
    """Trainings of each method that differ in their randomness only."""
    cv: str = ""
    """Cross-validation in place of the data's splits: FOLDSxREPEATS, such as 5x3; patients stay whole. All methods see
    the same folds."""
    compute: Compute = Compute()
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()


def recipe() -> CompareLosses:
    """Every loss, three seeds."""
    return CompareLosses()


def compare(config: CompareLosses) -> Path:
    """Train all methods side by side and report."""
    with open_job("compare_losses", config) as job, connected():
        folds = folds_of(config.cv)
        encoders = encoder_units(job, config.seeds, folds)
        single = {
            loss: [single_unit(job, loss, seed, fold) for seed in config.seeds for fold in folds]
            for loss in config.compared
        }
        heads = {
            SUPCON + loss: [head_unit(job, SUPCON + loss, encoder) for encoder in encoders] for loss in config.compared
        }
        waves = [[*encoders, *flat(single)], flat(heads)]
        announce(job, waves)
        run_side_by_side(job, waves)
        tell = report_folds if config.cv else report
        return tell(job, single | heads, baseline=config.compared[0])


if __name__ == "__main__":
    main(recipe, compare)
