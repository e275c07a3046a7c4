"""The storage folder, and files that are there whole or not at all."""

import os
import tempfile
import uuid
from pathlib import Path

from raymed.config import UserError


def home() -> Path:
    """$RAYMED_HOME, else ~/.raymed, as an absolute path. It need not exist."""
    return Path(os.environ.get("RAYMED_HOME") or "~/.raymed").expanduser().absolute()


def resolve_storage(path: str | Path | None = None) -> Path:
    """The absolute folder everything persistent lies under (default: home()), created.

    Raises UserError when it is not a folder on this machine or cannot be written.
    """
    if path is not None and "://" in str(path):
        raise UserError(f"--storage must be a folder (a mounted one for several nodes), got {path}")
    folder = home() if path is None else Path(path).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {folder} ({reason}): give a writable folder with --storage PATH") from error
    return folder


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write a file so that a reader, also after a crash, sees the old content or the new one, never a part.

    The data go to a temporary name in the same folder, to the disk, and then take the place of `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
