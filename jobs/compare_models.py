"""Compare two trained classifiers on images that neither has seen, case by case.

    python jobs/compare_models.py --models RUN/model OTHER/model --data.manifest scans.csv
    python jobs/compare_models.py --models models:/hsg@champion models:/hsg@candidate --data.manifest scans.csv

Each model decides at its own threshold; the difference is paired by patient. A manifest with a patient whom one of them
was trained on is refused; --data.on-problem skip leaves such patients out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raymed.config import UserError
from raymed.registry.store import load_model
from raymed.results.compare_bundles import Comparison, compare_bundles
from raymed.tasks.external import LabelledData
from raymed.train.runs.job import RunConfig, main


@dataclass(frozen=True)
class CompareModels(Comparison):
    """Two models and a data set, with shorter flags."""

    recipe: Annotated[LabelledData, tyro.conf.arg(name="")] = LabelledData()
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()


def recipe() -> CompareModels:
    """The defaults."""
    return CompareModels()


def compare(config: CompareModels) -> Path:
    """Load both, score, subtract, report."""
    if not config.models:
        raise UserError("--models is needed: two bundles' folders, s3://BUCKET/FOLDER or models:/NAME@champion")
    bundles = [load_model(name, config.run.tracking, config.run.storage) for name in config.models]
    return compare_bundles(config, bundles)


if __name__ == "__main__":
    main(recipe, compare)
