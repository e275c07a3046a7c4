"""Evaluate a trained classifier on images it has not seen: an external test set.

    python jobs/evaluate_classifier.py --model RUN/model --data.manifest other_hospital/manifest.csv
    python jobs/evaluate_classifier.py --model models:/hsg-supcon-asl@champion --data.manifest s3://BUCKET/scans.csv

Threshold and calibration are the model's own and are not fitted again. Every row of the manifest is evaluated, whatever
its column split says; rows of patients whom the model was trained on are refused, or left out with --data.on-problem
skip. evaluation.html tells the figures by case and by image, calibration, net benefit, subgroups, readers, and shows
the errors where --data.deidentified says that the images may be shown.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raymed.config import check_range, replace
from raymed.registry.store import load_model
from raymed.results.evaluation import report_evaluation
from raymed.tasks.external import LabelledData, data_of
from raymed.train.compute import Compute
from raymed.train.runs.job import RunConfig, main, open_job


@dataclass(frozen=True)
class EvaluateClassifier:
    """A model and a data set."""

    recipe: Annotated[LabelledData, tyro.conf.arg(name="")] = LabelledData()
    model: str = ""
    """A bundle's folder, s3://BUCKET/FOLDER, or models:/NAME@ALIAS or models:/NAME/VERSION of the registry."""
    prevalences: tuple[float, ...] = ()
    """How frequent the positive class is where the model is to be used: predictive values are told for these."""
    compute: Compute = Compute()
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()

    def __post_init__(self) -> None:
        for prevalence in self.prevalences:
            check_range("prevalences", prevalence, 0, 1, low_open=True, high_open=True)


def recipe() -> EvaluateClassifier:
    """The defaults."""
    return EvaluateClassifier()


def evaluate(config: EvaluateClassifier) -> Path:
    """Score, compare with the reference standard, report."""
    bundle = load_model(config.model, config.run.tracking, config.run.storage)
    config = replace(config, {"recipe.data": data_of(bundle, config.recipe.data)})
    with open_job("evaluate_classifier", config) as job:
        return report_evaluation(job, config.model, bundle, config.prevalences)


if __name__ == "__main__":
    main(recipe, evaluate)
