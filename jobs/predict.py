"""Ask a trained classifier about new images: one row a case.

    python jobs/predict.py --model RUN/model --images DIR
    python jobs/predict.py --model models:/hsg-supcon-asl@champion --data.manifest new.csv --to predictions.csv
    python jobs/predict.py --model RUN/model --images DIR --workers 8

predictions.csv has score, decision, answer (positive, negative or, where a server would, abstain) and the reasons why
not to trust it for each case, predictions_images.csv what the network says of each image. Of a folder the names are
pseudonyms, which `jobs/whois.py` takes back. Started again, the same command answers what is missing. Large sets are
shared among workers of Ray, on this machine or on a cluster.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from raymed.command import command
from raymed.data.manifest import DataConfig
from raymed.results.predict import Device, asked_cases, load_origin, predict
from raymed.results.predict_cases import ImageFolder


@dataclass(frozen=True)
class Predict:
    """Which model, which images, where to."""

    folder: Annotated[ImageFolder, tyro.conf.arg(name="")] = ImageFolder()
    model: str = ""
    """A bundle's folder, s3://BUCKET/FOLDER, or models:/NAME@ALIAS or models:/NAME/VERSION of the registry."""
    data: DataConfig = DataConfig(manifest="")
    """A manifest, in place of a folder; it needs no labels."""
    to: Path = Path("predictions.csv")
    """The file of cases; that of images lies beside it."""
    workers: int = 1
    """1 = this process alone; more = workers of Ray."""
    device: Device = "auto"
    storage: str | None = None
    """Where raymed keeps things; None = $RAYMED_HOME, else ~/.raymed."""
    tracking: str | None = None
    """MLflow tracking URI; None = $MLFLOW_TRACKING_URI, else the sqlite store in the storage."""


def work(config: Predict) -> str:
    """Predict; returns what was done."""
    bundle, origin = load_origin(config.model, config.tracking, config.storage)
    asked = asked_cases(bundle, config.folder, config.data)
    origin = replace(origin, preprocessing=f"{origin.preprocessing} {asked.settings}".strip())
    done = predict(bundle, origin, asked.cases, config.to, workers=config.workers, device=config.device)
    return "\n".join([*asked.notes, done.text()])


if __name__ == "__main__":
    command(Predict, work)
