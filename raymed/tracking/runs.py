"""Reading an MLflow run back: its name, its tags and the text files among its artifacts."""

import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from raymed.tracking.mlflow import connect


@dataclass(frozen=True)
class FoundRun:
    """An MLflow run. files: artifact -> its text."""

    name: str
    tags: dict[str, str]
    files: dict[str, str]


def find_run(run_id: str, uri: str | None, storage: Path, files: Collection[str]) -> FoundRun | None:
    """The run with this id, or None; of the named files in its artifacts' root, those there are.

    Args:
        uri, storage: as for `Tracker`.

    Raises:
        UserError: the server does not answer.
    """
    if not re.fullmatch("[0-9a-f]{32}", run_id):
        return None
    client = connect(uri, storage)
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    there = {entry.path for entry in client.list_artifacts(run_id)} & set(files)
    with tempfile.TemporaryDirectory(prefix="raymed-run-") as folder:
        texts = {name: Path(client.download_artifacts(run_id, name, folder)).read_text() for name in sorted(there)}
    return FoundRun(str(run.info.run_name), dict(run.data.tags), texts)
