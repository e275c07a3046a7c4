"""One machine at a time on a run in S3: a lock object with a heartbeat.

It is made with a conditional put, and renewed and taken over with one that names the version it replaces, so of two
machines exactly one gets it. Its age is measured by the server's clock. A holder that was killed is recognised at once
on its own machine, where the file lock is free again, and after two minutes without a heartbeat elsewhere.
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
_CONFLICT = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


@contextmanager
def remote_lock(url: str) -> Iterator[None]:
    """Hold the lock object `url`, or raise UserError naming who holds it.

    While a holder may be dead this waits, at most LOST seconds, for its next heartbeat.
    """
    held = _acquire(url)
    over = threading.Event()
    thread = threading.Thread(target=_renew, args=(url, held, over), name="raymed-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with patience(_AT_THE_END), suppress(UserError):  # it runs out by itself
            if _look(url)[:1] == (held["etag"],):
                s3.delete([url])


def _acquire(url: str) -> dict[str, str]:
    """{"etag": version of the lock object that is ours}"""
    if etag := _put(url, IfNoneMatch="*"):
        return {"etag": etag}
    seen, is_told = "", False
    while True:
        etag, holder, age = _look(url)
        if not etag or age > LOST or holder.get("place") == _place():
            if mine := _put(url, **({"IfMatch": etag} if etag else {"IfNoneMatch": "*"})):
                return {"etag": mine}
        elif seen and etag != seen:
            who = f"process {holder.get('process')} on {holder.get('host')}"
            raise UserError(f"{url.rpartition('/')[0]} is in use by {who}: wait for it, or end it and try again")
        elif not is_told:
            is_told = True
            print(f"{url} is locked on {holder.get('host')}: waiting for a sign of life", file=sys.stderr, flush=True)
        seen = etag
        time.sleep(min(1.0, HEARTBEAT / 10))


def _look(url: str) -> tuple[str, dict[str, Any], float]:
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


def _put(url: str, **condition: str) -> str:
    """Write the lock object; its ETag, or "" where the condition does not hold."""
    from botocore.exceptions import ClientError

    bucket, key = s3.split(url)
    # The time makes every version another one.
    holder = {"host": socket.gethostname(), "process": os.getpid(), "place": _place(), "time": time.time_ns()}
    with explained(url):
        try:
            body = json.dumps(holder).encode()
            return client().put_object(Bucket=bucket, Key=key, Body=body, **condition)["ETag"].strip('"')
        except ClientError as error:
            if code(error) not in _CONFLICT:
                raise
            return ""


def _renew(url: str, held: dict[str, str], over: threading.Event) -> None:
    while not over.wait(HEARTBEAT):
        try:
            with patience(HEARTBEAT):
                etag = _put(url, IfMatch=held["etag"])
        except UserError:
            continue  # no connection: neither has anybody else
        if not etag and not over.is_set():
            line = f"{url} was taken over from elsewhere, since this process had no connection: it stops here"
            print(line, file=sys.stderr, flush=True)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as Ctrl-C: the state is saved
            return
        held["etag"] = etag


def _place() -> str:
    """Names the folder of working copies, and with it the machine whose file locks guard it."""
    path = local_root() / "s3" / ".place"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, uuid.uuid4().hex)
    return path.read_text()
