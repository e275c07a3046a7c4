"""Which version of a registered model is in use, and the record of how that came about.

    candidate    the newest version that a job registered
    champion     the version in use; only one whose intended use somebody has stated
    challenger   the version that answers a share of the patients, where a server was told so
    rollback     the champion before this one

Every change of the champion is a tag of the version that became it, `raymed.promotion.N`, which nothing here ever
changes or removes, and the whole history of the model is written as `promotions.jsonl` among the artifacts of that
version's run. Where a log of decisions is kept (`raymed.registry.audit`), nothing is done before it stands there
(`raymed.registry.decisions`). What broke off half-way is completed by deciding the same again.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymed.bundle import NOT_STATED
from raymed.config import UserError, to_json
from raymed.registry.audit import Audit
from raymed.registry.card import CARD, write_card
from raymed.registry.config import is_stated
from raymed.registry.decisions import INTENDED_USE, held, on_record, put_on_record
from raymed.registry.gates import Gate
from raymed.registry.store import BUNDLE, alias_of, fetch_bundle

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION, CHALLENGER, ROLLBACK = "candidate", "champion", "challenger", "rollback"
PROMOTION, FIGURES, MODEL_ID = "raymed.promotion.", "raymed.figures", "raymed.model_id"  # tags of a version


def promote(
    client: "MlflowClient",
    version: "ModelVersion",
    intended_use: str,
    *,
    by: str = NOT_STATED,
    why: str = NOT_STATED,
    gates: Sequence[Gate] = (),
    audit: Audit | None = None,
) -> dict[str, Any]:
    """Make a version the champion and the champion so far the rollback; the card says what the model is for. A
    challenger that wins is no challenger any more.

    gates: what it was held to, for the record. Returns the record. Raises UserError when nobody says, and nobody has
    said, what the model is for.
    """
    intended_use = stated_use(version, intended_use)
    before = alias_of(client, version.name, CHAMPION)
    record = _described("promote", version, before, version, by, why, gates) | {"intended_use": intended_use}
    with on_record(client, audit, version, record) as line:
        _state_use(client, version, intended_use)
        if before is not None and int(before.version) != int(version.version):
            client.set_registered_model_alias(version.name, ROLLBACK, before.version)
        client.set_registered_model_alias(version.name, CHAMPION, version.version)
        challenger = alias_of(client, version.name, CHALLENGER)
        if challenger is not None and int(challenger.version) == int(version.version):
            client.delete_registered_model_alias(version.name, CHALLENGER)
        return _record(client, version, record | line)


def roll_back(
    client: "MlflowClient", name: str, *, by: str = NOT_STATED, why: str = NOT_STATED, audit: Audit | None = None
) -> dict[str, Any]:
    """Make the rollback the champion again; the withdrawn version keeps no alias of these two. Returns the record.

    It is held to nothing: it was champion. Raises UserError when there is no rollback.
    """
    before, version = alias_of(client, name, CHAMPION), alias_of(client, name, ROLLBACK)
    if version is None:
        raise UserError(f"{name} has no version with the alias {ROLLBACK}: there is nothing to go back to")
    use = version.tags.get(INTENDED_USE, NOT_STATED)
    record = _described("roll back", version, before, version, by, why) | {"intended_use": use}
    with on_record(client, audit, version, record) as line:
        client.set_registered_model_alias(name, CHAMPION, version.version)
        written = _record(client, version, record | line)
        client.delete_registered_model_alias(name, ROLLBACK)  # last: until then the same can be decided again
        return written


def challenge(
    client: "MlflowClient",
    version: "ModelVersion",
    intended_use: str,
    *,
    by: str = NOT_STATED,
    why: str = NOT_STATED,
    gates: Sequence[Gate] = (),
    audit: Audit | None = None,
) -> None:
    """Let a version answer the share of patients that servers were told. It answers people: raises UserError when
    nobody says, and nobody has said, what it is for."""
    intended_use = stated_use(version, intended_use)
    before = alias_of(client, version.name, CHALLENGER)
    record = _described("challenge", version, before, version, by, why, gates) | {"intended_use": intended_use}
    with on_record(client, audit, version, record):
        _state_use(client, version, intended_use)
        client.set_registered_model_alias(version.name, CHALLENGER, version.version)


def withdraw(
    client: "MlflowClient", name: str, *, by: str = NOT_STATED, why: str = NOT_STATED, audit: Audit | None = None
) -> int:
    """Let the champion answer everybody; returns the version that was challenger. Raises UserError when none is."""
    before = alias_of(client, name, CHALLENGER)
    if before is None:
        raise UserError(f"{name} has no version with the alias {CHALLENGER}: the champion answers everybody")
    with on_record(client, audit, before, _described("withdraw", before, before, None, by, why)):
        client.delete_registered_model_alias(name, CHALLENGER)
    return int(before.version)


def refuse(
    client: "MlflowClient", version: "ModelVersion", gates: Sequence[Gate], *, by: str, why: str, audit: Audit
) -> None:
    """Put on record that a version was not promoted, and raise UserError that says why."""
    before = alias_of(client, version.name, CHAMPION)
    put_on_record(client, audit, **_described("refuse", version, before, version, by, why, gates))
    why_not = "\n".join(f"    {gate}" for gate in gates)
    raise UserError(
        f"{version.name} version {version.version} does not become champion:\n{why_not}\nTake the responsibility with "
        '--force --why "...", which is recorded'
    )


def anchors(client: "MlflowClient") -> dict[str, str]:
    """sha256 of lines of the log -> what names them in MLflow: the tags of every model, and records of promotions."""
    found: dict[str, str] = {}
    for model in client.search_registered_models(max_results=1000):
        records = [record for record in promotions(client, model.name) if record.get("audit")]
        found |= {record["audit"]: f"promotion {record['number']} of {model.name}" for record in records} | held(model)
    return found


def promotions(client: "MlflowClient", name: str) -> list[dict[str, Any]]:
    """All records of a model, the oldest first."""
    versions = client.search_model_versions(f"name = '{name}'")
    tags = [tag for version in versions for tag in version.tags.items() if tag[0].startswith(PROMOTION)]
    return [json.loads(value) for _, value in sorted(tags)]


def stated_use(version: "ModelVersion", intended_use: str) -> str:
    """What somebody says, or has said, the version is for. Raises UserError where nobody has."""
    intended_use = intended_use if is_stated(intended_use) else version.tags.get(INTENDED_USE, NOT_STATED)
    if not is_stated(intended_use):
        raise UserError(
            "a champion needs an intended use: say on whom, by whom and for which decision the model is meant to be "
            'used, with --intended-use "..."'
        )
    return intended_use


def description(card: str) -> str:
    """What a version's page shows of the card: the head, since MLflow's databases take 5000 characters."""
    head = re.split(r"\n## (?:Foreign images|Data)\n", card)[0][:4900]
    return f"{head}\n\nThe whole card: {BUNDLE}/{CARD} in the model's artifacts."


def _described(
    action: str,
    of: "ModelVersion",
    before: "ModelVersion | None",
    after: "ModelVersion | None",
    by: str,
    why: str,
    gates: Sequence[Gate] = (),
) -> dict[str, Any]:
    """A decision as it is recorded."""
    described: dict[str, Any] = {
        "action": action,
        "model": of.name,
        "from_version": before and int(before.version),
        "to_version": after and int(after.version),
        "by": by,
        "why": why,
        "figures": {"from": before and _figures(before), "to": after and _figures(after)},
    }
    if gates:
        failed = any(gate.passed is False for gate in gates)
        described |= {"gates": [asdict(gate) for gate in gates], "forced": failed and action != "refuse"}
    return described


def _record(client: "MlflowClient", version: "ModelVersion", record: dict[str, Any]) -> dict[str, Any]:
    """Write the record of a change that is done."""
    history = promotions(client, version.name)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"number": len(history) + 1, "time": now} | json.loads(to_json(record))
    tag = f"{PROMOTION}{record['number']:04d}"
    client.set_model_version_tag(version.name, version.version, tag, json.dumps(record))
    if version.run_id:
        lines = "".join(json.dumps(entry) + "\n" for entry in [*history, record])
        client.log_text(version.run_id, lines, f"registry/{version.name}/promotions.jsonl")
    return record


def _figures(version: "ModelVersion") -> dict[str, Any]:
    return json.loads(version.tags.get(FIGURES, "{}"))


def _state_use(client: "MlflowClient", version: "ModelVersion", intended_use: str) -> None:
    """Write the intended use into the registered bundle, its card and the version. Its weights are not written again,
    and its description keeps the form that it was registered in."""
    if version.tags.get(INTENDED_USE) == intended_use:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = fetch_bundle(client, f"models:/{version.name}/{version.version}", Path(temporary, "old"))
        described = json.loads((folder / "bundle.json").read_text())
        (folder / "bundle.json").write_text(to_json(described | {"intended_use": intended_use}))
        write_card(folder, version.name)
        new = Path(temporary, "new")
        shutil.copytree(folder, new / BUNDLE, ignore=shutil.ignore_patterns("*.safetensors"))
        client.log_model_artifacts(version.tags[MODEL_ID], str(new))
        text = description((folder / CARD).read_text())
        client.update_model_version(version.name, version.version, text)
    client.set_model_version_tag(version.name, version.version, INTENDED_USE, intended_use)
