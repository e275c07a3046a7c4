"""Jobs that cannot be gone on with now, for a reason that says nothing of them: a share that is gone, a full disk, a
registry that does not answer. Each is tried again after a pause, in which others are done, and fails when that has gone
on for a day without it getting any further.
"""

import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from raymed.config import UserError
from raymed.data.intake.scan import Silent
from raymed.serve.access import log
from raymed.serve.jobs.store import Job
from raymed.serve.models import Unreachable
from raymed.serve.problems import Problem

_PAUSE_S, _LONGEST_S = 60.0, 86400.0
"""Before a job is tried again, and until it fails, where it gets no further."""


@dataclass(frozen=True)
class _Outage:
    """Of a job. since, again: of time.monotonic(), when it began, and when the job is tried again; done: cases that
    were answered by then."""

    since: float
    done: int
    again: float


class Outages:
    """Of the jobs of a server, for as long as it lives."""

    def __init__(self) -> None:
        self._of: dict[str, _Outage] = {}

    def __contains__(self, number: str) -> bool:
        return number in self._of

    def over(self, jobs: Iterable[Job]) -> list[Job]:
        """Those of all unfinished jobs that may be tried now."""
        jobs, now = list(jobs), time.monotonic()
        self._of = {job.id: self._of[job.id] for job in jobs if job.id in self._of}
        return [job for job in jobs if job.id not in self._of or now >= self._of[job.id].again]

    def note(self, job: Job, done: int) -> bool:
        """A job cannot be gone on with now, of which so many cases are answered; False where it has got no further for
        so long that it fails."""
        now, before = time.monotonic(), self._of.get(job.id)
        if before is None:
            log.write(event="job", job=job.id, state="waits", model=job.model)
        first = before if before and done <= before.done else _Outage(now, done, now)
        self._of[job.id] = replace(first, again=now + _PAUSE_S)
        return now <= first.since + _LONGEST_S


def may_pass(error: Exception) -> bool:
    """Whether the same job may be done later. Who is refused a file has been answered."""
    if isinstance(error, PermissionError | IsADirectoryError):
        return False
    return isinstance(error, OSError | sqlite3.Error | Silent | Unreachable)


def reason_of(error: Exception) -> str:
    """Only messages of our own, for whoever asked for the job."""
    if isinstance(error, Problem):
        return error.detail
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"a file cannot be read or written: {error.strerror or type(error).__name__}"
    log.failed(error)
    return "the server failed; its log says more"
