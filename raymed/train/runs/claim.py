"""One name of a run, one config: its first process writes down whose the folder is, every later one compares."""

import json
from pathlib import Path
from typing import Any

from raymed.config import UserError, config_hash, flatten, to_dict
from raymed.storage import Mirror, write_atomic
from raymed.tracking.credentials import without_credentials

NOT_IDENTITY = ("run", "compute", "register", "foreign")
"""Fields of a job's config that are no part of what the run is: where, which name, and what is told of the model."""


def public(config: Any) -> dict[str, Any]:
    """A job's config as it may be read by others: without the password of a tracking URI."""
    kept = to_dict(config)
    if kept["run"]["tracking"]:
        kept["run"]["tracking"] = without_credentials(kept["run"]["tracking"])
    return kept


def _claim(kind: str, config: Any) -> dict[str, Any]:
    return {"job": kind, "hash": config_hash(config, NOT_IDENTITY), "config": public(config)}


def write_claim(folder: Path, kind: str, config: Any) -> None:
    """From here on the run's name is that of this config."""
    path = folder / "config.json"
    if not path.is_file():
        write_atomic(path, json.dumps(_claim(kind, config), indent=2) + "\n")


def refuse_remains(folder: Path, mirror: Mirror) -> None:
    """Raise UserError where somebody has removed a run from its bucket: what is left here must not go on as it."""
    if not (folder / "config.json").is_file() and any(folder.rglob("checkpoints")):
        raise UserError(
            f"{mirror.url} is gone, but {folder} still holds its checkpoints: remove that too to begin anew"
        )


def check_claim(folder: Path, name: str, kind: str, config: Any) -> None:
    """Raise UserError where the run exists with another config."""
    path = folder / "config.json"
    if not path.is_file():
        return
    theirs, mine = json.loads(path.read_text()), _claim(kind, config)
    if theirs["hash"] == mine["hash"] and theirs["job"] == kind:
        return
    old, new = flatten(theirs["config"]), flatten(mine["config"])
    changed = [f for f in sorted(old | new) if old.get(f) != new.get(f) and f.split(".")[0] not in NOT_IDENTITY]
    shown = ", ".join(f"{f.removeprefix('recipe.')} was {old.get(f)!r} and is {new.get(f)!r}" for f in changed[:5])
    raise UserError(
        f"run {name!r} exists with another config ({shown or theirs['job']}): choose another --name, or repeat it "
        "with its own config"
    )
