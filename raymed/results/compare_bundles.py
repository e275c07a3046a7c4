"""Two bundles on one data set: the run of `jobs/compare_models.py`, and of a promotion that compares
(`raymed.results.gates`)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raymed.bundle import Bundle
from raymed.config import UserError, check_choice, replace
from raymed.results.compare import METRICS, report_comparison
from raymed.storage import local_folder
from raymed.tasks.external import LabelledData, data_of
from raymed.train.compute import Compute
from raymed.train.runs.job import RunConfig, open_job
from raymed.train.unit import load_data


@dataclass(frozen=True)
class Comparison:
    """Two models and a data set."""

    recipe: LabelledData = LabelledData()
    models: tuple[str, ...] = ()
    """Two: bundles' folders, s3://BUCKET/FOLDER, or models:/NAME@ALIAS of the registry."""
    metric: str = "auroc"
    """By which one is better; to be chosen before the figures are seen."""
    allow_unknown_training_set: bool = False
    """Compare models too that do not say what they were trained on."""
    compute: Compute = Compute()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)
        if self.models and (len(self.models) != 2 or len(set(self.models)) != 2):
            raise UserError(f"--models takes two different models, got {' '.join(self.models)}")


def compare_bundles(config: Comparison, bundles: Sequence[Bundle]) -> Path:
    """Score with both, each of which reads the images as it was trained to, subtract and report; returns the path of
    the summary.

    bundles: of config.models, in their order. Raises UserError as `report_comparison`, and for models that find
    different things.
    """
    first, second = (data_of(bundle, config.recipe.data) for bundle in bundles)
    if first.positive != second.positive:
        raise UserError(f"the models find different things, {first.positive!r} and {second.positive!r}")
    with open_job("compare_models", replace(config, {"recipe.data": first})) as job:
        other = LabelledData(dataclasses.replace(second, manifest=job.recipe.data.manifest))
        sets = [job.data, load_data(other, local_folder(job.storage, "cache"))]
        models = dict(zip(config.models, zip(bundles, sets, strict=True), strict=True))
        return report_comparison(job, models, config.metric, config.allow_unknown_training_set)
