"""One process at a time: an advisory lock that names its holder and ends with the process that holds it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from raymed.config import UserError
from raymed.storage.locations import remote_of
from raymed.storage.paths import write_atomic


@contextmanager
def lock(path: str | Path, lease: float | None = None) -> Iterator[None]:
    """Hold the lock file `path` (its folder is created), or raise UserError naming the process that holds it.

    The operating system frees the lock when its process ends, however it ends. In the working copy of a storage in S3
    a lock object keeps out other machines too (`raymed.storage.remote_lock`), which recognise a dead holder after
    `lease` seconds; None = two minutes.
    """
    from raymed.storage.remote_lock import remote_lock

    path = Path(path)
    url = remote_of(path)
    with _file_lock(path):
        with remote_lock(url, lease) if url else nullcontext():
            yield


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_name(path.name + ".pid")  # beside the lock: some versions of filelock empty the lock file itself
    held = FileLock(path)
    try:
        held.acquire(timeout=0)
    except Timeout:
        who = holder.read_text() if holder.exists() else "another process"
        raise UserError(f"{path.parent} is in use by {who}: wait for it, or end it and try again") from None
    try:
        write_atomic(holder, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        held.release()
