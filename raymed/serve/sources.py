"""Where the versions of a model come from: a bundle's folder (on disk or in a bucket), or MLflow's registry."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.registry.promote import CANDIDATE, INTENDED_USE, is_released
from raymed.registry.register import IDENTITY, identity
from raymed.registry.store import alias_of, fetch_bundle, registered_models, version_of
from raymed.serve.config import NAME, ServeConfig, Wanted
from raymed.serve.kept import kept_models
from raymed.serve.live import Origin
from raymed.serve.models import CHAMPION, Source, Unreachable
from raymed.storage import local_folder_copy, storage_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<number>\d+))?")
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Of MLflow's client, unless the environment says otherwise. Whoever asks again soon need not wait long."""


class Folder:
    """A bundle that lies somewhere; a new one in its place is seen by the hashes in its bundle.json."""

    name = ""

    def __init__(self, where: str):
        self.where = where

    def newest(self, alias: str) -> Origin | None:
        """The bundle that is there."""
        if alias != CHAMPION:
            return None
        folder = local_folder_copy(self.where)
        try:
            described = json.loads((folder / "bundle.json").read_text())
            research_only = described.get("contract", {}).get("research_only", True) is not False
            return Origin(self.where, "", identity(folder), described.get("intended_use", ""), research_only)
        except (OSError, ValueError, KeyError, AttributeError):
            raise UserError(f"{self.where} is no bundle: bundle.json is missing or damaged") from None

    def fetch(self, origin: Origin) -> Bundle:
        """Read it, every hash checked."""
        with _reaching():
            folder = local_folder_copy(self.where)
        return Bundle.load(folder)


class Registry:
    """A model of MLflow's registry: the version with an alias, or one by number; of neither, the champion and, until
    somebody makes one, the candidate."""

    def __init__(self, where: str, tracking: str | None, storage: Path):
        parts = _REGISTERED.fullmatch(where)
        if parts is None:
            names = "models:/NAME, models:/NAME@ALIAS or models:/NAME/VERSION"
            raise UserError(f"a registered model is named {names}, got {where}")
        self.where, self.name, self.tracking, self.storage = where, parts["name"], tracking, storage
        self.alias, self.number = parts["alias"], parts["number"]
        self._told = False

    def newest(self, alias: str) -> Origin | None:
        """What bears the alias. The champion of the server is the alias (or the version) that it was told to serve."""
        client = _connect(self.tracking, self.storage)
        if self.number:
            version = version_of(client, self.name, int(self.number)) if alias == CHAMPION else None
        elif alias == CHAMPION and not self.alias:
            version = alias_of(client, self.name, CHAMPION) or self._candidate(client)
        else:
            version = alias_of(client, self.name, self.alias if alias == CHAMPION else alias)
        if version is None:
            return None
        number, tags = str(version.version), version.tags
        where, digest, use = f"models:/{self.name}/{number}", tags.get(IDENTITY, ""), tags.get(INTENDED_USE, "")
        return Origin(where, number, digest, use, research_only=not is_released(version))

    def _candidate(self, client: "MlflowClient") -> "ModelVersion | None":
        """Answers where nobody is champion, which whoever starts the server is told."""
        version = alias_of(client, self.name, CANDIDATE)
        if version is not None and not self._told:
            print(f"{self.name}: no champion yet, the newest candidate answers, version {version.version}", flush=True)
            self._told = True
        return version

    def fetch(self, origin: Origin) -> Bundle:
        """Copy it from MLflow's artifacts and read it, every hash checked, and that it is what was registered."""
        with TemporaryDirectory(prefix="raymed-bundle-") as temporary:
            with _reaching():
                client = _connect(self.tracking, self.storage)
            folder = fetch_bundle(client, origin.where, Path(temporary))
            try:
                bundle = Bundle.load(folder)
            except UserError as error:  # named by what people know, and alike at every try
                raise UserError(str(error).replace(temporary, origin.where)) from None
            if origin.digest and identity(folder) != origin.digest:
                raise UserError(f"{origin.where} is not the bundle that was registered: its content has been changed")
        return bundle


@contextmanager
def _reaching() -> Iterator[None]:
    """What cannot be used in the block is the way to a bundle."""
    try:
        yield
    except UserError as error:
        raise Unreachable(str(error)) from error


def _connect(tracking: str | None, storage: Path) -> "MlflowClient":
    """A client that gives up soon. Raises UserError when the server does not answer."""
    from raymed.tracking import connect

    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    return connect(tracking, storage)


def registered(config: ServeConfig) -> ServeConfig:
    """The config, with every model of the registry where it names none: the champion or, until somebody makes one, the
    candidate. Where the registry cannot be asked, those that were served before. Raises UserError where there is
    nothing."""
    if config.models:
        return config
    try:
        found = _in_use(_connect(config.tracking, storage_folder(config.storage)))
    except Exception:  # whatever is wrong with the registry
        found = kept_models(config.storage)
        if not found:
            raise
    if not found:
        raise UserError("nothing is registered yet: train a model first (make demo), or name one, --models NAME=FOLDER")
    print("\n".join(f"found {_described(text)}" for text in found), flush=True)
    return replace(config, models=found)


def _in_use(client: "MlflowClient") -> tuple[str, ...]:
    """NAME=WHERE of every registered model that has a champion or a candidate."""
    found = []
    for model in registered_models(client):
        if not {CHAMPION, CANDIDATE} & set(model.aliases):
            continue
        if not set(model.name) & set("/@,"):
            found.append(f"{served_name(model.name)}=models:/{model.name}")
        else:  # of another program: here nobody could state where it lies
            print(f"the registered model {model.name!r} is NOT SERVED: a name without / @ , is expected", flush=True)
    return tuple(found)


def served_name(name: str) -> str:
    """What a registered model is called by those who ask for it: as it is registered, where that can stand in an
    address, else what can of it, at most 64 characters, with a hash of the whole.

    served_name("hsg v1") == "hsg-v1-5f86373d". The hash is there whether or not another model is called hsg-v1, so that
    no address depends on what else is registered.
    """
    if NAME.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    legal = "-".join(re.findall(r"[A-Za-z0-9_.]+", name)).lstrip("_.-")[: 64 - len(digest) - 1]
    return f"{legal}-{digest}" if legal else digest


def _described(text: str) -> str:
    """NAME=WHERE and, where the registry calls the model otherwise, what is to be asked for."""
    wanted = Wanted.parse(text)
    parts = _REGISTERED.fullmatch(wanted.where)
    if parts is None or parts["name"] == wanted.name:
        return text
    return f"{text} (the registered model {parts['name']!r} is asked for as {wanted.name})"


def source_of(wanted: Wanted, config: ServeConfig) -> Source:
    """By the form of where it lies. Raises UserError."""
    if wanted.where.startswith("models:/"):
        return Registry(wanted.where, config.tracking, storage_folder(config.storage))
    return Folder(wanted.where)
