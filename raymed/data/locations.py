"""Where tables and images lie: files on this machine, or objects in a bucket, which come through the read cache.

A local path below a working copy (`raymed.storage`) that is absent on this machine is an object of its bucket too.
"""

import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from raymed.storage import fetch_all, is_remote, local_copy, remote_of

_PAGE = 1000  # objects in an answer to a listing
Location = str | Path
"""A path on this machine, or the URL of an object (s3://BUCKET/KEY)."""
Version = tuple[int | None, int | str | None]
"""Size, and time or ETag: another one means that the file has changed. (None, None) where there is none."""


def as_location(text: str) -> Location:
    """What a user gives: a URL stays text, a path may begin with ~."""
    return text if is_remote(text) else Path(text).expanduser()


def below(folder: Location, name: str) -> Location:
    """`name` as a manifest has it: relative to the folder, unless it is absolute or a URL itself."""
    if is_remote(name):
        return name
    if isinstance(folder, Path) or name.startswith("/"):
        return Path(folder, name)
    scheme, _, place = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(f'{place}/{name}')}"


def folder_of(location: Location) -> Location:
    """The folder that a file lies in."""
    return location.parent if isinstance(location, Path) else location.rpartition("/")[0]


def ending(location: Location) -> str:
    """.csv of set.CSV, by name."""
    return PurePosixPath(str(location)).suffix.lower()


def near(location: Location) -> Path:
    """The file on this machine: itself, or its copy. A plain path need not exist.

    Raises UserError where there is no such object, or its bucket cannot be read.
    """
    return local_copy(location) if _elsewhere(location) else Path(location)


def fetch(locations: Iterable[Location]) -> dict[Location, Path]:
    """Bring what is not on this machine to it, many at once: location -> its copy.

    Raises UserError where one of them does not exist, or a bucket cannot be read.
    """
    wanted = [location for location in dict.fromkeys(locations) if _elsewhere(location)]
    return dict(zip(wanted, fetch_all(wanted), strict=True)) if wanted else {}


def versions(locations: Iterable[Location]) -> dict[Location, Version]:
    """By what a change of each file is told. Objects are not fetched for it, but for those below a working copy.

    Raises UserError where a bucket cannot be read.
    """
    names = list(dict.fromkeys(locations))
    elsewhere = {name: url for name in names if (url := _elsewhere(name))}
    objects = _objects(elsewhere.values())
    fetch(name for name, url in elsewhere.items() if isinstance(name, Path) and url in objects)
    return {name: objects.get(name, (None, None)) if isinstance(name, str) else _version(name) for name in names}


def _version(path: Path) -> Version:
    if not path.is_file():
        return None, None
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _objects(urls: Iterable[str]) -> dict[str, Version]:
    """Size and ETag of the objects that exist.

    A request is for one object, many of them side by side, or for the next thousand of a folder, one after another. A
    folder is listed for as long as that is the shorter way; what has not come up by then is asked for by itself.
    """
    from raymed.storage.s3 import THREADS, listing, stat

    folders = _by_folder(urls)
    pages = {folder: len(names) // THREADS for folder, names in folders.items() if len(names) >= THREADS}
    with ThreadPoolExecutor(THREADS) as pool:
        listed = pool.map(lambda folder: listing(folder, limit=_PAGE * pages[folder]), pages)
        found = {one.url: one for part in listed for one in part}
        others = [url for names in folders.values() for url in names if url not in found]
        found |= {one.url: one for one in pool.map(stat, others) if one}
    return {url: (one.size, one.etag) for url, one in found.items()}


def _by_folder(urls: Iterable[str]) -> dict[str, list[str]]:
    """Folder -> objects below it, without folders inside others."""
    wanted = set(urls)
    folders = {url.rpartition("/")[0] for url in wanted}
    found: dict[str, list[str]] = {}
    for url in sorted(wanted):
        top = [folder for folder in _above(url) if folder in folders][-1]
        found.setdefault(top, []).append(url)
    return found


def _above(folder: str) -> Iterator[str]:
    while (folder := folder.rpartition("/")[0]).count("/") >= 2:
        yield folder


def _elsewhere(location: Location) -> str | None:
    """The URL of what is to be fetched; None for what is here, or nowhere."""
    if isinstance(location, str):
        return location
    return None if location.exists() else remote_of(location)
