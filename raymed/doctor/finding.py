"""What a check has found."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failure"]
"""From the best to the worst."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    level: "failure" where jobs will not work, "warning" where they will be slow or may fail later.
    found: what was done and what came of it. remedy: what to do; empty where all is well.
    name, seconds: of the check; the runner knows them.
    """

    level: Level
    found: str
    remedy: str = ""
    name: str = ""
    seconds: float = 0.0


def ok(found: str) -> Finding:
    """All is well."""
    return Finding("ok", found)


def warning(found: str, remedy: str) -> Finding:
    """Work goes on, slower or with a risk."""
    return Finding("warning", found, remedy)


def failure(found: str, remedy: str) -> Finding:
    """Jobs will fail."""
    return Finding("failure", found, remedy)
