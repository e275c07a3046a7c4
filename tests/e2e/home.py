"""Jobs as a user runs them: commands in processes of their own, with every folder they write to a temporary one."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[2]
TINY = (
    "--data.preprocess.size=32 --supcon.batch-size=32 --supcon.steps=12 --supcon.evaluations=2 --supcon.accumulate=1 "
    "--head.batch-size=32 --head.steps=40 --head.evaluations=8 --single.batch-size=32 --single.steps=12 "
    "--single.evaluations=3"
).split()
"""Trains anything on phantoms in a few seconds."""

ONE_BY_ONE = "--sweep.no-batched --seeds 2023 --finals.seeds 3001 --finals.finalists 1".split()
"""A sweep slow enough to be stopped in its middle: each head a Ray Tune trial."""


class Home:
    """A user's machine: source, home, storage and temporary folder of its own; Ray's sockets need a short path."""

    def __init__(self, folder: Path, temporary: Path):
        self.code, self.storage, self.temporary = folder / "code", folder / "storage", temporary
        for name in ("raymed", "jobs"):
            shutil.copytree(REPO / name, self.code / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPO / ".rayignore", self.code)
        (folder / "home").mkdir()
        # Without bytecode every command and every worker of Ray compiles all of raymed again.
        dropped = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAYMED_LOCAL", "PYTHONDONTWRITEBYTECODE")
        self.env = {name: value for name, value in os.environ.items() if name not in dropped} | {
            "HOME": str(folder / "home"),
            "RAYMED_HOME": str(self.storage),
            "TMPDIR": str(temporary),
            "PYTHONPATH": str(self.code),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, job: str, *arguments: str, **env: str) -> subprocess.Popen:
        """Begin a job; its output goes to a pipe, both streams together."""
        command = [sys.executable, f"jobs/{job}.py", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.code, env=self.env | env, start_new_session=True, **pipes)

    def run(self, job: str, *arguments: str, expect: int = 0, **env: str) -> str:
        """Run a job to its end and return its output."""
        process = self.start(job, *arguments, **env)
        try:
            output, _ = process.communicate(timeout=600)
        finally:
            process.kill()
        assert process.returncode == expect, output
        return output

    def edit_source(self) -> None:
        """Change a comment, as a user does between two submissions."""
        for name in ("raymed/tune/sweep.py", "jobs/tune_asl.py"):
            path = self.code / name
            path.write_text(path.read_text() + "# one more comment\n")

    def processes(self) -> list[psutil.Process]:
        """What was started here and still runs, at whatever depth: all inherit the temporary folder."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR") == str(self.temporary):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def end_all(self) -> None:
        """Kill what is left, by id."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:g} s: no {what}"
        time.sleep(0.02)
