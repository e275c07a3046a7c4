"""Locations: a path on this machine, or s3://BUCKET/KEY as a string. Whoever reads gets a file on this machine.

What raymed keeps is always a path. With a storage in S3 that path is a working copy of the URL, below LOCAL/s3, where
LOCAL is $RAYMED_LOCAL, else ~/.cache/raymed, on each machine its own; `raymed.storage.mirror` keeps the two in step.
What a user names (a manifest, an image, a bundle) may be a URL; it is read through `raymed.storage.read_cache`.
"""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from raymed.config import UserError
from raymed.storage import read_cache, s3
from raymed.storage.client import host
from raymed.storage.in_step import InStep, Stamp
from raymed.storage.leftovers import temporary
from raymed.storage.network import local_root
from raymed.storage.paths import write_atomic

Location = str | Path
_PAUSE = 0.1  # seconds between two looks at a file that another process is putting
L = TypeVar("L", str, Path)


def is_remote(location: Location) -> bool:
    """True for a URL, of whatever scheme: those that are not s3:// are refused where they are used."""
    return isinstance(location, str) and "://" in location


def working_copy(url: str) -> Path:
    """The folder (or file) on this machine that is the copy of s3://BUCKET/KEY. It need not exist."""
    bucket, key = s3.split(url)
    return local_root() / "s3" / bucket / key


def remote_of(path: str | Path) -> str | None:
    """The URL that a path is the working copy of, or None."""
    root = local_root() / "s3"
    absolute = Path(os.path.abspath(path))
    if not absolute.is_relative_to(root) or absolute == root:
        return None
    return f"s3://{PurePosixPath(absolute.relative_to(root))}"


def address(path: Path) -> str:
    """What names a file or folder on every machine: the URL that a path is the working copy of, else the path."""
    return remote_of(path) or str(path)


def join(location: L, *names: str) -> L:
    """A name below a location."""
    if isinstance(location, Path):
        return location.joinpath(*names)
    return "/".join([location.rstrip("/"), *names]) if is_remote(location) else os.path.join(location, *names)


def exists(location: Location) -> bool:
    """True for a file or a folder that is there; of a working copy also for what only the remote has."""
    if not is_remote(location) and Path(location).exists():
        return True
    url = _url(location)
    return url is not None and (s3.stat(url.rstrip("/")) is not None or bool(s3.listing(url, limit=1)))


def read_bytes(location: Location) -> bytes:
    """The content of a file. Raises UserError where there is none."""
    return s3.get_bytes(str(location)) if is_remote(location) else local_copy(location).read_bytes()


def write_bytes(location: Location, data: bytes) -> None:
    """Write a file whole or not at all, with the folders above it."""
    if is_remote(location):
        s3.put_bytes(str(location), data)
        return
    Path(location).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(location, data)


def local_copy(location: Location) -> Path:
    """A file of this machine with the content of a location.

    A path that exists is returned as it is. A URL comes from the read cache, which asks whether the object has changed.
    A path in a working copy that is missing here is fetched to its place. Raises UserError where there is nothing.
    """
    return fetch_all([location])[0]


def fetch_all(locations: Sequence[Location]) -> list[Path]:
    """`local_copy` of many files, side by side and in their order.

    None of them is evicted from the read cache while the others come. Read them soon: the next call may evict them.
    """
    urls = [str(location) for location in locations if is_remote(location)]
    cached = dict(zip(urls, read_cache.files(urls), strict=True))
    missing = [Path(x) for x in locations if not is_remote(x) and not Path(x).exists()]
    _pull([(path, _remote(path)) for path in missing])
    return [cached[str(x)] if is_remote(x) else Path(x) for x in locations]


def local_folder_copy(location: Location) -> Path:
    """`local_copy` of a folder with all that is below it: complete or not there. It keeps its name."""
    if is_remote(location):
        return read_cache.folder(str(location))
    path = Path(location)
    if path.exists():
        return path
    url = _remote(path)
    objects = s3.listing(url)
    if not objects:
        raise UserError(f"there is nothing at {path}, nor at {url}")
    # The folder appears as a whole: a reader must not take the first of its files for all of it.
    arriving = temporary(path)
    names = [found.url.removeprefix(f"{url}/") for found in objects]
    size = sum(found.size for found in objects)
    got = s3.download_many([(o.url, arriving / name) for o, name in zip(objects, names, strict=True)], size)
    stamps = [Stamp.now(arriving / name) for name in names]
    try:
        os.replace(arriving, path)
    except OSError:  # another process was faster
        shutil.rmtree(arriving, ignore_errors=True)
        return path
    in_step().put([(g.url, g.etag, stamp) for g, stamp in zip(got, stamps, strict=True)])
    return path


def push_file(path: Path) -> None:
    """Put a file of a working copy where it belongs; of any other path nothing is done."""
    url = remote_of(path)
    if url is not None:
        push_files([(path, url)], in_step())


def push_files(pairs: Sequence[tuple[Path, str]], record: InStep) -> None:
    """Put files of a working copy at their URLs, side by side, and note that they are in step. What another process of
    this machine is putting is put after it."""
    while pairs:
        free = set(record.claim([url for _, url in pairs]))
        _put([(path, url) for path, url in pairs if url in free], record)
        pairs = [(path, url) for path, url in pairs if url not in free]
        if pairs:
            time.sleep(_PAUSE)


def _put(pairs: Sequence[tuple[Path, str]], record: InStep) -> None:
    try:
        stamps = [Stamp.now(path) for path, _ in pairs]
        sent = s3.upload_many(pairs)
    except BaseException:
        record.release([url for _, url in pairs])
        raise
    record.put([(found.url, found.etag, stamp) for found, stamp in zip(sent, stamps, strict=True)])


def in_step() -> InStep:
    """The record for the S3 endpoint in use."""
    return InStep(host())


def _pull(pairs: Sequence[tuple[Path, str]]) -> None:
    if not pairs:
        return
    got = s3.download_many([(url, path) for path, url in pairs])
    in_step().put([(found.url, found.etag, Stamp.now(path)) for found, (path, _) in zip(got, pairs, strict=True)])


def _url(location: Location) -> str | None:
    return str(location) if is_remote(location) else remote_of(Path(location))


def _remote(path: Path) -> str:
    url = remote_of(path)
    if url is None:
        raise UserError(f"there is no {path}")
    return url
