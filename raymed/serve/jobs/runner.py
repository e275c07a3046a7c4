"""The thread that works jobs off, one at a time, with the lowest claim on everything.

A job is gone on with by the version of the model that it began with. Where that is neither loaded nor to be had from
the registry any more it fails: a table holds the answers of one model. So it holds pseudonyms under one key: the job of
a folder, once begun, waits for a server with the key that it began with.

Whoever works on a job of a model holds the lock of that model: a job that runs while the lock is free was left by a
server that has ended.
"""

import asyncio
import hashlib
import json
import os
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.serve.access import log
from raymed.serve.config import ServeConfig
from raymed.serve.engine import Engine
from raymed.serve.jobs import predict
from raymed.serve.jobs.outages import Outages, may_pass, reason_of
from raymed.serve.jobs.store import Job, Row, State, Store
from raymed.serve.live import Live, Origin, load_live
from raymed.serve.models import CHAMPION, Models, Served, Unreachable
from raymed.serve.problems import Problem
from raymed.storage import is_remote, lock, remote_of, storage_folder

T = TypeVar("T")
KINDS = {"predict": predict}
"""What does the work: `check`, `cases_of`, `answers` and `TABLES` are those of its kind."""
_LOOK_S = 2.0
"""Between two looks at what other processes have queued, and at whether their thread has ended."""
_TOLD_S = 0.5
"""Between two notes of how far a job is, and looks at whether it is still wanted."""
_TRIES = 3
"""Of a job at which the server dies before it gets any further."""
_PATIENCE_S = 1.0
"""An image of a job waits so long at most while others are asked for."""
_REFUSED_S = 600.0
"""A job fails when its next image has been refused for so long, by a device without memory or a queue that is full."""
_GONE_S = 86400.0
"""A job fails when no server was there that could do it for so long, all of which this server was."""
_END_S = 10.0
"""For what the thread is doing when the server is to end."""


class _Left(Exception):
    """The server ends, its device does not compute any more, or nobody wants the job."""


class Jobs:
    """All jobs of a server. Raises UserError for a root that is no folder, and for jobs that nothing would keep."""

    def __init__(self, config: ServeConfig, models: Models, engine: Engine):
        self.config, self.models, self.engine = config, models, engine
        self.folder = storage_folder(config.storage) / "serve" / "jobs"
        self.served = {name: _what(served, config) for name, served in models.served.items()}
        self.store: Store | None = None
        self._ending = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._since = 0.0
        self._outages = Outages()
        if config.batch_roots and (url := remote_of(self.folder)):
            raise UserError(
                f"batch_roots: jobs and their results are kept in the storage, and {url} is a bucket, of which every "
                "machine has its own copy: name a folder, --storage DIR, that all servers of these models mount, or "
                "start without batch_roots"
            )
        for root in config.batch_roots:
            if not Path(root).expanduser().is_dir():
                raise UserError(f"batch_roots: a folder of this machine is expected, got {root}")

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin, or go on with, what there is to do. loop: that of the server. Blocks. Raises UserError."""
        if not self.config.batch_roots:
            return
        try:
            self.store = Store(self.folder / "jobs.sqlite", self.served)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{self.folder}, where jobs are kept, cannot be written: {error}") from None
        self._loop, self._since = loop, time.monotonic()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave what is running, to be gone on with. Blocks until the image in hand is done, or for a while where that
        never ends: the end of the process does not wait for the thread. The event loop must run."""
        self._ending.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_END_S)

    @property
    def rows(self) -> Store:
        """Raises Problem (403) of a server that takes no jobs."""
        if self.store is None:
            raise Problem(403, "this server takes no jobs: it was started without --batch-roots")
        return self.store

    def add(self, owner: str, kind: str, model: str, source: str) -> Job:
        """Queue a job. Blocks. Raises Problem: 403, 404, 422, 429, 503."""
        rows, most = self.rows, self.config.limits.jobs
        KINDS[kind].check(self.models.get(model).handler)
        path = predict.allowed(source, self.config.batch_roots)
        job = rows.add(owner, kind, model, str(path), most)
        if job is None:
            raise Problem(429, f"{most} jobs wait already", retry_after=60)
        log.write(event="job", job=job.id, state="queued", model=model)
        self._wake.set()
        return job

    def get(self, number: str, owner: str) -> Job:
        """Blocks. Raises Problem (404)."""
        job = self.rows.get(number, owner)
        if job is None:
            raise Problem(404, "you have no such job; those that ended long ago are forgotten", field="id")
        return job

    def result(self, job: Job, table: str) -> Path:
        """The file. Raises Problem: 409 for a job that has none, 404 for a table that its kind has not."""
        if job.state != "succeeded":
            why = f"the job has {job.state}" if job.state in ("failed", "cancelled") else f"the job is {job.state}"
            raise Problem(409, f"there is no result: {why}", field="id")
        tables = KINDS[job.kind].TABLES if job.kind in KINDS else {}
        if table not in tables:
            raise Problem(404, "a job of this kind has no such table here", field="table")
        return self.folder / job.id / tables[table]

    def end(self, number: str, owner: str) -> None:
        """Cancel an unfinished job; forget one that has ended, with its result. Blocks. Raises Problem (404)."""
        job = self.get(number, owner)
        if self.rows.finish(job.id, "cancelled"):
            log.write(event="job", job=job.id, state="cancelled", model=job.model)
            self._wake.set()
            return
        self.rows.forget(job.id)
        shutil.rmtree(self.folder / job.id, ignore_errors=True)

    def _run(self) -> None:
        if sys.platform == "linux":  # there it is the thread's own
            os.setpriority(os.PRIO_PROCESS, 0, 10)
        while not self._ending.is_set():
            try:
                self._sweep()
                worked = any(self._work_off(job) for job in self._next())
            except Exception as error:  # a full disk, a locked file: later perhaps
                log.failed(error)
                worked = False
            if not worked:
                self._wait(_LOOK_S)

    def _mine(self) -> list[Job]:
        """What is to be done of models, sources, keys and kinds that are this server's, the next first."""
        rows, roots = self.rows.unfinished(), self.config.batch_roots
        keys = {"", predict.key_mark()}
        jobs = [row.job for row in rows if row.key in keys]
        return [job for job in jobs if job.kind in KINDS and predict.inside(job.source, roots)]

    def _next(self) -> list[Job]:
        """The first of each model that is loaded, but for those that are tried again later; none while the device does
        not compute."""
        if not self.engine.computes:
            return []
        first: dict[str, Job] = {}
        for job in self._outages.over(self._mine()):
            if self.models.state()[job.model]["ready"]:
                first.setdefault(job.model, job)
        return list(first.values())

    def _work_off(self, job: Job) -> bool:
        """Returns whether it was this server's turn."""
        try:
            with lock(self.folder / f".{self.served[job.model]}.lock"):
                if row := self.rows.claim(job.id):
                    self._work(row)
        except UserError:  # another process has it
            return False
        return True

    def _wait(self, seconds: float) -> None:
        self._wake.wait(seconds)
        if not self._ending.is_set():
            self._wake.clear()

    def _sweep(self) -> None:
        """End what nobody can do, forget what is old, and remove files that nobody asks for."""
        self._see()
        if time.monotonic() > self._since + _GONE_S:
            for row in self.rows.unseen(_GONE_S):
                key = " and the key of its pseudonyms" if row.key else ""
                problem = f"for a day no server has had {row.job.model} and the source for it{key}"
                self._finish(row.job, "failed", problem)
        self.rows.forget_older(86400 * self.config.batch_days)
        folders = [path for path in self.folder.iterdir() if path.is_dir()]  # before it is asked which are of a job:
        kept = self.rows.with_files()  # another server may make one at any time
        for folder in folders:
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _see(self) -> None:
        self.rows.see([job.id for job in self._mine()])

    def _work(self, row: Row) -> None:
        job = row.job
        if row.starts > _TRIES and job.id not in self._outages:  # of those this server has seen the end
            self._finish(job, "failed", f"the server ended {_TRIES} times while it was at this job")
            return
        try:
            self._answer(row)
            self._finish(job, "succeeded")
        except _Left:
            self.rows.pause(job.id)
        except Exception as error:
            if self._ending.is_set():  # what it needs may have ended before it
                self.rows.pause(job.id)
            elif may_pass(error) and self._outages.note(job, self._done(row)):
                self.rows.pause(job.id, reason_of(error))
            else:
                self._finish(job, "failed", reason_of(error))

    def _done(self, row: Row) -> int:
        """Cases that are answered by now; where that cannot be asked, by the time the job was taken up."""
        with suppress(sqlite3.Error):  # which may be why it cannot be gone on with
            if job := self.rows.get(row.job.id, row.owner):
                return job.done
        return row.job.done

    def _finish(self, job: Job, state: State, problem: str | None = None) -> None:
        if self.rows.finish(job.id, state, problem):
            log.write(event="job", job=job.id, state=state, model=job.model)

    def _answer(self, row: Row) -> None:
        job, roots, limits = row.job, self.config.batch_roots, self.config.limits
        if row.key not in ("", predict.key_mark()):  # another server has begun it meanwhile
            raise _Left
        live, work = self._live(row), KINDS[job.kind]
        path = predict.present(job.source, roots)
        is_folder = path.is_dir()  # before it is read: it may go meanwhile
        asked = work.cases_of(live, path, roots, limits)
        self.rows.begin(job.id, live.origin, len(asked.cases), predict.key_mark() if is_folder else "")
        folder = self.folder / job.id
        folder.mkdir(exist_ok=True, mode=0o700)
        told, done = 0.0, 0
        for done in work.answers(live, asked, folder, limits, lambda item: self._ask(live, item, row)):
            if time.monotonic() >= told + _TOLD_S:
                told = time.monotonic()
                self._go_on(job, done)
        self._go_on(job, done)

    def _go_on(self, job: Job, done: int) -> None:
        self._see()
        if not self.rows.progress(job.id, done) or self._ending.is_set():
            raise _Left

    def _live(self, row: Row) -> Live:
        """The version that the job began with; the one in use for a job that has not begun. Raises UserError, of which
        Unreachable says nothing of the version."""
        served = self.models.served[row.job.model]
        if row.origin is None:
            return served.versions[CHAMPION]
        for live in list(served.versions.values()):
            if live.origin.digest == row.origin.digest:
                return live
        gone = f"{row.job.model} has changed, and the version that the job began with is no longer to be had"
        if not row.origin.version:
            raise UserError(gone)
        try:
            bundle = _fetched(served, row.origin)
            return self._in_thread(load_live, row.job.model, bundle, row.origin, served.wanted.options, self.engine)
        except Unreachable:
            raise
        except UserError as error:
            raise UserError(f"{gone}: {error}") from None

    def _ask(self, live: Live, item: Tensor, row: Row) -> Any:
        """The network's answer for an image, when nobody else waits, or after a moment. Raises Problem (503) where it
        is refused for long. Then the job fails: an image left out would change what is decided about its case. On a
        device that does not compute it is left instead: to another server, or until the device computes again."""
        if _until(lambda: not any(self.engine.waiting.values()), _PATIENCE_S, self._ending):
            raise _Left
        end = time.monotonic() + _REFUSED_S
        while True:
            try:
                return self._in_loop(live("image", item))
            except Problem as problem:
                is_over = self.engine.computes and time.monotonic() >= end
                if problem.status != 503 or is_over:
                    raise
            if not self.engine.computes or self._ending.wait(_PATIENCE_S) or not self._is_wanted(row):
                raise _Left

    def _is_wanted(self, row: Row) -> bool:
        job = self.rows.get(row.job.id, row.owner)
        return job is not None and job.state == "running"

    def _in_loop(self, work: Any) -> Any:
        """Its result. Raises _Left as `_result` does."""
        assert self._loop is not None
        return self._result(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """The result of some work that waits for the device. Raises _Left as `_result` does."""
        asked: Future[T] = Future()

        def run() -> None:
            asked.set_running_or_notify_cancel()
            try:
                asked.set_result(work(*arguments))
            except BaseException as error:  # it is for whoever asked
                asked.set_exception(error)

        threading.Thread(target=run, name="load", daemon=True).start()
        return self._result(asked)

    def _result(self, asked: "Future[T]") -> T:
        """Raises _Left where the device, which may hang, does not get to it: that is known, or the server ends."""
        while not wait([asked], _PATIENCE_S).done:
            if not self.engine.computes or self._ending.is_set():
                asked.cancel()
                raise _Left
        return asked.result()


def _fetched(served: Served, origin: Origin) -> Bundle:
    """Raises Unreachable where it cannot be had now, and another UserError where it is bad itself."""
    try:
        return served.source.fetch(origin)
    except UserError:
        raise
    except Exception as error:  # of a store
        raise Unreachable(f"{served.wanted.where} cannot be fetched now ({type(error).__name__})") from error


def _what(served: Served, config: ServeConfig) -> str:
    """Sixteen hexadecimal digits of a model's name and where it comes from, equal for servers that serve the same."""
    where, of = served.wanted.where, ""
    if served.source.name:
        of = config.tracking or os.environ.get("MLFLOW_TRACKING_URI", "")
    elif not is_remote(where):
        where = os.path.abspath(where)
    return hashlib.sha256(json.dumps([served.wanted.name, where, of]).encode()).hexdigest()[:16]


def _until(holds: Callable[[], bool], seconds: float, ending: threading.Event) -> bool:
    """Wait for something, no longer than so many seconds; whether the server ends."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        if ending.wait(0.005):
            return True
    return ending.is_set()
