"""What was decided about models in use, and who decided it: one line of JSON a decision, to which lines are only added.

    STORAGE/registry/audit.jsonl

Each line holds the sha256 of the line before it, so that none can be changed, taken out or put in without every later
one telling (`verify`). The last lines are held by MLflow: each decision leaves the sha256 of its line with the model
that it is about (`raymed.registry.decisions`). In a storage in a bucket the file goes there with every line.

Several storages may share one MLflow, so that it also holds lines of their logs: `verify` asks for those of the log
that begins with the same line, and for those that were written where this log lies. A log that was deleted, and begun
anew in the same place, is found by that. One that was carried elsewhere first, or is a shared folder that another
machine wrote to, is then another log: its lines are counted (`others`), and no more can be told.
"""

import errno
import getpass
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raymed.config import UserError, to_json
from raymed.storage import Mirror, lock, push_file, remote_of
from raymed.storage.paths import not_written

FILE = "registry/audit.jsonl"
_FIRST = "0" * 64
_PATIENCE_S = 60.0
_SHOWN = 16
"""Digits of a hash that names a log, or its place."""


@dataclass(frozen=True)
class Anchor:
    """What MLflow holds of a line: what it is, its log's first line and its log's place, both as hashes; "" where they
    were not written down."""

    what: str
    log: str = ""
    place: str = ""


class Audit:
    """The log of a storage, an absolute folder."""

    def __init__(self, storage: Path):
        self.storage, self.path = storage, storage / FILE
        self._turn, self._depth = threading.RLock(), 0

    def add(self, **what: Any) -> dict[str, Any]:
        """Add a decision, with its number, the time and the account that it was made from; returns it as `entries`.
        Raises UserError where it cannot be written, or not be put in its bucket, and then nothing of it stays: nothing
        is to be done that is not on record, nor to be on record that nobody does."""
        with self.alone():
            self._pull()
            lines = self._lines()
            entry = {
                "number": len(lines) + 1,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "account": f"{_user()}@{socket.gethostname()}",
                **what,
                "before": _link(_tail(lines)),
            }
            entry = json.loads(to_json(entry))
            line = json.dumps(entry, ensure_ascii=False).encode()
            size = self._size()
            self._append(line)
            try:
                push_file(self.path)
            except BaseException:
                os.truncate(self.path, size)
                raise
        return entry | {"sha256": _sha256(line)}

    def entries(self, model: str | None = None) -> list[dict[str, Any]]:
        """All decisions, or those about one model, the oldest first, each with its own "sha256". Raises UserError as
        `verify`."""
        self._pull()
        lines, found, last = self._lines(), [], 0
        for i, line in enumerate(lines):
            entry = _parsed(line)
            if entry is None and i + 1 < len(lines):
                continue  # a piece, if the next whole line says so
            if entry is None or entry.get("before") != _link(lines[last:i]) or entry.get("number") != i + 1:
                raise UserError(
                    f"{self.path}, line {i + 1}: it, or a line before it, is not what was written. From here on the "
                    "log proves nothing"
                )
            last = i
            found.append(entry | {"sha256": _sha256(line)})
        return [entry for entry in found if model in (None, entry.get("model"))]

    def verify(self, anchors: Mapping[str, Anchor] | None = None) -> int:
        """The number of lines, if none was changed, taken out or put in. anchors: by the sha256 of a line; each that is
        of this log must be there. Raises UserError that names the first wrong line."""
        entries = self.entries()
        known = {entry["sha256"] for entry in entries}
        others = self.others(anchors or {})
        for sha256, anchor in (anchors or {}).items():
            if sha256 not in known | others:
                raise UserError(f"{self.path}: the line of {anchor.what}, as MLflow has it, is missing or was changed")
        return len(entries)

    def others(self, anchors: Mapping[str, Anchor]) -> set[str]:
        """Which of the lines stand in logs of other storages."""
        mine = self.origin()
        return {
            sha256
            for sha256, anchor in anchors.items()
            if anchor.log not in ("", mine["log"]) and anchor.place != mine["place"]
        }

    def origin(self) -> dict[str, str]:
        """What tells this log from others: {"log": of its first line, "place": of where it lies}, as hashes."""
        lines = self._lines()
        place = remote_of(self.path) or f"{socket.gethostname()}:{self.path.resolve()}"
        return {"log": _sha256(lines[0])[:_SHOWN] if lines else "none", "place": _sha256(place.encode())[:_SHOWN]}

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().removesuffix(b"\n").split(b"\n") if self._size() else []

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def _append(self, line: bytes) -> None:
        """The whole line or nothing of it. One that a crash has cut short stays, and the next line holds it."""
        is_cut = self._size() > 0 and not self.path.read_bytes().endswith(b"\n")
        try:
            with open(self.path, "ab", buffering=0) as file:
                size = file.tell()
                try:
                    data = b"\n" * is_cut + line + b"\n"
                    if file.write(data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise not_written(self.path, error) from error

    def _pull(self) -> None:
        if mirror := Mirror.of(self.storage):
            mirror.pull([FILE])

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else decides in this storage for as long as the block lasts, in which there may be further ones.
        Decisions are rare and short: waits for another one. Raises UserError where that does not end."""
        with ExitStack() as stack:
            stack.enter_context(self._turn)
            if not self._depth:
                self._lock(stack)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def _lock(self, stack: ExitStack) -> None:
        end = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return stack.enter_context(lock(self.path.with_name("audit.lock")))
            except UserError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _tail(lines: list[bytes]) -> list[bytes]:
    """The last whole line, and behind it the pieces of lines that a crash has cut."""
    whole = (i for i in reversed(range(len(lines))) if _parsed(lines[i]) is not None)
    return lines[next(whole, 0) :]


def _link(lines: list[bytes]) -> str:
    """What the line behind a tail says of it."""
    return _sha256(b"\n".join(lines)) if lines else _FIRST


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
