"""The last good version of a model, kept on disk: what answers where its source fails when a server starts.

    STORAGE/serve/models/NAME/origin.json    which version it is, of what was to be served, and its folder
    STORAGE/serve/models/NAME/DIGEST/        its bundle

A folder appears as a whole, and origin.json names it last: a crash leaves the version before it. Of a storage in S3 it
is this machine's working copy, which goes with a pod: RAYMED_LOCAL on a volume that stays is what outlives it.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.serve.config import ServeConfig, Wanted
from raymed.serve.live import Origin
from raymed.storage import is_remote, storage_folder, write_atomic
from raymed.storage.leftovers import sweep, temporary

_ORIGIN = "origin.json"


class Kept:
    """What is kept of one model. where: what the server was told to serve: another place's version is no stand-in."""

    def __init__(self, folder: Path, where: str):
        self.folder, self.where = folder, where

    def put(self, bundle: Bundle, origin: Origin) -> None:
        """Keep a version in place of the one before. Blocks. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sweep(self.folder, deep=False)
        place = self.folder / _name(origin)
        if not place.is_dir():
            self._write(bundle, place)
        described = {"where": self.where, "folder": place.name, "origin": asdict(origin)}
        write_atomic(self.folder / _ORIGIN, json.dumps(described, indent=2) + "\n")
        for other in self.folder.iterdir():
            if other.is_dir() and other != place and not other.name.startswith("."):
                shutil.rmtree(other, ignore_errors=True)

    def _write(self, bundle: Bundle, place: Path) -> None:
        arriving = temporary(place)
        try:
            bundle.save(arriving)
            os.replace(arriving, place)
        except OSError:
            shutil.rmtree(arriving, ignore_errors=True)
            if not place.is_dir():  # no other process was faster
                raise

    def get(self) -> tuple[Bundle, Origin] | None:
        """What is kept, every hash checked; None where there is nothing, or it is of another place. Blocks. Raises
        UserError for what is damaged."""
        try:
            described = json.loads((self.folder / _ORIGIN).read_text())
            where, place, origin = described["where"], described["folder"], Origin(**described["origin"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.folder / _ORIGIN} is damaged") from None
        return (Bundle.load(self.folder / place), origin) if where == self.where else None


def kept_of(wanted: Wanted, config: ServeConfig) -> Kept | None:
    """Where a model is kept; None for one whose folder is on this machine's disks anyway."""
    if not is_remote(wanted.where) and not wanted.where.startswith("models:/"):
        return None
    return Kept(storage_folder(config.storage) / "serve" / "models" / wanted.name, wanted.where)


def kept_models(storage: str | None) -> tuple[str, ...]:
    """NAME=WHERE of every model that is kept."""
    found = (storage_folder(storage) / "serve" / "models").glob(f"*/{_ORIGIN}")
    return tuple(f"{path.parent.name}={json.loads(path.read_text())['where']}" for path in sorted(found))


def _name(origin: Origin) -> str:
    """Another one for another bundle, or for the same one with another intended use."""
    return hashlib.sha256(json.dumps(asdict(origin)).encode()).hexdigest()[:16]
