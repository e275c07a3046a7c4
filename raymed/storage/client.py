"""The S3 client of this process, patience with an endpoint that is down, and errors a person can act on.

Endpoint, region and credentials come by boto3's own chain: the AWS_* variables (also AWS_ENDPOINT_URL), profiles, the
machine's role. boto3 tries a request three times; then, in botocore's own hook for retries, it is tried again until the
endpoint has not answered for $RAYMED_S3_PATIENCE seconds (600). A part of a large file waits by itself, so an upload
goes on where it was when the server comes back.
"""

import logging
import math
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from raymed.config import UserError

CONNECTIONS = 32
PATIENCE = 600.0
READ_TIMEOUT = 30  # seconds without a byte
_ATTEMPTS = 3  # of boto3 itself, within about two seconds; nothing is said about these
_LONGEST_PAUSE = 5.0
_ANOTHER_OUTAGE = 60.0  # seconds after which a failure says nothing of one before
_BUSY = (429, 500, 502, 503, 504)
_short: ContextVar[float | None] = ContextVar("patience", default=None)
_state: dict[str, Any] = {}


def _forget() -> None:
    """A forked child makes a client of its own: connections cannot be shared."""
    _state.clear()
    _state.update(lock=threading.Lock(), variables=None, client=None, over=False)


_forget()
os.register_at_fork(after_in_child=_forget)


def client() -> Any:
    """boto3's client for the AWS_* variables as they are now; all threads of a process share it."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with _state["lock"]:
        if variables != _state["variables"]:
            _state.update(client=_connect(), variables=variables)
        return _state["client"]


def _connect() -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    for chatty in ("botocore.credentials", "botocore.httpchecksum", "botocore.regions"):
        logging.getLogger(chatty).setLevel(logging.WARNING)  # Ray's workers print what is meant for debugging
    retries: Any = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
    config = Config(
        retries=retries,
        max_pool_connections=CONNECTIONS,
        connect_timeout=5,
        read_timeout=READ_TIMEOUT,
        tcp_keepalive=True,
    )
    needed: Any = {name: "when_required" for name in ("request_checksum_calculation", "response_checksum_validation")}
    try:
        session = boto3.Session()
        made = session.client("s3", config=config)
        if ".amazonaws.com" not in made.meta.endpoint_url:  # some other servers do not take boto3's checksums
            made = session.client("s3", config=config.merge(Config(**needed)))
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"no way to S3 ({error}): check the AWS_ variables and the files in ~/.aws") from error
    made.meta.events.register("needs-retry.s3", _Patience(urlsplit(made.meta.endpoint_url).netloc))
    return made


def host() -> str:
    """Name (and port) of the S3 server, for messages."""
    return urlsplit(client().meta.endpoint_url).netloc


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Requests of this thread wait for at most so long while the endpoint does not answer."""
    token = _short.set(min(seconds, _allowed()))
    try:
        yield
    finally:
        _short.reset(token)


def give_up() -> None:
    """The process ends: no request waits any longer."""
    _state["over"] = True


def number(variable: str, default: float) -> float:
    """A number from an environment variable. Raises UserError for anything else, or below 0."""
    text = os.environ.get(variable) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise UserError(f"{variable} must be a number >= 0, got {text!r}")
    return value


def _allowed() -> float:
    short = _short.get()
    return number("RAYMED_S3_PATIENCE", PATIENCE) if short is None else short


class _Patience:
    """botocore calls it after every attempt of every request; what it returns is the pause before the next attempt."""

    def __init__(self, host: str):
        self.host = host
        self._has_complained = False
        self._down_since, self._last_failure = 0.0, -math.inf
        self._lock = threading.Lock()

    def __call__(
        self, response: Any, caught_exception: Any, attempts: int, request_dict: Any, **_: Any
    ) -> float | None:
        reason = _why_down(response, caught_exception)
        if reason is None:
            self._last_failure = -math.inf
            return self._say(False, f"S3 at {self.host} answers again")
        now = time.monotonic()
        since = min(self._since(now), request_dict["context"].setdefault("raymed_since", now))
        left = _allowed() - (now - since)
        if left <= 0 or _state["over"]:
            return None
        if attempts >= _ATTEMPTS:
            self._say(True, f"S3 at {self.host} does not answer ({reason}): trying for {_duration(left)} more")
        return min(_LONGEST_PAUSE, 0.2 * 2**attempts, left) * random.uniform(0.7, 1)

    def _since(self, now: float) -> float:
        """When the endpoint went down: who asks next does not wait for it all over again."""
        with self._lock:
            if now - self._last_failure > _ANOTHER_OUTAGE:
                self._down_since = now
            self._last_failure = now
            return self._down_since

    def _say(self, complaint: bool, line: str) -> None:
        with self._lock:
            if complaint != self._has_complained:
                self._has_complained = complaint
                print(line, file=sys.stderr, flush=True)


def _why_down(response: Any, error: Any) -> str | None:
    """Why this attempt failed, if a later one may not: no connection, no answer in time, or a server in trouble."""
    from botocore.exceptions import ConnectionError, HTTPClientError, SSLError

    if response is not None:
        status = response[0].status_code
        return f"status {status}" if status in _BUSY else None
    is_down = isinstance(error, ConnectionError | HTTPClientError) and not isinstance(error, SSLError)
    return type(error).__name__.removesuffix("Error") if is_down else None


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE,"
_REASONS = {
    "NoSuchBucket": "there is no bucket {bucket!r} at {host}: make it (aws s3 mb s3://{bucket}) or name another",
    "InvalidAccessKeyId": f"S3 at {{host}} does not know this access key: check {_KEYS} and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": f"S3 at {{host}} refuses the secret key: check {_KEYS} and AWS_ENDPOINT_URL",
    "ExpiredToken": f"the S3 credentials have expired: renew {_KEYS} with AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "S3 at {host} refuses requests from this machine: its clock is wrong; set it",
    "AccessDenied": "no permission for {operation} on {url}: give these credentials the right to read, write, list and "
    "delete there, or use others",
    "PermanentRedirect": "bucket {bucket!r} is in another region: set AWS_REGION to it",
    "NoSuchKey": "there is nothing at {url}",
}
_SAME = {"403": "AccessDenied", "404": "NoSuchKey", "InvalidToken": "ExpiredToken", "InvalidBucketName": "NoSuchBucket"}
_SAME |= {"AuthorizationHeaderMalformed": "PermanentRedirect", "301": "PermanentRedirect"}


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Whatever boto3 raises in the block becomes a UserError that says what is wrong and what to do."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as boto
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    try:
        yield
    except boto.ClientError as error:
        raise UserError(_reason(error, url)) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError) as error:
        raise UserError(
            f"no credentials for {url} ({error}): set {_KEYS} or run where the machine has a role"
        ) from error
    except (boto.ConnectionError, boto.HTTPClientError, RetriesExceededError) as error:
        raise UserError(f"S3 does not answer, {url} is out of reach ({error}): check AWS_ENDPOINT_URL") from error
    except (boto.BotoCoreError, Boto3Error, S3DownloadFailedError) as error:
        raise UserError(f"{url}: {error}") from error


def code(error: Any) -> str:
    """S3's name of an error, or the number of the HTTP status."""
    return error.response.get("Error", {}).get("Code", "")


def _reason(error: Any, url: str) -> str:
    template = _REASONS.get(_SAME.get(code(error), code(error)), f"{{operation}} on {{url}} failed: {error}")
    bucket = url.removeprefix("s3://").split("/")[0]
    return template.format(host=host(), url=url, bucket=bucket, operation=error.operation_name)
