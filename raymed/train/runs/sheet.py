"""The data sheet of a run: what the network will see, written before the first training.

It lies in the run's folder; with `--preview` beside the runs, since then there is none. It shows images, and goes to no
tracker.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from raymed.data.dataset import DataSet
from raymed.data.locations import as_location, below, ending, folder_of, near
from raymed.data.manifest import DataConfig, read_table
from raymed.storage import exists

if TYPE_CHECKING:
    from raymed.train.runs.job import Job

SHEET = "data_sheet.html"
_IMPORT = "import.json"


def write_sheet(job: "Job") -> Path | None:
    """Write the data sheet, once; returns its path, or None for data without classes and recipes without images."""
    augment = getattr(job.recipe, "augment", None)
    if augment is None or not job.data.positive:
        return None
    folder = job.storage / "data_sheets" / job.name if job.config.run.preview else job.folder
    path = folder / SHEET
    if job.config.run.preview or not path.is_file():
        from raymed.report.data_sheet import data_sheet

        folder.mkdir(parents=True, exist_ok=True)
        data_sheet(job.data, augment, attributes(job.data, job.recipe.data), _flow(job.recipe.data), path)
    return path


def attributes(data: DataSet, config: DataConfig) -> pd.DataFrame:
    """The manifest's columns, one row an image of the data set; those that it holds, where the manifest is no table."""
    place = as_location(config.manifest)
    if ending(place) in (".csv", ".tsv", ".parquet"):
        return read_table(place).iloc[data.rows - 1].reset_index(drop=True)
    known: dict[str, Any] = {**data.groups, "view": data.views, "side": data.sides}
    return pd.DataFrame({name: values for name, values in known.items() if values is not None}, index=range(len(data)))


def _flow(config: DataConfig) -> list[tuple[str, int]] | None:
    """What was left out on the way to the manifest, where an import wrote it down."""
    record = below(folder_of(as_location(config.manifest)), _IMPORT)
    if not exists(record):
        return None
    return [(text, int(count)) for text, count in json.loads(near(record).read_text())["flow"]]
