"""Whether the storage takes, gives back and removes files, here and on every node, and how much room is left."""

import os
import shutil
import uuid
from pathlib import Path

from raymed.config import UserError
from raymed.doctor.finding import Finding, failure, ok, warning
from raymed.doctor.nodes import each, told
from raymed.doctor.place import Place
from raymed.storage import lock, resolve_storage, storage_folder, write_atomic
from raymed.storage.network import local_root
from raymed.storage.paths import not_written

_SIZE = 2**20
_LITTLE, _TOO_LITTLE = 20 * 2**30, 2**30
_PATIENCE = 5.0  # seconds; a job waits longer for a server that is down


def tried(place: Place) -> Finding:
    """A file of 1 MiB is written, read and deleted; in a folder a lock is taken and a folder renamed too."""
    return ok(f"{try_storage(place.storage)}: 1 MiB written, read and deleted")


def try_storage(storage: str | None) -> str:
    """Write, read, rename and delete; the storage's name. Raises UserError for what does not work."""
    if storage and storage.startswith("s3://"):
        return _try_bucket(storage.rstrip("/"))
    folder = resolve_storage(storage)
    path, data = folder / f".doctor-{uuid.uuid4().hex}", os.urandom(_SIZE)
    locked = path.with_suffix(".lock")
    try:
        with lock(locked):
            write_atomic(path, data)
            if path.read_bytes() != data:
                raise UserError(f"{folder} gives back other bytes than were written: check its disk or share")
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        for left in (path, locked, locked.with_name(locked.name + ".pid")):
            left.unlink(missing_ok=True)
    _try_rename(path)
    return str(folder)


def _try_rename(path: Path) -> None:
    """Rename a folder with a file in it, as each checkpoint is. Raises UserError where that is refused."""
    made, renamed = path.with_suffix(".new"), path.with_suffix(".whole")
    try:
        made.mkdir()
        write_atomic(made / "file", b"")
        try:
            os.replace(made, renamed)
        except OSError as error:
            raise UserError(
                f"{path.parent} takes files and lets no folder be renamed ({error.strerror}), so no checkpoint can be "
                "saved: mount a bucket with gcsfuse --rename-dir-limit 1000, or name another storage"
            ) from error
    except OSError as error:
        raise not_written(made, error) from error
    finally:
        for left in (made, renamed):
            shutil.rmtree(left, ignore_errors=True)


def _try_bucket(url: str) -> str:
    from raymed.storage import s3
    from raymed.storage.client import host, patience

    probe, data = f"{url}/.doctor-{uuid.uuid4().hex}", os.urandom(_SIZE)
    with patience(_PATIENCE):
        resolve_storage(url)  # which also looks whether the working copy is that of this server
        s3.put_bytes(probe, data)
        is_same = s3.get_bytes(probe) == data
        s3.delete([probe])
        is_gone = s3.stat(probe) is None
    if not is_same:
        raise UserError(f"{url} gives back other bytes than were written: see the server at {host()}")
    if not is_gone:
        raise UserError(f"{url} keeps what is deleted: allow these keys s3:DeleteObject")
    return f"{url} at {host()}"


def space(place: Place) -> Finding:
    """Room on the disks of the storage's folder, of caches and of temporary files."""
    folders = {"storage": storage_folder(place.storage), "caches": local_root(), "temporary files": Path("/tmp")}
    free = {
        f"{_existing(folder)} ({name})": shutil.disk_usage(_existing(folder)).free for name, folder in folders.items()
    }
    text = ", ".join(f"{left / 2**30:.1f} GiB at {where}" for where, left in free.items())
    least = min(free.values())
    remedy = "make room, or choose others with --storage, RAYMED_LOCAL and TMPDIR"
    if least < _TOO_LITTLE:
        return failure(f"less than 1 GiB is free: {text}", remedy)
    return warning(f"little is free: {text}", remedy) if least < _LITTLE else ok(f"free: {text}")


def on_nodes(place: Place) -> Finding:
    """The same on every node, with the settings that jobs take there; a folder has to be one for all nodes."""
    remote = (place.storage or "").startswith("s3://")
    token = None if remote else resolve_storage(place.storage) / f".doctor-{uuid.uuid4().hex}"
    try:
        if token:
            token.touch()
        found, late = each(_tried_there, place.storage, token)
    finally:
        if token:
            token.unlink(missing_ok=True)
    problems = [f"{name}: {problem}" for name, problem in found.items() if problem] + told(late)
    if problems:
        advice = "give a folder that every node sees under one path, or s3://BUCKET/PREFIX; see what each node says"
        return failure("; ".join(problems), advice)
    return ok(f"{len(found)} node(s) write, read and delete in {place.storage or storage_folder()}")


def _tried_there(storage: str | None, token: Path | None) -> str:
    """Runs on a node: what is amiss."""
    if token and not token.exists():
        return f"{token.parent} is not the folder of this machine"
    try:
        try_storage(storage)
    except UserError as error:
        return str(error)
    return ""


def _existing(folder: Path) -> Path:
    """The nearest folder above that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())
