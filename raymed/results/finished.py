"""Runs that have ended, as their folders tell them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from raymed.config import UserError
from raymed.storage import Mirror, storage_folder
from raymed.tracking.outbox import Outbox
from raymed.train.runs.record import Record, from_folder, images


@dataclass(frozen=True)
class FinishedRun:
    """A finished run in its folder."""

    folder: Path
    record: Record
    summary: dict[str, Any]
    key: str
    """Names the run for ever."""

    @property
    def images(self) -> pd.DataFrame:
        """One row an image: row of the manifest, content, label, split, patient (a number)."""
        return images(self.record.data)

    @property
    def data_config(self) -> dict[str, Any]:
        """`DataConfig` as plain data."""
        return self.record.config["recipe"]["data"]


def find_run(run: str, storage: str | None = None) -> FinishedRun:
    """A run by its folder, or by its name in the storage. Raises UserError where there is none, or it has not ended."""
    folder = Path(run).expanduser()
    if not (folder / "summary.json").is_file():
        folder = storage_folder(storage) / "runs" / run
        if mirror := Mirror.of(folder):
            mirror.pull()
    if not (folder / "summary.json").is_file():
        raise UserError(
            f"there is no finished run {run!r}: expected a folder with summary.json, or the name of a run in "
            f"{storage_folder(storage) / 'runs'}"
        )
    key = next(record["key"] for record in Outbox(folder / "tracking.jsonl").records() if record["op"] == "open")
    return FinishedRun(folder, from_folder(folder), json.loads((folder / "summary.json").read_text()), key)
