"""Compare two trained classifiers on images that neither has seen, case by case.

    python jobs/compare_models.py --models RUN/seed-2023/bundle OTHER/seed-2023/bundle --data.manifest scans.csv
    python jobs/compare_models.py --models models:/hsg@champion models:/hsg@candidate --data.manifest scans.csv

Each model decides at its own threshold; the difference is paired by patient. A manifest with a patient whom one of them
was trained on is refused; --data.on-problem skip leaves such patients out.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raymed.config import UserError, check_choice, replace
from raymed.registry.store import load_model
from raymed.results.compare import METRICS, report_comparison
from raymed.storage import local_folder
from raymed.tasks.external import LabelledData, data_of
from raymed.train.compute import Compute
from raymed.train.runs.job import RunConfig, main, open_job
from raymed.train.unit import load_data


@dataclass(frozen=True)
class CompareModels:
    """Two models and a data set."""

    recipe: Annotated[LabelledData, tyro.conf.arg(name="")] = LabelledData()
    models: tuple[str, ...] = ()
    """Two: bundles' folders, s3://BUCKET/FOLDER, or models:/NAME@ALIAS of the registry."""
    metric: str = "auroc"
    """By which one is better; to be chosen before the figures are seen."""
    allow_unknown_training_set: bool = False
    """Compare models too that do not say what they were trained on."""
    compute: Compute = Compute()
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)
        if self.models and (len(self.models) != 2 or len(set(self.models)) != 2):
            raise UserError(f"--models takes two different models, got {' '.join(self.models)}")


def recipe() -> CompareModels:
    """The defaults."""
    return CompareModels()


def compare(config: CompareModels) -> Path:
    """Score with both, subtract, report."""
    if not config.models:
        raise UserError("--models is needed: two bundles' folders, s3://BUCKET/FOLDER or models:/NAME@champion")
    bundles = [load_model(name, config.run.tracking, config.run.storage) for name in config.models]
    first, second = (data_of(bundle, config.recipe.data) for bundle in bundles)
    if first.positive != second.positive:
        raise UserError(f"the models find different things, {first.positive!r} and {second.positive!r}")
    with open_job("compare_models", replace(config, {"recipe.data": first})) as job:
        recipe = LabelledData(dataclasses.replace(second, manifest=job.recipe.data.manifest))
        sets = [job.data, load_data(recipe, local_folder(job.storage, "cache"))]
        models = dict(zip(config.models, zip(bundles, sets, strict=True), strict=True))
        return report_comparison(job, models, config.metric, config.allow_unknown_training_set)


if __name__ == "__main__":
    main(recipe, compare)
