"""A decision about a model stands in the log before anything is done, and MLflow holds its line.

    raymed.audit.NUMBER.SHA256    a tag of the registered model for every line about it, never changed or removed: the
                                  line's sha256, and which log it stands in (`Audit.origin`)

Each line of the log names the one before it, so that the tag of a line holds all that stood there before: whoever cuts
the log's end leaves a tag that names what is missing. What then could not be done, or not to its end, is a line too.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from raymed.bundle import NOT_STATED
from raymed.config import UserError
from raymed.registry.audit import Anchor, Audit

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

ANCHOR = "raymed.audit."  # tags of a model
INTENDED_USE, RELEASED = "raymed.intended_use", "raymed.released_by"  # tags of a version
NOT_DONE, IN_PART, NOT_KNOWN = "not done", "done in part", "not known"
_SHOWN = 12
"""Digits of a line's sha256 in the name of its tag."""


def alone(audit: Audit | None) -> AbstractContextManager[None]:
    """Between what is read and what is then decided nobody else decides in this storage (`Audit.alone`)."""
    return audit.alone() if audit else nullcontext()


@contextmanager
def on_record(
    client: "MlflowClient", audit: Audit | None, version: "ModelVersion", record: dict[str, Any]
) -> Iterator[dict[str, str]]:
    """Put a decision on record, then do it in the block. Gives {"audit": sha256 of its line} and which log it stands in
    (`Audit.origin`); {} without a log.

    version: what is decided about. Where the block fails, the registry is asked what became of the decision, and a
    second line says so: "not done" (all is as before), "done in part" or "not known" (the registry does not answer),
    with what bears which alias "now". Raises UserError that says the same.
    """
    before = _state(client, version)
    entry = audit.add(**record) if audit else {}
    try:
        if audit:
            _anchor(client, audit, entry)
        yield {"audit": entry["sha256"], **audit.origin()} if audit else {}
    except BaseException as error:
        now = _state_now(client, version)
        outcome = NOT_KNOWN if now is None else NOT_DONE if now == before else IN_PART
        if audit:
            known = {"model": version.name, "decision": entry["sha256"], "now": now, "why": _kind(error)}
            put_on_record(client, audit, action=outcome, **known)
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        raise UserError(f"{record['action']} of {version.name}: {_said(outcome, now)} ({_kind(error)})") from error


@contextmanager
def rest(
    client: "MlflowClient", audit: Audit | None, version: "ModelVersion", record: dict[str, Any], left: str
) -> Iterator[None]:
    """Do the rest of a decision in the block: what takes long, so that it is not done before others may decide.

    record: with what `on_record` gave. left: what is done and what may not be, where the block fails. Then a line says
    "done in part". Raises UserError that says the same.
    """
    try:
        yield
    except BaseException as error:
        if audit:
            with audit.alone():
                now = _state_now(client, version)
                known = {"model": version.name, "decision": record["audit"], "now": now, "why": _kind(error)}
                put_on_record(client, audit, action=IN_PART, **known)
        if not isinstance(error, Exception):
            raise
        why = error if isinstance(error, UserError) else _kind(error)
        done = f"{record['action']} of {version.name}: it was {IN_PART}"
        raise UserError(f"{done}: {left} ({why}). The same command does the rest") from error


def put_on_record(client: "MlflowClient", audit: Audit, **what: Any) -> None:
    """Add a line after which nothing is done. Where MLflow cannot hold it, the next line that it holds does."""
    entry = audit.add(**what)
    with suppress(Exception):
        _anchor(client, audit, entry)


def held(model: "RegisteredModel") -> dict[str, Anchor]:
    """The lines that a registered model holds, by their sha256."""
    tags = {key: value.split() for key, value in model.tags.items() if key.startswith(ANCHOR)}
    numbers = {key: int(key.split(".")[2]) for key in tags}
    return {
        sha256: Anchor(f"decision {numbers[key]}, about {model.name}", *origin)
        for key, (sha256, *origin) in tags.items()
    }


def _anchor(client: "MlflowClient", audit: Audit, entry: dict[str, Any]) -> None:
    tag, origin = f"{ANCHOR}{entry['number']:04d}.{entry['sha256'][:_SHOWN]}", audit.origin()
    client.set_registered_model_tag(entry["model"], tag, f"{entry['sha256']} {origin['log']} {origin['place']}")


def _state(client: "MlflowClient", version: "ModelVersion") -> dict[str, Any]:
    """What decisions change."""
    aliases = client.get_registered_model(version.name).aliases
    tags = client.get_model_version(version.name, version.version).tags
    return {
        "aliases": {alias: int(number) for alias, number in sorted(aliases.items())},
        "intended_use": tags.get(INTENDED_USE, NOT_STATED),
        "released_by": tags.get(RELEASED, NOT_STATED),
    }


def _state_now(client: "MlflowClient", version: "ModelVersion") -> dict[str, Any] | None:
    try:
        return _state(client, version)
    except Exception:  # of whatever kind: MLflow does not say
        return None


def _said(outcome: str, now: dict[str, Any] | None) -> str:
    if now is None:
        return "MLflow does not answer, and it is not known what was done. Look at the model's aliases there"
    aliases = ", ".join(f"{alias} {number}" for alias, number in now["aliases"].items())
    then = "Do it again" if outcome == NOT_DONE else "The same command does the rest"
    return f"MLflow failed, and it was {outcome}: {aliases or 'no alias'} now. {then}"


def _kind(error: BaseException) -> str:
    """Without its text, which may hold a password."""
    return type(error).__name__
