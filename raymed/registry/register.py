"""A bundle becomes a version of a registered model in MLflow, once, and is the model's `candidate`.

The bundle is logged as a pyfunc model from code (`raymed.registry.pyfunc`) under the run that trained it, and that
logged model is registered. Everything goes through a client of its own, never through MLflow's global state, so that it
may happen in the driver process beside the tracker's thread: the two take turns at an sqlite store.

A bundle is recognised by a hash of its content. Registering it again, after a kill at any point, goes on where it was
left and gives the same version.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymed.bundle import RELEASE, Bundle
from raymed.config import to_json
from raymed.registry.audit import Audit
from raymed.registry.card import CARD, write_card
from raymed.registry.config import RegisterConfig, check_name, is_stated
from raymed.registry.gates import Examination
from raymed.registry.promote import (
    CANDIDATE,
    CHAMPION,
    FIGURES,
    MODEL_ID,
    ChampionChanged,
    description,
    nominate,
    promote,
)
from raymed.registry.schema import input_example, load_options, requirements, signature
from raymed.registry.store import BUNDLE, alias_of, find_run, lookup
from raymed.storage import is_remote, local_folder_copy
from raymed.tracking import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

IDENTITY = "raymed.bundle"
_CODE = Path(__file__).with_name("pyfunc.py")


@dataclass(frozen=True)
class Registered:
    """A version in MLflow's registry."""

    name: str
    version: int
    run_id: str
    is_champion: bool = False
    other_champion: int | None = None
    """The version that is champion instead."""

    @property
    def uri(self) -> str:
        """What MLflow loads."""
        return f"models:/{self.name}/{self.version}"


@contextmanager
def bundle_folder(location: str | Path) -> Iterator[Path]:
    """The folder of a bundle, to write its card into; of one in a bucket (s3://BUCKET/FOLDER) a copy, for as long as
    the block lasts. Raises UserError where there is nothing."""
    if not is_remote(location):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory(prefix="raymed-bundle-") as temporary:
        yield shutil.copytree(local_folder_copy(location), Path(temporary, "bundle"))


def register(
    folder: Path, config: RegisterConfig, name: str, *, tracking: str | None, storage: Path, run_id: str | None = None
) -> Registered | None:
    """Write a bundle's card and register it, at the end of a job; what MLflow does wrong costs a line, not the job.

    Args:
        folder: of the bundle. Its intended use becomes what the config states.
        name: of the registered model where the config has none (`default_name`).
        tracking, storage: as `Tracker` has them.
        run_id: MLflow's run that the model belongs to; None = the run whose key is in the bundle's provenance.

    Returns None when it is not registered: it is not asked for, or MLflow does not take it (a line says how to do it
    later).
    """
    name = config.name or name
    bundle = Bundle.load(folder)
    if config.is_stated and bundle.intended_use != config.intended_use:
        replace(bundle, intended_use=config.intended_use).save(folder)
    write_card(folder, name)
    if not config.register:
        return None
    try:
        return add(connect(tracking, storage), folder, name, run_id, Audit(storage))
    except Exception as error:  # whatever it is, the training is done and its bundle is on disk
        reason = re.sub(r"//[^/@]*@", "//", str(error))[:200]  # without user and password
        print(
            f"the model is not registered ({type(error).__name__}: {reason}). Later: "
            f"python jobs/promote_model.py --model '{name}' --bundle '{folder}' --to {CANDIDATE}"
        )
        return None


def add(
    client: "MlflowClient", folder: Path, name: str, run_id: str | None = None, audit: Audit | None = None
) -> Registered:
    """Log and register a bundle that has its card. The version becomes `candidate` unless a newer one is, and champion
    if its intended use is stated and nobody is champion yet; a champion is replaced by `jobs/promote_model.py` alone.
    Both are put on record; with a champion in use no server looks at a new candidate, and nothing is.

    Raises UserError for a bundle that is none or damaged, a name that MLflow cannot take, or a run that it does not
    know.
    """
    check_name(name)
    bundle = Bundle.load(folder)
    run = client.get_run(run_id) if run_id else find_run(client, bundle.provenance["run_key"])
    digest = identity(folder)
    version = _version(client, name, digest) or _create_version(client, name, folder, bundle, run, digest)
    number, champion = int(version.version), alias_of(client, name, CHAMPION)
    if _is_newest(client, version, CANDIDATE):
        nominate(client, version, why="registered", audit=audit if champion is None else None)
    if champion is None and is_stated(bundle.intended_use):
        why, nobody = "registered with its intended use stated", Examination((), None)
        with suppress(ChampionChanged):  # another job's model came first, and this one stays a candidate
            promote(client, version, bundle.intended_use, why=why, examined=nobody, audit=audit)
        champion = alias_of(client, name, CHAMPION)
    in_use = champion and int(champion.version)
    return Registered(name, number, run.info.run_id, in_use == number, in_use if in_use != number else None)


def identity(folder: Path) -> str:
    """sha256 of a bundle's content, hashes of its weights included; what people intend and release it for, and the
    state of the sources when its job was run to its end once more, are no part of it."""
    described = json.loads((folder / "bundle.json").read_text())
    described.pop("intended_use", None)
    for name in RELEASE:
        described.get("contract", {}).pop(name, None)
    described["provenance"].pop("git", None)
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _is_newest(client: "MlflowClient", version: "ModelVersion", alias: str) -> bool:
    """Whether an alias may move here: nobody has it, or an older version."""
    holder = alias_of(client, version.name, alias)
    return holder is None or int(holder.version) < int(version.version)


def _version(client: "MlflowClient", name: str, digest: str) -> "ModelVersion | None":
    found = client.search_model_versions(f"name = '{name}' and tags.`{IDENTITY}` = '{digest}'")
    return min(found, key=lambda version: int(version.version), default=None)


def _create_version(
    client: "MlflowClient", name: str, folder: Path, bundle: Bundle, run: "Run", digest: str
) -> "ModelVersion":
    model = _logged_model(client, folder, bundle, run, digest)
    if lookup(client, name) is None:
        client.create_registered_model(name)
    # An sqlite store looks a models:/ID up in MLflow's global store, which may be another one.
    is_server = client.tracking_uri.startswith("http")
    source = f"models:/{model.model_id}" if is_server else model.artifact_location
    tags = _tags(bundle) | {IDENTITY: digest, MODEL_ID: model.model_id}
    text = description((folder / CARD).read_text())
    return client.create_model_version(
        name, source, run.info.run_id, tags=tags, description=text, model_id=model.model_id
    )


def _tags(bundle: Bundle) -> dict[str, str]:
    """Where the version comes from, and what it reached."""
    known = {f"raymed.{key}": bundle.provenance.get(key) for key in ("git", "config_sha", "data", "run_key")}
    tags = {key: str(value) for key, value in known.items() if value is not None}
    return tags | {FIGURES: json.dumps(json.loads(to_json(_means(bundle.metrics))))}


def _means(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{split: {metric: value}}, without the intervals."""
    splits = {split: metrics[split] for split in ("val", "test") if split in metrics}
    return {
        split: {name: figure["mean"] if isinstance(figure, dict) else figure for name, figure in figures.items()}
        for split, figures in splits.items()
    }


def _logged_model(client: "MlflowClient", folder: Path, bundle: Bundle, run: "Run", digest: str) -> "LoggedModel":
    """The complete logged model of this bundle: the one that is there, or a new one."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    experiment, run_id = run.info.experiment_id, run.info.run_id
    found = client.search_logged_models([experiment], filter_string=f"tags.`{IDENTITY}` = '{digest}'")
    model = found[0] if found else client.create_logged_model(experiment, "model", run_id, tags={IDENTITY: digest})
    if model.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory() as temporary:
            client.log_model_artifacts(model.model_id, str(save_pyfunc(folder, bundle, Path(temporary), model, run_id)))
        known = client.get_run(run_id).outputs
        if known is None or model.model_id not in {output.model_id for output in known.model_outputs}:
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        model = client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model


def save_pyfunc(folder: Path, bundle: Bundle, into: Path, model: "LoggedModel", run_id: str) -> Path:
    """Write the MLflow model of a bundle into a folder and return its path."""
    import mlflow.pyfunc
    from mlflow.models import Model

    # Copies, under the names they have in the model: MLmodel keeps the paths that it is made from.
    copy, code = shutil.copytree(folder, into / BUNDLE.name), shutil.copy(_CODE, into)
    mlflow.pyfunc.save_model(
        into / "model",
        python_model=str(code),
        artifacts={BUNDLE.name: str(copy)},
        signature=signature(bundle),
        input_example=input_example(bundle),
        pip_requirements=requirements(bundle),
        model_config=load_options(bundle),
        mlflow_model=Model(model.artifact_location, run_id, model_uuid=model.model_id, model_id=model.model_id),
    )
    return into / "model"
