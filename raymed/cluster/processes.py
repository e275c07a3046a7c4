"""Processes that outlive the command that started them, found again and ended with all that came of them.

Every one gets a mark in its environment, which its descendants inherit: whoever was orphaned is found by it. Ray's
workers write their title over their environment, but hold log files below the folder that the mark names.
"""

import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from raymed.cluster.state import Process

MARK = "RAYMED_PART_OF"
"""Environment variable of all processes of a cluster: its temporary folder, whose name nothing else has."""
_CLOCK_STEP = 2.0  # seconds by which a start seems to move when the machine's clock is set
_END_SECONDS = 30.0


def start(
    name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path | None = None
) -> Process:
    """Start a process in a session of its own, so that Ctrl-C here is not for it.

    Args:
        log: gets what it prints, for its owner's eyes alone. Replaced.
        folder: that it runs in; default: the log's.
    """
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    log.unlink(missing_ok=True)
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        started = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=folder or log.parent,
            start_new_session=True,
        )
    return Process(name, started.pid, psutil.Process(started.pid).create_time())


def running(process: Process) -> psutil.Process | None:
    """The process if it still runs, and is no later one of the same number."""
    with suppress(psutil.Error):
        found = psutil.Process(process.pid)
        same = abs(found.create_time() - process.created) < _CLOCK_STEP
        return found if same and found.status() != psutil.STATUS_ZOMBIE else None
    return None


def family(processes: Iterable[Process], mark: str) -> list[psutil.Process]:
    """What runs of these processes, of all that they started, and of all that bears the mark."""
    found = {p.pid: p for p in psutil.process_iter() if mark and _bears(p, mark)}
    for process in processes:
        top = running(process)
        with suppress(psutil.Error):
            found |= {p.pid: p for p in [top, *top.children(recursive=True)]} if top else {}
    found.pop(os.getpid(), None)
    return [p for p in found.values() if _runs(p)]


def end(processes: Iterable[Process], mark: str, grace: float = 0) -> None:
    """End processes with all that came of them: they are asked to end what they started and themselves (SIGTERM), and
    after `grace` seconds what is left is killed.

    Returns when nothing is left; TimeoutError where something cannot be killed. Nothing to end is no error.
    """
    processes = list(processes)
    if grace:
        everybody = family(processes, mark)
        _send(filter(None, map(running, processes)), "terminate")
        _gone(everybody, grace)
    until = time.monotonic() + _END_SECONDS
    while left := _left(processes, mark):
        _send(left, "kill")
        _gone(left, 2)
        if time.monotonic() > until:
            raise TimeoutError(f"these processes cannot be ended: {', '.join(map(str, left))}")


def _left(processes: Sequence[Process], mark: str) -> list[psutil.Process]:
    """`family`, looked for twice before there is none: who is just being started shows no environment."""
    found = family(processes, mark)
    if not found:
        time.sleep(0.05)
        found = family(processes, mark)
    return found


def _gone(everybody: Sequence[psutil.Process], seconds: float) -> None:
    """Wait until all are gone, for at most so long. One that nobody has reaped yet is gone."""
    until = time.monotonic() + seconds
    while any(map(_runs, everybody)) and time.monotonic() < until:
        time.sleep(0.05)


def _bears(process: psutil.Process, mark: str) -> bool:
    """Whether a process has the mark; of those that belong to somebody else nothing can be seen."""
    with suppress(psutil.Error, OSError):
        environment = process.environ()
        if "PATH" in environment:  # it is not overwritten; somebody else may well read our logs
            return environment.get(MARK) == mark
        return any(file.path.startswith(f"{mark}{os.sep}") for file in process.open_files())
    return False


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _send(processes: Iterable[psutil.Process], how: str) -> None:
    for process in processes:
        with suppress(psutil.Error):
            getattr(process, how)()


def title(process: psutil.Process) -> str:
    """What to call a process: its program; of Python's, the module or script."""
    words = process.cmdline()
    if not process.name().startswith("python") or len(words) < 2:
        return process.name()
    module = words[words.index("-m") + 1] if "-m" in words else next((w for w in words if w.endswith(".py")), "python")
    return Path(module).name


def last_lines(log: Path, count: int = 20) -> str:
    """The end of a log; "" where there is none."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 500 * count))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])
    return ""
