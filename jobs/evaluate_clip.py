"""Evaluate a trained CLIP on images and captions, and export an index of their embeddings.

    python jobs/evaluate_clip.py --model RUN/model --data.manifest scans.csv --data.caption report
    python jobs/evaluate_clip.py --model models:/scans-dhn-nce@champion --data.manifest s3://BUCKET/scans.csv

The whole report of `train_clip.py` for a bundle (a folder, s3://BUCKET/FOLDER, or a registered model), on data of your
own: retrieval, zero-shot findings, linear probe, calibration of similarity. index.parquet holds the embeddings of the
test split, for search.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raymed.config import from_dict, replace
from raymed.data.preprocess import Preprocess
from raymed.registry.store import load_model
from raymed.results.clip import report_bundle
from raymed.tasks.clip import CaptionedData
from raymed.tasks.prompts import Prompts
from raymed.train.compute import Compute
from raymed.train.runs.job import RunConfig, main, open_job


@dataclass(frozen=True)
class EvaluateClip:
    """A model and a data set."""

    recipe: Annotated[CaptionedData, tyro.conf.arg(name="")] = CaptionedData()
    model: str = ""
    """A bundle's folder, s3://BUCKET/FOLDER, or models:/NAME@ALIAS or models:/NAME/VERSION of the registry."""
    prompts: Prompts = Prompts()
    compute: Compute = Compute()
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()


def recipe() -> EvaluateClip:
    """The defaults."""
    return EvaluateClip()


def evaluate(config: EvaluateClip) -> Path:
    """Embed, compare, report."""
    bundle = load_model(config.model, config.run.tracking, config.run.storage)
    config = replace(config, {"recipe.data.preprocess": from_dict(Preprocess, bundle.preprocess)})
    with open_job("evaluate_clip", config) as job:
        return report_bundle(job, bundle, config.prompts)


if __name__ == "__main__":
    main(recipe, evaluate)
