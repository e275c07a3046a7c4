"""The outbox: what one run has to tell the tracker, as a file of JSON lines that is only ever appended to.

Whichever process trains writes it, without MLflow and without a server; the driver uploads it (`tracking.mlflow`).
Every line is one operation `{"op": ..., "time": milliseconds, ...}`. A process may be killed at any byte: readers
ignore a line without its end, and the next writer cuts it off. Taking something back is an operation too (`rewind`).
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, SupportsFloat

from raymed.config import to_dict
from raymed.storage import remote_of
from raymed.storage.paths import not_written

Status = Literal["FINISHED", "FAILED", "KILLED"]

SYSTEM_PREFIX = "system/"  # these metrics count samples, not training steps


class Outbox:
    """The tracking operations of one run; the first one is `open`.

    An object holds nothing but the path: it can be pickled, and made anew at any time.

    path: the file; its folder is created by the first operation. Every operation raises UserError where the disk does
    not take it, e.g. where it is full.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()

    def open(
        self,
        key: str,
        name: str,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """The run starts, or goes on: opening again, also after close, continues the same run.

        key: what identifies the run for ever (letters, digits, `-_./`); the same key is the same MLflow run.
        name: what people see.
        parent: key of the run this one is nested in. params: the resolved config, nested or flat; it also becomes the
        artifact config.json.
        """
        self._append(
            "open", key=key, name=name, parent=parent, params=to_dict(dict(params or {})), tags=_texts(tags or {})
        )

    def metrics(self, values: Mapping[str, SupportsFloat], step: int) -> None:
        """Values at a global step. NaN and infinities are kept as null and shown by MLflow as NaN."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        self._append("metrics", step=int(step), values=finite)

    def tags(self, tags: Mapping[str, str]) -> None:
        self._append("tags", tags=_texts(tags))

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """A file or a folder to upload. It is read when it is uploaded: it must stay where it is.

        What lies below the outbox's folder, or with it in a working copy, is named from there: another machine may read
        it in another place.
        """
        path = Path(path).absolute()
        near = self.path.parent
        if path.is_relative_to(near) or (remote_of(path) and remote_of(near)):
            path = os.path.relpath(path, near)
        self._append("artifact", path=str(path), folder=folder)

    def text(self, text: str, file: str) -> None:
        """An artifact `file` with this text, which is kept in the outbox."""
        self._append("text", text=text, file=file)

    def json(self, value: Any, file: str) -> None:
        self.text(json.dumps(to_dict(value), indent=2, default=str), file)

    def rewind(self, step: int) -> None:
        """Training continues after `step`: the metrics of later steps are dropped, they will be written again.

        What is uploaded already stays; its repetition is not uploaded a second time.
        """
        self._append("rewind", step=int(step))

    def close(self, status: Status = "FINISHED") -> None:
        """The run has ended. The last close wins."""
        self._append("close", status=status)

    def records(self) -> list[dict[str, Any]]:
        """All operations as they count now: rewound metrics are left out."""
        kept: list[dict[str, Any]] = []
        for record, _ in read(self.path):
            if record["op"] == "rewind":
                kept = [r for r in kept if not is_rewound(r, record["step"])]
            else:
                kept.append(record)
        return kept

    def status(self) -> Status | Literal["RUNNING"] | None:
        """What the last open or close says; None for a run that was never opened."""
        said = [record for record, _ in read(self.path) if record["op"] in ("open", "close")]
        return said[-1].get("status", "RUNNING") if said else None

    def _append(self, op: str, **fields: Any) -> None:
        line = json.dumps({"op": op, "time": time.time_ns() // 1_000_000, **fields}, default=str).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for every line, so that a reader on another node sees it (NFS flushes a file when it is closed).
            with self.path.open("ab+", buffering=0) as file:
                _write(file, line)
                if op in ("open", "close"):
                    os.fsync(file.fileno())
        except OSError as error:
            raise not_written(self.path, error) from error


def read(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (operation, byte offset behind it) from byte `start` on; nothing for a file that does not exist.

    Ends before a line that has no end yet.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        while (line := file.readline()).endswith(b"\n"):
            start += len(line)
            yield json.loads(line), start


def is_rewound(record: Mapping[str, Any], step: int) -> bool:
    """True for metrics that `rewind(step)` takes back; samples of the machine are not repeated, so they stay."""
    if record["op"] != "metrics" or record["step"] <= step:
        return False
    return not all(name.startswith(SYSTEM_PREFIX) for name in record["values"])


def _texts(tags: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in tags.items()}


def _write(file: Any, line: bytes) -> None:
    with contextlib.suppress(OSError):  # a file system without locks: one writer at a time is the caller's care
        fcntl.flock(file, fcntl.LOCK_EX)
    _cut_torn_line(file)
    if file.write(line) < len(line):  # what has got there is a torn line
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cut_torn_line(file: Any) -> None:
    """Truncate behind the last line end: what follows it was being written when its process was killed."""
    end = position = file.seek(0, os.SEEK_END)
    while position:
        block = min(position, 65536)
        file.seek(position - block)
        newline = file.read(block).rfind(b"\n")
        if newline >= 0:
            position += newline + 1 - block
            break
        position -= block
    if position < end:
        file.truncate(position)
