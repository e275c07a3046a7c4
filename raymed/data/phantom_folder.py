"""A drawn data set in a folder of its own: whole or not there, drawn once for the same parameters.

    images/*.png    manifest.csv    phantoms.json, the parameters

Another version of the drawing replaces what an older one drew with the same parameters; anything else that lies there
is refused.
"""

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raymed.config import UserError

_RECORD = "phantoms.json"
_FILES = {"images", "manifest.csv", _RECORD}


def drawn_once(folder: Path, parameters: Mapping[str, Any], num_images: int, draw: Callable[[Path], None]) -> Path:
    """The path of `folder`/manifest.csv, drawn now unless the whole set is there.

    Args:
        parameters: what decides the set, JSON values; "version" among them counts up when the same others give another.
        num_images: how many PNG files a whole set has.
        draw: writes images/ and manifest.csv into the folder it is given, which is there and empty.

    Raises:
        UserError: the folder holds other files, or phantoms of other parameters.
    """
    parameters = dict(parameters)
    if _is_complete(folder, parameters, num_images):
        return folder / "manifest.csv"
    _check_ours(folder, parameters)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        (unfinished / "images").mkdir(parents=True)
        draw(unfinished)
        (unfinished / _RECORD).write_text(json.dumps(parameters))
        # Another process may have put the same set in place meanwhile, and be using it.
        if not _is_complete(folder, parameters, num_images):
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
    except OSError:
        if not _is_complete(folder, parameters, num_images):
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder / "manifest.csv"


def _is_complete(folder: Path, parameters: dict, num_images: int) -> bool:
    if not all((folder / name).exists() for name in _FILES):
        return False
    written = [image for image in folder.glob("images/*.png") if image.stat().st_size]
    return _parameters_of(folder) == parameters and len(written) == num_images


def _check_ours(folder: Path, parameters: dict) -> None:
    if folder.is_file() or (folder.is_dir() and {entry.name for entry in folder.iterdir()} - _FILES):
        raise UserError(f"{folder} holds other files; give the phantoms a folder of their own")
    if (_parameters_of(folder) or parameters) | {"version": parameters["version"]} != parameters:
        raise UserError(f"{folder} holds phantoms of other parameters; give another folder, or delete this one")


def _parameters_of(folder: Path) -> dict | None:
    record = folder / _RECORD
    return json.loads(record.read_text()) if record.is_file() else None
