"""The read cache: what was read from S3 stays on a disk of this machine, up to $RAYMED_CACHE_GB (50), oldest use out.

An entry is a folder LOCAL/read/../ID.VERSION that holds one file or one folder under its own name; ID is made from the
URL and VERSION is its ETag, so an object that has changed is another entry. Entries appear and go by one rename, so
several processes may use the cache at a time. The last use of an entry is its time of modification. Who has opened a
file that is then evicted reads on (POSIX).
"""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from raymed.config import UserError
from raymed.storage import s3
from raymed.storage.client import host, number
from raymed.storage.leftovers import sweep, temporary
from raymed.storage.network import local_root

LIMIT_GB = 50.0
GRACE = 60.0  # seconds after its use in which an entry stays: another process is about to open it
_LOOK_AGAIN = 60.0  # seconds
_seen: dict[str, Any] = {}  # the room there was at the last look


def files(urls: Sequence[str]) -> list[Path]:
    """Files with the content that the objects have now. Raises UserError where there is none."""
    if not urls:
        return []
    with ThreadPoolExecutor(min(s3.THREADS, len(urls)), "raymed-read") as pool:
        found = list(pool.map(_stat, urls))
    paths = [_entry(o.url, o.etag) / _name(o.url) for o in found]
    new = {path.parent: [(o, path.name)] for path, o in zip(paths, found, strict=True) if not _is_hit(path)}
    _fetch(new, {path.parent for path in paths})
    return paths


def folder(url: str) -> Path:
    """A folder with everything that is below a URL now. Raises UserError where there is nothing."""
    url = url.rstrip("/")
    objects = s3.listing(url)
    if not objects:
        raise UserError(f"there is nothing below {url}/")
    version = hashlib.sha256("".join(f"{o.url}|{o.etag}\n" for o in objects).encode()).hexdigest()[:32]
    path = _entry(url, version) / _name(url)
    if not _is_hit(path):
        members = [(o, f"{path.name}/{o.url.removeprefix(f'{url}/')}") for o in objects]
        _fetch({path.parent: members}, {path.parent})
    return path


def _root() -> Path:
    return local_root() / "read"


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _entry(url: str, version: str) -> Path:
    name = hashlib.sha256(f"{host()}|{url}".encode()).hexdigest()[:32]
    return _root() / name[:2] / f"{name}.{quote(version, safe='')}"


def _stat(url: str) -> s3.Object:
    found = s3.stat(url)
    if found is None:
        raise UserError(f"there is nothing at {url}")
    return found


def _is_hit(path: Path) -> bool:
    try:
        os.utime(path.parent)
    except FileNotFoundError:
        return False
    return True


def _fetch(new: Mapping[Path, Sequence[tuple[s3.Object, str]]], wanted: set[Path]) -> None:
    """Make entries of objects: {entry: [(object, name in the entry)]}. The entries that are `wanted` stay."""
    members = [(entry, found, name) for entry, contents in new.items() for found, name in contents]
    if not members:
        return
    size = sum(found.size for _, found, _ in members)
    make_room(size, wanted)
    begun = {entry: temporary(_root() / entry.name) for entry in new}
    try:
        got = s3.download_many([(found.url, begun[entry] / name) for entry, found, name in members], size)
        for arrived, (_, found, _) in zip(got, members, strict=True):
            if arrived.etag != found.etag:
                raise UserError(f"{found.url} has changed while it was read: try again")
        for entry, here in begun.items():
            entry.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(here, entry)
    finally:
        for here in begun.values():
            shutil.rmtree(here, ignore_errors=True)


def make_room(coming: int, wanted: set[Path]) -> None:
    """Remove entries for `coming` bytes: those not used for longest; never those `wanted` or used just now.

    What does not fit all the same comes in: it is needed now. The folder is looked through when the room that was seen
    is used up, and now and then, since other processes use it too.
    """
    limit = number("RAYMED_CACHE_GB", LIMIT_GB) * 1e9
    if _seen.get("place") == (_root(), limit) and time.monotonic() < _seen["until"] and coming <= _seen["room"]:
        _seen["room"] -= coming
        return
    sweep(_root(), deep=False)
    entries = sorted(_entries())
    room = limit - sum(size for _, size, _ in entries)
    for used, size, entry in entries:
        if room >= coming or time.time() - used < GRACE:
            break
        if entry not in wanted and _last_use(entry) == used and _remove(entry):
            room += size
    _seen.update(place=(_root(), limit), room=room - coming, until=time.monotonic() + _LOOK_AGAIN)


def _last_use(entry: Path) -> float | None:
    """None for one that is gone."""
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return None


def _remove(entry: Path) -> bool:
    """False if another process was faster."""
    gone = temporary(_root() / entry.name)
    try:
        os.rename(entry, gone)
    except FileNotFoundError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True


def _entries() -> list[tuple[float, int, Path]]:
    """(last use, bytes, folder) of every entry, without those that vanish meanwhile."""
    found = []
    for entry in _root().glob("[0-9a-f][0-9a-f]/*"):
        with contextlib.suppress(FileNotFoundError):
            size = sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
            found.append((entry.stat().st_mtime, size, entry))
    return found
