"""What was decided about models in use, and who decided it: one line of JSON a decision, to which lines are only added.

    STORAGE/registry/audit.jsonl

Each line holds the sha256 of the line before it, so that none can be changed, taken out or put in without every later
one telling (`verify`). The last lines are held by MLflow: each decision leaves the sha256 of its line with the model
that it is about (`raymed.registry.decisions`). In a storage in a bucket the file goes there with every line.
"""

import errno
import getpass
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raymed.config import UserError, to_json
from raymed.storage import Mirror, lock, push_file
from raymed.storage.paths import not_written

FILE = "registry/audit.jsonl"
_FIRST = "0" * 64
_PATIENCE_S = 10.0


class Audit:
    """The log of a storage, an absolute folder."""

    def __init__(self, storage: Path):
        self.storage, self.path = storage, storage / FILE

    def add(self, **what: Any) -> dict[str, Any]:
        """Add a decision, with its number, the time and the account that it was made from; returns it as `entries`.
        Raises UserError where it cannot be written: nothing is to be done that is not on record."""
        with self._alone():
            self._pull()
            lines = self._lines()
            entry = {
                "number": len(lines) + 1,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "account": f"{_user()}@{socket.gethostname()}",
                **what,
                "before": _sha256(lines[-1]) if lines else _FIRST,
            }
            entry = json.loads(to_json(entry))
            line = json.dumps(entry, ensure_ascii=False).encode()
            self._append(line)
            push_file(self.path)
        return entry | {"sha256": _sha256(line)}

    def entries(self, model: str | None = None) -> list[dict[str, Any]]:
        """All decisions, or those about one model, the oldest first, each with its own "sha256". Raises UserError as
        `verify`."""
        self._pull()
        found, before = [], _FIRST
        for number, line in enumerate(self._lines(), 1):
            entry = _parsed(line)
            if entry is None or entry.get("before") != before or entry.get("number") != number:
                raise UserError(
                    f"{self.path}, line {number}: it, or a line before it, is not what was written. From here on the "
                    "log proves nothing"
                )
            before = _sha256(line)
            found.append(entry | {"sha256": before})
        return [entry for entry in found if model in (None, entry.get("model"))]

    def verify(self, anchors: Mapping[str, str] | None = None) -> int:
        """The number of lines, if none was changed, taken out or put in. anchors: sha256 of a line -> what names it
        elsewhere; each must be there. Raises UserError that names the first wrong line."""
        entries = self.entries()
        known = {entry["sha256"] for entry in entries}
        for sha256, what in (anchors or {}).items():
            if sha256 not in known:
                raise UserError(f"{self.path}: the line of {what}, as MLflow has it, is missing or was changed")
        return len(entries)

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().removesuffix(b"\n").split(b"\n") if self._size() else []

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def _append(self, line: bytes) -> None:
        """The whole line or nothing of it. One that a crash has cut short stays as it is."""
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
    def _alone(self) -> Iterator[None]:
        """Decisions are rare and short: wait for another one's line."""
        with ExitStack() as stack:
            end = time.monotonic() + _PATIENCE_S
            while True:
                try:
                    stack.enter_context(lock(self.path.with_name("audit.lock")))
                    break
                except UserError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.05)
            yield


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
