"""One process at a time: an advisory lock that names its holder and ends with the process that holds it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raymed.config import UserError
from raymed.storage.paths import write_atomic


@contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold the lock file `path` (its folder is created), or raise UserError naming the process that holds it.

    The operating system frees the lock when its process ends, however it ends.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
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
