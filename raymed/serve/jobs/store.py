"""Jobs as rows of an sqlite file, which several processes may share, of one machine or of several that mount its
folder: so there is no write-ahead log, which wants memory that all of them have.

queued -> running -> succeeded | failed;  queued, running -> cancelled

A row holds what its model is, since two servers may use one name for different ones, and when a server that can do it
was last there: what nobody can do any more is told from what waits for another server.
"""

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from raymed.serve.described import Described
from raymed.serve.live import Origin

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
UNFINISHED: tuple[State, ...] = ("queued", "running")
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL, source TEXT NOT NULL,
    state TEXT NOT NULL, created REAL NOT NULL, started REAL, finished REAL, done INTEGER NOT NULL DEFAULT 0,
    total INTEGER, problem TEXT, origin TEXT, starts INTEGER NOT NULL DEFAULT 0,
    served TEXT NOT NULL DEFAULT '', seen REAL NOT NULL DEFAULT 0, key TEXT NOT NULL DEFAULT ''
)"""
_LATER = ("served TEXT NOT NULL DEFAULT ''", "seen REAL NOT NULL DEFAULT 0", "key TEXT NOT NULL DEFAULT ''")
"""Columns that a file of before does not have."""
_WAIT_S = 10.0
"""For another process that writes."""
_SEEN_S = 60.0
"""Between two notes that a server is there which can do a job."""


class Job(Described):
    """What its owner is told of a job."""

    id: str
    kind: str
    model: str
    version: str | None
    """Of the registry; null until it has begun."""
    bundle: str | None
    """sha256 of what it is done with; null until it has begun."""
    source: str
    state: State
    done: int
    """Cases that are answered."""
    total: int | None
    """Cases; null until they have been counted."""
    created: datetime
    started: datetime | None
    finished: datetime | None
    problem: str | None
    """Why it failed or, of one that runs, what it waits for."""


@dataclass(frozen=True)
class Row:
    """A job, and what only the server knows of it. origin: the version of the model that it began with; starts: how
    often it was begun without getting any further; key: mark of that of its pseudonyms, "" of a job without any."""

    job: Job
    owner: str
    origin: Origin | None
    starts: int
    key: str


class Store:
    """The file, made where there is none, for its owner's eyes. Every call is one transaction, and blocks. Raises
    sqlite3.Error where the disk does not do.

    served: of each model of the server, by name, what it is; the same text in all servers that serve the same.
    """

    def __init__(self, path: Path, served: Mapping[str, str]):
        self.path, self.served = path, dict(served)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._open() as rows:
            with suppress(sqlite3.OperationalError):  # of a file of before, while another process has it open
                rows.execute("PRAGMA journal_mode=DELETE")
            rows.execute("BEGIN IMMEDIATE")  # two servers may start at once
            rows.execute(_TABLE)
            there = {column["name"] for column in rows.execute("PRAGMA table_info(jobs)")}
            for column in _LATER:
                if column.partition(" ")[0] not in there:
                    rows.execute(f"ALTER TABLE jobs ADD COLUMN {column}")
            rows.execute("UPDATE jobs SET seen = ? WHERE seen = 0", (time.time(),))
            for name, what in self.served.items():  # jobs of before, which had the name alone
                rows.execute("UPDATE jobs SET served = ? WHERE served = '' AND model = ?", (what, name))
            rows.execute("COMMIT")
        path.chmod(0o600)

    def add(self, owner: str, kind: str, model: str, source: str, most: int) -> Job | None:
        """A new job of one of the server's models that waits; None where so many of them wait already."""
        number, now, mine = secrets.token_hex(16), time.time(), tuple(self.served.values())
        added = self._change(
            "INSERT INTO jobs (id, owner, kind, model, served, source, state, created, seen) "
            "SELECT ?, ?, ?, ?, ?, ?, 'queued', ?, ? "
            f"WHERE (SELECT count(*) FROM jobs WHERE state = 'queued' AND served IN ({_marks(mine)})) < ?",
            (number, owner, kind, model, self.served[model], source, now, now, *mine, most),
        )
        return self.get(number, owner) if added else None

    def get(self, number: str, owner: str) -> Job | None:
        """One of an owner's; None where he has none of that number."""
        found = self._rows("SELECT * FROM jobs WHERE id = ? AND owner = ?", (number, owner))
        return found[0].job if found else None

    def all(self, owner: str) -> list[Job]:
        """Of an owner, the newest first."""
        rows = self._rows("SELECT * FROM jobs WHERE owner = ? ORDER BY created DESC, rowid DESC", (owner,))
        return [row.job for row in rows]

    def unfinished(self) -> list[Row]:
        """Those of the server's models, the next to be worked on first: what somebody had begun, before what waits
        longest."""
        mine = tuple(self.served.values())
        return self._rows(
            f"SELECT * FROM jobs WHERE state IN {UNFINISHED} AND served IN ({_marks(mine)}) "
            "ORDER BY state = 'running' DESC, created, rowid",
            mine,
        )

    def claim(self, number: str) -> Row | None:
        """Begin an unfinished one, or go on with it; None where it has ended."""
        found = self._rows(
            "UPDATE jobs SET state = 'running', starts = starts + 1, started = coalesce(started, ?) "
            f"WHERE id = ? AND state IN {UNFINISHED} RETURNING *",
            (time.time(), number),
        )
        return found[0] if found else None

    def see(self, numbers: Sequence[str]) -> None:
        """Note that a server is there which can do these."""
        now = time.time()
        self._change(
            f"UPDATE jobs SET seen = ? WHERE seen < ? AND id IN ({_marks(numbers)})", (now, now - _SEEN_S, *numbers)
        )

    def unseen(self, seconds: float) -> list[Row]:
        """Unfinished ones that no server could do for so long."""
        return self._rows(f"SELECT * FROM jobs WHERE state IN {UNFINISHED} AND seen < ?", (time.time() - seconds,))

    def begin(self, number: str, origin: Origin, total: int, key: str = "") -> None:
        """Note what it is done with, and how much there is to do."""
        values = (json.dumps(asdict(origin)), total, key, number)
        self._change("UPDATE jobs SET origin = ?, total = ?, key = ? WHERE id = ?", values)

    def progress(self, number: str, done: int) -> bool:
        """Note how far it is; False where it is no longer wanted."""
        return self._change(
            "UPDATE jobs SET starts = CASE WHEN done < ? THEN 0 ELSE starts END, done = ?, problem = NULL "
            "WHERE id = ? AND state = 'running'",
            (done, done, number),
        )

    def pause(self, number: str, problem: str | None = None) -> None:
        """It is left, in order, to be gone on with later. problem: what it waits for."""
        self._change(
            f"UPDATE jobs SET starts = 0, problem = ? WHERE id = ? AND state IN {UNFINISHED}", (problem, number)
        )

    def finish(self, number: str, state: State, problem: str | None = None) -> bool:
        """End an unfinished one; False where it has ended already."""
        return self._change(
            f"UPDATE jobs SET state = ?, finished = ?, problem = ? WHERE id = ? AND state IN {UNFINISHED}",
            (state, time.time(), problem, number),
        )

    def forget(self, number: str) -> None:
        """Of one that has ended, leave nothing."""
        self._change(f"DELETE FROM jobs WHERE id = ? AND state NOT IN {UNFINISHED}", (number,))

    def forget_older(self, seconds: float) -> None:
        """The same of all that ended so long ago."""
        self._change("DELETE FROM jobs WHERE finished < ?", (time.time() - seconds,))

    def with_files(self) -> set[str]:
        """Numbers of those whose files somebody can still ask for, or a server goes on with."""
        with self._open() as rows:
            found = rows.execute("SELECT id FROM jobs WHERE state IN ('running', 'succeeded')")
            return {number for (number,) in found}

    def _change(self, statement: str, values: Sequence[Any]) -> bool:
        with self._open() as rows:
            return rows.execute(statement, values).rowcount > 0

    def _rows(self, statement: str, values: Sequence[Any]) -> list[Row]:
        with self._open() as rows:
            return [_row(dict(found)) for found in rows.execute(statement, values).fetchall()]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        rows = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
        try:
            rows.row_factory = sqlite3.Row
            yield rows
        finally:
            rows.close()


def _row(found: dict[str, Any]) -> Row:
    owner, origin, starts, key = (found.pop(name) for name in ("owner", "origin", "starts", "key"))
    del found["served"], found["seen"]
    used = Origin(**json.loads(origin)) if origin else None
    times = {name: _time(found.pop(name)) for name in ("created", "started", "finished")}
    identity = {"version": used and used.version, "bundle": used and used.digest}
    job = Job.model_validate(found | times | identity)
    return Row(job, owner, used, starts, key)


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _marks(values: Sequence[str]) -> str:
    return ", ".join("?" * len(values))
