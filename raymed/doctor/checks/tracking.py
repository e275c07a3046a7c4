"""Whether MLflow takes a run, with a tag and a file, and deletes it."""

import uuid
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raymed.doctor.finding import Finding, failure, ok
from raymed.doctor.place import Place
from raymed.storage import storage_folder
from raymed.tracking import connect, without_credentials
from raymed.tracking.mlflow import DATABASES, artifacts_of, resolve_uri
from raymed.tracking.upload import Store

EXPERIMENT = "raymed-doctor"


def written(place: Place) -> Finding:
    """A run with a tag and a file is made, read and deleted in an experiment of its own."""
    storage = storage_folder(place.storage)  # which another check tries
    connect(None, storage)
    from mlflow.exceptions import MlflowException

    uri = resolve_uri(None, storage)
    store = Store(uri, artifacts_of(storage) if uri.startswith(DATABASES) else None)  # as jobs do
    client = store.client
    try:
        run = client.create_run(store.experiment_id(EXPERIMENT), tags={"raymed.doctor": (word := uuid.uuid4().hex)})
        try:
            found = client.get_run(run.info.run_id).data.tags.get("raymed.doctor")
            file = _kept(client, run, word)
        finally:
            client.delete_run(run.info.run_id)
    except MlflowException as error:
        return failure(f"MLflow at {without_credentials(uri)}: {error.message[:300]}", _remedy(error))
    if found != word:
        return failure(f"MLflow at {without_credentials(uri)} gives back other tags than it was given", "see its log")
    if file != word:
        return failure(f"MLflow at {without_credentials(uri)} gives back other files than it was given", "see its log")
    return ok(f"{without_credentials(uri)}: a run with a tag and a file written, read and deleted")


def _kept(client: Any, run: Any, word: str) -> str:
    """What comes back of a file that the run is given; it is removed."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client.log_text(run.info.run_id, word, "doctor.txt")
    with TemporaryDirectory() as folder:
        text = Path(client.download_artifacts(run.info.run_id, "doctor.txt", folder)).read_text()
    get_artifact_repository(run.info.artifact_uri, client.tracking_uri).delete_artifacts("doctor.txt")
    return text


def _remedy(error: Any) -> str:
    status = error.get_http_status_code()
    text = str(error)
    if status in (401, 403) or "401" in text or "authenticat" in text.lower():
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account that may write"
    return "see the server's log, and whether it reaches its database and its artifacts' storage"
