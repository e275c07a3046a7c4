"""Which version of a registered model is in use, and the record of how that came about.

    candidate    the newest version that a job registered
    champion     the version in use; only one whose intended use somebody has stated
    challenger   the version that answers a share of the patients, where a server was told so
    rollback     the champion before this one

Whatever bears which alias, a version is for research only until somebody releases it for the use that is stated.

Every change of the champion is a tag of the version that became it, `raymed.promotion.N`, which nothing here ever
changes or removes, and the whole history of the model is written as `promotions.jsonl` among the artifacts of that
version's run. From looking at the aliases to moving them one storage decides alone; another storage, or a person at
MLflow, may move them in between. Where a log of decisions is kept (`raymed.registry.audit`), nothing is done before it
stands there (`raymed.registry.decisions`). What broke off half-way is completed by deciding the same again.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymed.bundle import NOT_STATED, RELEASE
from raymed.config import UserError, to_json
from raymed.registry.audit import Anchor, Audit
from raymed.registry.card import CARD, write_card
from raymed.registry.config import is_stated
from raymed.registry.decisions import INTENDED_USE, RELEASED, alone, held, on_record, put_on_record, rest
from raymed.registry.gates import Examination, is_passed
from raymed.registry.store import BUNDLE, alias_of, fetch_bundle, registered_models, version_of, versions_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE, CHAMPION, CHALLENGER, ROLLBACK = "candidate", "champion", "challenger", "rollback"
PROMOTION, FIGURES, MODEL_ID = "raymed.promotion.", "raymed.figures", "raymed.model_id"  # tags of a version


class ChampionChanged(UserError):
    """Another version has become champion since the examination that a decision goes by."""


def promote(
    client: "MlflowClient",
    version: "ModelVersion",
    intended_use: str,
    *,
    by: str = NOT_STATED,
    why: str = NOT_STATED,
    examined: Examination | None = None,
    audit: Audit | None = None,
) -> dict[str, Any]:
    """Make a version the champion and the champion so far the rollback; the card says what the model is for. A
    challenger that wins is no challenger any more.

    examined: what it was held to, for the record, and the champion that this was about; None = held to nothing, and
    whichever version is champion is replaced. Returns the record. Raises UserError when nobody says, and nobody has
    said, what the model is for, and ChampionChanged.
    """
    intended_use = stated_use(version, intended_use)
    with _with_use(client, version, intended_use) as made, alone(audit):
        before = _champion(client, version.name, examined)
        record = _described("promote", version, before, version, by, why, examined) | {"intended_use": intended_use}
        with on_record(client, audit, version, record) as line:
            _write_use(client, version, intended_use, made)
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
    with alone(audit):
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
    examined: Examination | None = None,
    audit: Audit | None = None,
) -> None:
    """Let a version answer the share of patients that servers were told. It answers people: raises UserError as
    `promote`."""
    intended_use = stated_use(version, intended_use)
    with _with_use(client, version, intended_use) as made, alone(audit):
        _champion(client, version.name, examined)
        before = alias_of(client, version.name, CHALLENGER)
        record = _described("challenge", version, before, version, by, why, examined) | {"intended_use": intended_use}
        with on_record(client, audit, version, record):
            _write_use(client, version, intended_use, made)
            client.set_registered_model_alias(version.name, CHALLENGER, version.version)


def nominate(
    client: "MlflowClient",
    version: "ModelVersion",
    *,
    by: str = NOT_STATED,
    why: str = NOT_STATED,
    audit: Audit | None = None,
) -> None:
    """Make a version the candidate, which a server answers with until somebody is champion."""
    with alone(audit):
        before = alias_of(client, version.name, CANDIDATE)
        if before is not None and int(before.version) == int(version.version):
            return
        with on_record(client, audit, version, _described("nominate", version, before, version, by, why)):
            client.set_registered_model_alias(version.name, CANDIDATE, version.version)


def withdraw(
    client: "MlflowClient", name: str, *, by: str = NOT_STATED, why: str = NOT_STATED, audit: Audit | None = None
) -> int:
    """Let the champion answer everybody; returns the version that was challenger. Raises UserError when none is."""
    with alone(audit):
        before = alias_of(client, name, CHALLENGER)
        if before is None:
            raise UserError(f"{name} has no version with the alias {CHALLENGER}: the champion answers everybody")
        with on_record(client, audit, before, _described("withdraw", before, before, None, by, why)):
            client.delete_registered_model_alias(name, CHALLENGER)
    return int(before.version)


def refuse(
    client: "MlflowClient",
    version: "ModelVersion",
    examined: Examination,
    *,
    by: str,
    why: str,
    audit: Audit,
) -> None:
    """Put on record that a version was not promoted, in the place of the one that it was compared with, and raise
    UserError that says why."""
    before = None if examined.champion is None else version_of(client, version.name, examined.champion)
    put_on_record(client, audit, **_described("refuse", version, before, version, by, why, examined))
    why_not = "\n".join(f"    {gate}" for gate in examined.gates)
    raise UserError(
        f"{version.name} version {version.version} does not become champion:\n{why_not}\nTake the responsibility with "
        '--force --why "...", which is recorded'
    )


def release(
    client: "MlflowClient",
    version: "ModelVersion",
    intended_use: str = NOT_STATED,
    *,
    by: str,
    why: str,
    audit: Audit | None = None,
) -> None:
    """Take the mark "research use only" away from a version, for the use that is stated. Raises UserError when nobody
    says, and nobody has said, what it is for, where somebody has said something else meanwhile, and unless it is said
    who releases it and why."""
    if not (is_stated(by) and is_stated(why)):
        raise UserError('a release takes a responsibility: say who and why, --by "..." --why "..."')
    is_said, intended_use = is_stated(intended_use), stated_use(version, intended_use)
    record = _described("release", version, version, version, by, why) | {"intended_use": intended_use}
    with _made_anew(client, version, intended_use, by) as made, alone(audit):
        now = client.get_model_version(version.name, version.version)
        if not is_said and now.tags.get(INTENDED_USE) != intended_use:
            raise _another_use(version)
        with on_record(client, audit, version, record):
            _write_use_and_release(client, version, intended_use, by, made)


def restrict(
    client: "MlflowClient",
    version: "ModelVersion",
    *,
    by: str = NOT_STATED,
    why: str = NOT_STATED,
    audit: Audit | None = None,
) -> None:
    """Put the mark back: on the version at once, which servers go by, then in its bundle and card. Raises UserError for
    a version that has no use, and so was never released, and where the bundle and card cannot be written."""
    if not is_stated(version.tags.get(INTENDED_USE, NOT_STATED)):
        raise UserError(f"{version.name} version {version.version} was never released: it is for research only")
    intended_use, record = version.tags[INTENDED_USE], _described("restrict", version, version, version, by, why)
    with alone(audit), on_record(client, audit, version, record) as line:
        client.set_model_version_tag(version.name, version.version, RELEASED, NOT_STATED)
    left = f"version {version.version} has the mark, which servers go by, but its bundle and card may not have it"
    with rest(client, audit, version, record | line, left):
        with _made_anew(client, version, intended_use, NOT_STATED) as made, alone(audit):
            now = client.get_model_version(version.name, version.version)
            if not is_released(now) and now.tags.get(INTENDED_USE) == intended_use:  # nobody has decided again
                _write_use_and_release(client, version, intended_use, NOT_STATED, made)


def anchors(client: "MlflowClient") -> dict[str, Anchor]:
    """By their sha256, the lines of logs that MLflow holds: in tags of every model, and in records of promotions."""
    found: dict[str, Anchor] = {}
    for model in registered_models(client):
        for record in promotions(client, model.name):
            if record.get("audit"):
                what = f"promotion {record['number']} of {model.name}"
                found[record["audit"]] = Anchor(what, record.get("log", ""), record.get("place", ""))
        found |= held(model)
    return found


def promotions(client: "MlflowClient", name: str) -> list[dict[str, Any]]:
    """All records of a model, the oldest first."""
    versions = versions_of(client, name)
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


def is_released(version: "ModelVersion") -> bool:
    """Whether somebody has released the version from research use."""
    return is_stated(version.tags.get(RELEASED, NOT_STATED))


def _champion(client: "MlflowClient", name: str, examined: Examination | None) -> "ModelVersion | None":
    """The champion. Raises ChampionChanged where it is another one than the examination was about."""
    champion = alias_of(client, name, CHAMPION)
    number = champion and int(champion.version)
    if examined is not None and examined.champion != number:
        now, then = (f"version {one}" if one else "no version" for one in (number, examined.champion))
        raise ChampionChanged(f"{now} of {name} is champion now, and {then} was when it was compared: compare again")
    return champion


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
    examined: Examination | None = None,
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
    if examined is not None and examined.gates:
        replaces = action == "promote" and before is not None and int(before.version) != int(of.version)
        forced = action != "refuse" and not is_passed(examined.gates, replaces)
        described |= {"gates": [asdict(gate) for gate in examined.gates], "forced": forced}
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


@contextmanager
def _with_use(client: "MlflowClient", version: "ModelVersion", intended_use: str) -> Iterator["Future[Path]"]:
    """As `_made_anew`, where a version is for something else so far than what is to be stated; such a one is for
    research only again."""
    if version.tags.get(INTENDED_USE) != intended_use:
        with _made_anew(client, version, intended_use, NOT_STATED) as made:
            yield made
        return
    made: Future[Path] = Future()
    made.set_exception(_another_use(version))  # nobody asks for it as long as that is not so
    yield made


def _another_use(version: "ModelVersion") -> UserError:
    what = f"{version.name} version {version.version}"
    return UserError(f"somebody states another use of {what} at this moment: do it again")


@contextmanager
def _made_anew(
    client: "MlflowClient", version: "ModelVersion", intended_use: str, released_by: str
) -> Iterator["Future[Path]"]:
    """A folder with what is to be written into the registered bundle: everything but its weights. What goes wrong is
    raised where the folder is asked for, when the decision is on record.

    To be made before others wait for the decision: the whole bundle is fetched for its card, which may take long.
    """
    made: Future[Path] = Future()
    with tempfile.TemporaryDirectory(prefix="raymed-bundle-") as temporary:
        try:
            made.set_result(_make_anew(client, version, intended_use, released_by, Path(temporary)))
        except Exception as error:
            made.set_exception(error)
        yield made


def _make_anew(
    client: "MlflowClient", version: "ModelVersion", intended_use: str, released_by: str, into: Path
) -> Path:
    folder = fetch_bundle(client, f"models:/{version.name}/{version.version}", into / "old")
    described = json.loads((folder / "bundle.json").read_text())
    contract = {name: value for name, value in described.get("contract", {}).items() if name not in RELEASE}
    if is_stated(released_by):
        contract |= {"research_only": False, "released_by": released_by}
    described |= {"intended_use": intended_use, "contract": contract}
    (folder / "bundle.json").write_text(to_json(described))
    write_card(folder, version.name)
    shutil.copytree(folder, into / "new" / BUNDLE, ignore=shutil.ignore_patterns("*.safetensors"))
    return into / "new"


def _write_use(client: "MlflowClient", version: "ModelVersion", intended_use: str, made: "Future[Path]") -> None:
    """Write down what a version is for. A release was for the use that was stated then: with another one the version is
    for research only again."""
    if client.get_model_version(version.name, version.version).tags.get(INTENDED_USE) != intended_use:
        _write_use_and_release(client, version, intended_use, NOT_STATED, made)


def _write_use_and_release(
    client: "MlflowClient", version: "ModelVersion", intended_use: str, released_by: str, made: "Future[Path]"
) -> None:
    """Write the intended use, and who has released it, into the registered bundle, its card (both `_made_anew`) and the
    version. Its weights are not written again, and its description keeps the form that it was registered in."""
    # First: whatever breaks off, no version is released for a use that it was not released for.
    client.set_model_version_tag(version.name, version.version, RELEASED, NOT_STATED)
    folder = made.result()
    client.log_model_artifacts(version.tags[MODEL_ID], str(folder))
    client.update_model_version(version.name, version.version, description((folder / BUNDLE / CARD).read_text()))
    client.set_model_version_tag(version.name, version.version, INTENDED_USE, intended_use)
    if is_stated(released_by):
        client.set_model_version_tag(version.name, version.version, RELEASED, released_by)
