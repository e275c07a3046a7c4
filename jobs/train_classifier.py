"""Train a classifier of an imbalanced set of images: one method, one seed or several.

python jobs/train_classifier.py                                      # digital HSG phantoms
python jobs/train_classifier.py --data.manifest scans.csv --data.positive occluded --method asl
python jobs/train_classifier.py --data.manifest scans.csv --data.positive occluded --preview   # the data, as a page
python jobs/train_classifier.py --data.manifest scans.csv --data.positive occluded --cv 5x3    # few cases
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raymed.config import to_dict
from raymed.registry.config import RegisterConfig
from raymed.registry.next_steps import tell_next_steps
from raymed.results.folds import folds_of, report_folds
from raymed.results.trained import leave_evaluated
from raymed.tasks.classifier import ClassifierRecipe
from raymed.train.compute import Compute
from raymed.train.places.launch import run_one_by_one, unit_of
from raymed.train.runs.job import RunConfig, main, open_job
from raymed.train.runs.results import report


@dataclass(frozen=True)
class TrainClassifier:
    """One method over some seeds."""

    recipe: Annotated[ClassifierRecipe, tyro.conf.arg(name="")] = ClassifierRecipe()
    seeds: tuple[int, ...] = (2023,)
    """Trainings that differ in their randomness only."""
    cv: str = ""
    """Cross-validation in place of the data's splits: FOLDSxREPEATS, such as 5x3; patients stay whole. Every case is
    scored by networks that have not seen it."""
    register: RegisterConfig = RegisterConfig()
    compute: Compute = Compute()
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()


def recipe() -> TrainClassifier:
    """The defaults."""
    return TrainClassifier()


def train(config: TrainClassifier) -> Path:
    """Train each seed and report."""
    with open_job("train_classifier", config) as job:
        units = [unit_of(job, "", seed, fold) for seed in config.seeds for fold in folds_of(config.cv)]
        methods = {config.recipe.method: units}
        run_one_by_one(job, units)
        if config.cv:
            return report_folds(job, methods)
        left, registered = leave_evaluated(job, units, config.register)
        summary = report(job, methods, pages=left, registered=registered and to_dict(registered))
    tell_next_steps(summary, config.register, config.run.storage, config.run.tracking)
    return summary


if __name__ == "__main__":
    main(recipe, train)
