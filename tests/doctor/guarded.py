"""A Ray cluster that asks for a token, with nodes that have faults."""

import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

from cluster.nodes import Node, Nodes

import raymed

SKEWED = "import time\n_real = time.time\ntime.time = lambda: _real() + 3000\n"


class Guarded(Nodes):
    """A head without CPUs and a node with two, behind a token.

    folder: of its own, which does not exist. options: of `Nodes`.
    """

    def __init__(self, folder: Path, token: bool = True, **options: Any):
        self.auth = {"RAY_AUTH_MODE": "disabled"}
        if token:
            path = folder.parent / f"{folder.name}-token"
            path.touch(0o600)
            path.write_text(secrets.token_hex(32))
            self.auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
        super().__init__(folder, cpus=0, **options)

    @property
    def environment(self) -> dict[str, str]:
        """See `Nodes`."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of jobs' `python`
        return super().environment | self.auth | {"PATH": path}

    def add_faulty(self, name: str, *flags: str, **environment: str) -> Node:
        """A node that is started with more flags and variables."""
        words = [f"--address={self.address}", f"--temp-dir={self.temp}", *flags]
        return self._start(name, 1, words, environment)


def other_raymed(folder: Path) -> Path:
    """A folder for PYTHONPATH with a raymed that differs by a line."""
    source = Path(raymed.__file__).parent
    shutil.copytree(source, folder / "raymed", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "raymed/space.py").open("a") as file:
        file.write("# another one\n")
    return folder


def skewed(folder: Path) -> Path:
    """A folder for PYTHONPATH that sets the clock of every Python 3000 s ahead."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SKEWED)
    return folder
