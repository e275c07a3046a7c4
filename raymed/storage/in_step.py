"""The record of what was in step: of a file of a working copy, its ETag there and its size and time here.

It tells which side has changed since. One sqlite file for all working copies of a machine, so that all processes on one
working copy, also with mirrors of nested folders, know the same. Without it nothing is lost: contents are compared.
"""

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from raymed.config import UserError
from raymed.storage.leftovers import is_alive, this_process
from raymed.storage.network import local_root

_TABLE = "CREATE TABLE IF NOT EXISTS files (key TEXT PRIMARY KEY, etag TEXT, size INT, time INT, pusher TEXT)"
_PUT = "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)"
# A file that never was in step has no ETag, and a size that no file has.
_CLAIM = "INSERT INTO files VALUES (?, '', -1, -1, ?) ON CONFLICT (key) DO UPDATE SET pusher = excluded.pusher"
_claims = threading.RLock()
_mine: set[str] = set()  # what threads of this process are putting


def _forget() -> None:
    """A forked child puts nothing yet."""
    global _claims
    _claims = threading.RLock()
    _mine.clear()


os.register_at_fork(after_in_child=_forget)


@dataclass(frozen=True)
class Stamp:
    """What a file looks like from outside; nanoseconds."""

    size: int
    time: int

    @classmethod
    def of(cls, path: Path) -> "Stamp | None":
        """None where there is no file."""
        try:
            return cls.now(path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    @classmethod
    def now(cls, path: Path) -> "Stamp":
        """Of a file that is there."""
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Known:
    """A file when it was last in step."""

    etag: str
    stamp: Stamp
    pusher: str | None = None
    """Process that is putting it at this moment, or died at it."""

    def is_being_pushed(self) -> bool:
        """A process of this machine is at it: what is new there is its doing."""
        return self.pusher is not None and is_alive(self.pusher)


class InStep:
    """The record of one S3 endpoint."""

    def __init__(self, endpoint: str):
        self._prefix = f"{endpoint}|"
        self._path = local_root() / "s3" / ".in_step.db"

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection a time: none is ever shared by threads or across a fork."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=60)) as connection, connection:
                connection.execute(_TABLE)
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"{self._path} cannot be written ({error}): make room, or give another folder with RAYMED_LOCAL"
            ) from error

    def get(self, url: str) -> Known | None:
        """What is known of one file."""
        return self._select("key = ?", self._prefix + url).get(url)

    def below(self, url: str) -> dict[str, Known]:
        """What is known below a folder: URL -> file."""
        start = f"{self._prefix}{url.removesuffix('/')}/"
        return self._select("key >= ? AND key < ?", start, start + chr(0x10FFFF))

    def _select(self, where: str, *values: str) -> dict[str, Known]:
        with self._open() as connection:
            rows = connection.execute(f"SELECT * FROM files WHERE {where}", values).fetchall()
        return {row[0].removeprefix(self._prefix): Known(row[1], Stamp(row[2], row[3]), row[4]) for row in rows}

    def put(self, files: Iterable[tuple[str, str, Stamp]]) -> None:
        """These (URL, ETag, stamp) are in step."""
        rows = [(self._prefix + url, etag, stamp.size, stamp.time, None) for url, etag, stamp in files]
        with self._open() as connection, _claims:
            _mine.difference_update(row[0] for row in rows)
            connection.executemany(_PUT, rows)

    def claim(self, urls: Sequence[str]) -> list[str]:
        """Those of these files that this process may put now: nobody else of this machine is at them. `put` or
        `release` ends it, or the end of the process."""
        with self._open() as connection, _claims:
            connection.execute("BEGIN IMMEDIATE")
            rows = connection.execute("SELECT key, pusher FROM files WHERE pusher IS NOT NULL").fetchall()
            taken = {key.removeprefix(self._prefix) for key, pusher in rows if self._is_at_it(key, pusher)}
            free = [url for url in urls if url not in taken]
            _mine.update(self._prefix + url for url in free)
            connection.executemany(_CLAIM, [(self._prefix + url, this_process()) for url in free])
        return free

    def _is_at_it(self, key: str, pusher: str) -> bool:
        return key in _mine if pusher == this_process() else is_alive(pusher)

    def release(self, urls: Iterable[str]) -> None:
        """What was claimed was not put."""
        keys = [(self._prefix + url,) for url in urls]
        with self._open() as connection, _claims:
            _mine.difference_update(key for (key,) in keys)
            connection.executemany("UPDATE files SET pusher = NULL WHERE key = ?", keys)

    def forget(self, urls: Iterable[str]) -> None:
        """Nothing is known of these any more."""
        with self._open() as connection:
            connection.executemany("DELETE FROM files WHERE key = ?", [(self._prefix + url,) for url in urls])
