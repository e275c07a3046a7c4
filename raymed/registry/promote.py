"""Which version of a registered model is in use, and the record of how that came about.

    candidate   the newest version that a job registered
    champion    the version in use; only one whose intended use somebody has stated
    rollback    the champion before this one

Every change is a tag of the version that became champion, `raymed.promotion.N`, which nothing here ever changes or
removes, and the whole history of the model is written as `promotions.jsonl` among the artifacts of that version's run.
"""

import json
import re
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymed.bundle import NOT_STATED, Bundle
from raymed.config import UserError
from raymed.registry.card import CARD, write_card
from raymed.registry.config import is_stated
from raymed.registry.store import BUNDLE, alias_of, fetch_bundle

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION, ROLLBACK = "candidate", "champion", "rollback"
PROMOTION, INTENDED_USE = "raymed.promotion.", "raymed.intended_use"  # tags of a version
FIGURES, MODEL_ID = "raymed.figures", "raymed.model_id"


def promote(
    client: "MlflowClient", version: "ModelVersion", intended_use: str, *, by: str = NOT_STATED, why: str = NOT_STATED
) -> dict[str, Any]:
    """Make a version the champion and the champion so far the rollback; the card says what the model is for.

    Returns the record. Raises UserError when nobody says, and nobody has said, what the model is for.
    """
    intended_use = intended_use if is_stated(intended_use) else version.tags.get(INTENDED_USE, NOT_STATED)
    if not is_stated(intended_use):
        raise UserError(
            "a champion needs an intended use: say on whom, by whom and for which decision the model is meant to be "
            'used, with --intended-use "..."'
        )
    before = alias_of(client, version.name, CHAMPION)
    _state_use(client, version, intended_use)
    if before is not None and int(before.version) != int(version.version):
        client.set_registered_model_alias(version.name, ROLLBACK, before.version)
    client.set_registered_model_alias(version.name, CHAMPION, version.version)
    return _record(client, "promote", before, version, intended_use, by, why)


def roll_back(client: "MlflowClient", name: str, *, by: str = NOT_STATED, why: str = NOT_STATED) -> dict[str, Any]:
    """Make the rollback the champion again; the withdrawn version keeps no alias of these two. Returns the record.

    Raises UserError when there is no rollback.
    """
    before, version = alias_of(client, name, CHAMPION), alias_of(client, name, ROLLBACK)
    if version is None:
        raise UserError(f"{name} has no version with the alias {ROLLBACK}: there is nothing to go back to")
    client.set_registered_model_alias(name, CHAMPION, version.version)
    client.delete_registered_model_alias(name, ROLLBACK)
    return _record(client, "roll back", before, version, version.tags.get(INTENDED_USE, NOT_STATED), by, why)


def promotions(client: "MlflowClient", name: str) -> list[dict[str, Any]]:
    """All records of a model, the oldest first."""
    versions = client.search_model_versions(f"name = '{name}'")
    tags = [tag for version in versions for tag in version.tags.items() if tag[0].startswith(PROMOTION)]
    return [json.loads(value) for _, value in sorted(tags)]


def description(card: str) -> str:
    """What a version's page shows of the card: the head, since MLflow's databases take 5000 characters."""
    head = re.split(r"\n## (?:Foreign images|Data)\n", card)[0][:4900]
    return f"{head}\n\nThe whole card: {BUNDLE}/{CARD} in the model's artifacts."


def _record(
    client: "MlflowClient",
    action: str,
    before: "ModelVersion | None",
    version: "ModelVersion",
    intended_use: str,
    by: str,
    why: str,
) -> dict[str, Any]:
    """Write the record of a change that is done."""
    history = promotions(client, version.name)
    record = {
        "number": len(history) + 1,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "action": action,
        "model": version.name,
        "from_version": before and int(before.version),
        "to_version": int(version.version),
        "by": by,
        "why": why,
        "intended_use": intended_use,
        "figures": {"from": before and _figures(before), "to": _figures(version)},
    }
    tag = f"{PROMOTION}{record['number']:04d}"
    client.set_model_version_tag(version.name, version.version, tag, json.dumps(record))
    if version.run_id:
        lines = "".join(json.dumps(entry) + "\n" for entry in [*history, record])
        client.log_text(version.run_id, lines, f"registry/{version.name}/promotions.jsonl")
    return record


def _figures(version: "ModelVersion") -> dict[str, Any]:
    return json.loads(version.tags.get(FIGURES, "{}"))


def _state_use(client: "MlflowClient", version: "ModelVersion", intended_use: str) -> None:
    """Write the intended use into the registered bundle, its card and the version."""
    with tempfile.TemporaryDirectory() as temporary:
        bundle = Bundle.load(fetch_bundle(client, f"models:/{version.name}/{version.version}", Path(temporary, "old")))
        folder = replace(bundle, intended_use=intended_use).save(Path(temporary, "new", *BUNDLE.parts))
        write_card(folder, version.name)
        client.log_model_artifacts(version.tags[MODEL_ID], str(Path(temporary, "new")))
        text = description((folder / CARD).read_text())
        client.update_model_version(version.name, version.version, text)
    client.set_model_version_tag(version.name, version.version, INTENDED_USE, intended_use)
