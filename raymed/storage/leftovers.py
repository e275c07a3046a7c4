"""Temporary names that say which process made them, so that what a killed process has left can be told and removed."""

import functools
import os
import re
import shutil
import uuid
from pathlib import Path

_CLOCK = 10.0  # seconds by which two processes may see a third one's start differently
_PATTERN = re.compile(r"\..*\.(\d+@[\d.]+)\.[0-9a-f]{8}\.tmp")


def this_process() -> str:
    """PID@START of this process: PIDs come again."""
    return _named(os.getpid())


@functools.cache
def _named(pid: int) -> str:
    import psutil

    return f"{pid}@{psutil.Process(pid).create_time():.1f}"


def is_alive(process: str) -> bool:
    """True for a process of this machine, as `this_process` names it, that runs."""
    import psutil

    pid, _, start = process.partition("@")
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(start)) < _CLOCK
    except psutil.NoSuchProcess:
        return False


def temporary(path: Path) -> Path:
    """A new name beside `path`, for what is to take its place. No mirror and no reader looks at it."""
    name = os.fsencode(path.name)[:100].decode(errors="ignore")  # a name may have 255 bytes
    return path.with_name(f".{name}.{this_process()}.{uuid.uuid4().hex[:8]}.tmp")


def sweep(folder: Path, deep: bool = True) -> None:
    """Remove what processes that do not run any more have left below (or only in) a folder under such names."""
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            made_by = _PATTERN.match(name)
            if made_by is not None and not is_alive(made_by[1]):
                remove(Path(place, name))
        if not deep:
            return


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
