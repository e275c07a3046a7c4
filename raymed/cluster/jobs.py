"""Jobs of the cluster, through Ray's dashboard: reached, found, followed to their end, stopped.

A job is a submission of Ray's Job API. Its name is the submission's id: the job's file and six digits.
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from raymed.cluster import providers
from raymed.cluster.state import FILE, Cluster, folder
from raymed.config import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

STOPPED = 130
"""Exit code of a job that was stopped, and of whoever stops following one."""
DOCTOR = "doctor"
"""Stands for the file in the names of the doctor's own jobs (`raymed.doctor.head`)."""
_ANSWER_SECONDS = 15.0
_QUIET_SECONDS = 10.0  # a log that says nothing for so long may be of a machine that is gone
_AGAIN_SECONDS = 1.0


@contextmanager
def client(cluster: Cluster) -> Iterator["JobSubmissionClient"]:
    """Within: a client of the cluster's dashboard. Raises UserError where nothing answers, the token is refused or the
    dashboard cannot do what it is asked."""
    with settled(cluster), providers.provider(cluster.provider).reached(cluster) as url:
        _past_proxies(url)
        check_answers(url)
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        try:
            with _quiet_ray():
                yield JobSubmissionClient(url)
        except AuthenticationError as error:
            refused = str(error).splitlines()[0].partition(". ")[0]
            raise UserError(
                f"the dashboard at {url} does not take the token that {folder() / FILE} names ({refused}). Where it is "
                "of a cluster before this one: python -m raymed.cluster down, then up"
            ) from None
        except requests.RequestException as error:
            raise _silent(url, error) from None
        except RuntimeError as error:
            raise UserError(f"the dashboard at {url} cannot do that: {_reason(error)}") from None


@contextmanager
def _quiet_ray() -> Iterator[None]:
    """Within, Ray does not say what it uploads and what not: its loggers set their own level, their handlers none."""
    levels = {handler: handler.level for handler in logging.getLogger("ray").handlers}
    for handler in levels:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)


def _reason(error: Exception) -> str:
    """Of what the dashboard says, where the reason stands: its errors hold tracebacks."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


@contextmanager
def settled(cluster: Cluster) -> Iterator[None]:
    """Within, this process talks to Ray with the cluster's settings, none of the user's own; Ray reads some of them
    when it is first imported."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ.update({name: value for name, value in cluster.environment.items() if name.startswith("RAY_")})
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # would take the place of the URL that it is reached by
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _past_proxies(url: str) -> None:
    """A dashboard is reached on this machine or through a tunnel, which no proxy knows."""
    host = urlsplit(url).hostname or ""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))


def check_answers(url: str) -> None:
    """Raises UserError unless something answers there, whatever it says. Ray's own client would wait for ever."""
    import httpx

    try:
        httpx.get(f"{url}/api/version", timeout=_ANSWER_SECONDS)
    except httpx.HTTPError as error:
        raise _silent(url, error) from None


def _silent(url: str, error: Exception) -> UserError:
    return UserError(
        f"Ray's dashboard at {url} does not answer ({str(error) or type(error).__name__}). `python -m raymed.cluster "
        "status` says what is up; where the head is dead: down, then up"
    )


def submitted(ray: "JobSubmissionClient") -> dict[str, "JobDetails"]:
    """Name -> job, of all that were submitted, the last one first."""
    last_first = sorted(ray.list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
    return {job.submission_id: job for job in last_first if job.submission_id}


def found(ray: "JobSubmissionClient", name: str | None, *, prefer_running: bool = False) -> str:
    """The name of a job; None: the last one that is not the doctor's, with `prefer_running` the last one that has not
    ended, where there is one. Raises UserError for an unknown one, and lists the last jobs."""
    known = submitted(ray)
    if name is None:
        own = [job for job in known if job.rpartition("-")[0] != DOCTOR]
        if not own:
            raise UserError("no job was submitted to this cluster: make submit JOB=jobs/train_classifier.py")
        running = [job for job in own if prefer_running and not known[job].status.is_terminal()]
        return (running or own)[0]
    if name not in known:
        raise UserError(f"there is no {name!r}; the last jobs: {', '.join(list(known)[:10]) or 'none'}")
    return name


def follow(ray: "JobSubmissionClient", name: str) -> int:
    """Print what a job writes, from its beginning, as it writes it, until it ends. Returns the job's own exit code.

    A connection that breaks is made again, and what was printed is not printed twice. Raises UserError when the
    dashboard no longer answers.
    """
    printed = 0
    while True:
        printed = asyncio.run(_tail(ray, name, printed))
        job = _asked(ray, name)
        if job.status.is_terminal():
            break
        time.sleep(_AGAIN_SECONDS)
    try:
        _write(ray.get_job_logs(name)[printed:])
    except RuntimeError as error:
        print(f"the rest of its log cannot be read: {_reason(error)}", file=sys.stderr, flush=True)
    return ended(name, job)


async def _tail(ray: "JobSubmissionClient", name: str, printed: int) -> int:
    """Print a log from its `printed`-th character on, until the connection ends; how many are printed then."""
    import aiohttp

    chunks, position = ray.tail_job_logs(name), 0
    try:
        while True:
            coming = asyncio.ensure_future(anext(chunks, None))
            while not (await asyncio.wait({coming}, timeout=_QUIET_SECONDS))[0]:
                if _asked(ray, name).status.is_terminal():
                    coming.cancel()
                    return printed
            if (chunk := coming.result()) is None:
                return printed
            _write(chunk[max(0, printed - position) :])
            position += len(chunk)
            printed = max(printed, position)
    except (RuntimeError, OSError, aiohttp.ClientError):
        return printed


def _asked(ray: "JobSubmissionClient", name: str) -> "JobDetails":
    check_answers(ray.get_address())
    return ray.get_job_info(name)


def _write(text: str) -> None:
    if text:
        print(text, end="", flush=True)


def ended(name: str, job: "JobDetails") -> int:
    """The exit code of a job that has ended; says what became of it where that is not 0."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        print(f"{name} was stopped", file=sys.stderr, flush=True)
        return STOPPED
    if job.driver_exit_code is None:  # it never ran, or what watched it died
        print(f"error: {name} failed: {job.message}", file=sys.stderr, flush=True)
        return 1
    code = job.driver_exit_code if job.driver_exit_code >= 0 else 128 - job.driver_exit_code
    print(f"error: {name} failed with exit code {code}", file=sys.stderr, flush=True)
    return code


def followed(ray: "JobSubmissionClient", name: str) -> int:
    """`follow`, where Ctrl-C ends the following alone and says how to go on or to stop the job."""
    try:
        return follow(ray, name)
    except KeyboardInterrupt:
        print(
            f"\n{name} goes on. To follow it: python -m raymed.cluster logs {name} --follow; "
            f"to stop it: python -m raymed.cluster stop {name}",
            file=sys.stderr,
            flush=True,
        )
        return STOPPED
