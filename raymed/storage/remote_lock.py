"""One machine at a time on a run in S3: a lock object with a heartbeat.

It is made with a conditional put, and renewed and taken over with one that names the version it replaces, so of two
machines exactly one gets it. Its age is measured by the server's clock. A holder that was killed is recognised at once
on its own machine, where the file lock is free again, and elsewhere after two minutes, or the lease that the object
states, without a heartbeat. Where the answer to a put was lost, the object says whose it is.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any

from raymed.config import UserError
from raymed.storage import s3
from raymed.storage.client import client, code, explained, patience
from raymed.storage.network import local_root
from raymed.storage.paths import write_atomic

HEARTBEAT = 30.0  # seconds
LOST = 120.0  # seconds without one: the holder is dead
_AT_THE_END = 15.0  # seconds
Holder = dict[str, Any]


@contextmanager
def remote_lock(url: str, lease: float | None = None) -> Iterator[None]:
    """Hold the lock object `url`, or raise UserError naming who holds it.

    While a holder may be dead this waits for its next heartbeat, at most as long as its lease.

    lease: seconds without a heartbeat after which this holder counts as dead; None = LOST.
    """
    me = {"host": socket.gethostname(), "process": os.getpid(), "place": _place(), "lease": lease}
    etag = _acquire(url, me)
    over = threading.Event()
    thread = threading.Thread(target=_renew, args=(url, me, etag, over), name="raymed-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with patience(_AT_THE_END), suppress(UserError):  # it runs out by itself
            if _is(me, _look(url)[1]):
                s3.delete([url])


def _acquire(url: str, me: Holder) -> str:
    """The version of the lock object that is ours."""
    if etag := _put(url, me, ""):
        return etag
    seen, is_told = "", False
    while True:
        etag, holder, age = _look(url)
        if not etag or age > _lease(holder) or _is_machine(me, holder):
            if mine := _put(url, me, etag):
                return mine
        elif seen and etag != seen:
            who = f"process {holder.get('process')} on {holder.get('host')}"
            raise UserError(f"{url.rpartition('/')[0]} is in use by {who}: wait for it, or end it and try again")
        elif not is_told:
            is_told = True
            print(f"{url} is locked on {holder.get('host')}: waiting for a sign of life", file=sys.stderr, flush=True)
        seen = etag
        time.sleep(min(1.0, HEARTBEAT / 10))


def _look(url: str) -> tuple[str, Holder, float]:
    """(ETag, holder, seconds since its heartbeat) of the lock object; the ETag is "" where there is none."""
    from botocore.exceptions import ClientError

    bucket, key = s3.split(url)
    with explained(url):
        try:
            response = client().get_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if code(error) != "NoSuchKey":
                raise
            return "", {}, 0.0
        now = parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"])
        holder = json.loads(response["Body"].read())
    return response["ETag"].strip('"'), holder, (now - response["LastModified"]).total_seconds()


def _put(url: str, me: Holder, etag: str) -> str:
    """`s3.put_if` of the lock object. The time makes every version another one."""
    return s3.put_if(url, json.dumps(me | {"time": time.time_ns()}).encode(), etag)


def _beat(url: str, me: Holder, etag: str, since: float) -> str:
    """Renew the version that is ours, or what has become of it by a put whose answer was lost; "" where somebody else
    has taken it over. An object that is gone was removed by hand or, if it was lost, by whoever had it meanwhile.

    since: seconds since the last heartbeat.
    """
    if new := _put(url, me, etag):
        return new
    found, holder, _ = _look(url)
    if found:
        return found if _is(me, holder) else ""
    return _put(url, me, "") if since < _lease(me) else ""


def _is(me: Holder, holder: Holder) -> bool:
    return all(holder.get(name) == value for name, value in me.items())


def _lease(holder: Holder) -> float:
    return holder.get("lease") or LOST


def _is_machine(me: Holder, holder: Holder) -> bool:
    """The folder of working copies alone does not say: it may have come with a copy of the whole disk."""
    return all(holder.get(name) == me[name] for name in ("place", "host"))


def _renew(url: str, me: Holder, etag: str, over: threading.Event) -> None:
    last = time.time()
    period = min(HEARTBEAT, _lease(me) / 4)
    while not over.wait(period):
        try:
            with patience(period):
                etag = _beat(url, me, etag, time.time() - last)
        except UserError:
            continue  # no connection: neither has anybody else
        if not etag and not over.is_set():
            line = f"{url} was taken over from elsewhere, since this process had no connection: it stops here"
            print(line, file=sys.stderr, flush=True)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as Ctrl-C: the state is saved
            return
        last = time.time()


def _place() -> str:
    """Names the folder of working copies, and with it the machine whose file locks guard it."""
    path = local_root() / "s3" / ".place"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, uuid.uuid4().hex)
    return path.read_text()
