"""What is asked of MLflow's registry."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.storage import resolve_storage
from raymed.tracking.upload import RUN_KEY

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

BUNDLE = Path("artifacts", "bundle")  # in a logged model
_URI = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")


def find_run(client: "MlflowClient", key: str) -> "Run":
    """The run with this key, the oldest of several. Raises UserError when MLflow has none."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    where, order = f"tags.`{RUN_KEY}` = '{key}'", ["attributes.start_time ASC"]
    runs = client.search_runs(experiments, where, max_results=1, order_by=order)
    if not runs:
        raise UserError(f"MLflow has no run {key}: name its store with --tracking, or start its job again to upload it")
    return runs[0]


def lookup(client: "MlflowClient", name: str) -> "RegisteredModel | None":
    """A registered model, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def registered_models(client: "MlflowClient") -> "Iterator[RegisteredModel]":
    """All of them; MLflow gives them page by page."""
    page = client.search_registered_models()
    yield from page
    while page.token:
        page = client.search_registered_models(page_token=page.token)
        yield from page


def alias_of(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    """The version that bears an alias, or None. Raises UserError for an unknown model."""
    version = _model(client, name).aliases.get(alias)
    return None if version is None else client.get_model_version(name, version)


def versions_of(client: "MlflowClient", name: str) -> "Sequence[ModelVersion]":
    """All versions of a model."""
    if "'" not in name:
        return client.search_model_versions(f"name = '{name}'")
    like = name.replace("'", "_")  # any character: MLflow knows no way to write that one in every name
    return [version for version in client.search_model_versions(f"name LIKE '{like}'") if version.name == name]


def version_of(client: "MlflowClient", name: str, version: int) -> "ModelVersion":
    """A version by number. Raises UserError for an unknown model or version."""
    _model(client, name)
    found = {int(v.version): v for v in versions_of(client, name)}
    if version not in found:
        raise UserError(f"{name} has no version {version}: it has {', '.join(map(str, sorted(found))) or 'none'}")
    return found[version]


def fetch_bundle(client: "MlflowClient", uri: str, into: Path) -> Path:
    """Copy the bundle of a registered model into a folder; returns its path.

    uri: models:/NAME@ALIAS or models:/NAME/VERSION. Raises UserError for another form, and for an unknown model,
    version or alias.
    """
    from mlflow.artifacts import download_artifacts

    parts = _URI.fullmatch(uri)
    if parts is None:
        raise UserError(f"a registered model is named models:/NAME@ALIAS or models:/NAME/VERSION, got {uri}")
    name, alias, number = parts.groups()
    version = alias_of(client, name, alias) if alias else version_of(client, name, int(number))
    if version is None:
        raise UserError(f"{name} has no version with the alias {alias}")
    source = f"{client.get_model_version_download_uri(name, version.version).rstrip('/')}/{BUNDLE}"
    into.mkdir(parents=True, exist_ok=True)
    return Path(download_artifacts(artifact_uri=source, dst_path=str(into), tracking_uri=client.tracking_uri))


def load_model(model: str, tracking: str | None, storage: str | None) -> Bundle:
    """The bundle in a folder, at s3://BUCKET/FOLDER, or of a registered model (see `fetch_bundle`).

    tracking, storage: as `Tracker` and `resolve_storage` have them. Raises UserError where there is none.
    """
    from raymed.tracking import connect

    if not model:
        raise UserError("--model is needed: a bundle's folder, s3://BUCKET/FOLDER, or models:/NAME@champion")
    if not model.startswith("models:/"):
        return Bundle.load(model)
    with TemporaryDirectory(prefix="raymed-bundle-") as folder:
        return Bundle.load(fetch_bundle(connect(tracking, resolve_storage(storage)), model, Path(folder)))


def _model(client: "MlflowClient", name: str) -> "RegisteredModel":
    model = lookup(client, name)
    if model is None:
        names = ", ".join(model.name for model in registered_models(client))
        raise UserError(f"there is no registered model {name!r}: there are {names or 'none at all'}")
    return model
