"""S3 objects: list, read, write, delete, and files up and down in parts and in parallel.

A file up to one part long is one request. A longer one goes in parts, side by side (boto3's transfer manager). A
download takes its place when it is complete. Every error is a UserError (`raymed.storage.client`).
"""

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from raymed.config import UserError
from raymed.storage.client import client, code, explained, give_up
from raymed.storage.leftovers import temporary
from raymed.storage.paths import not_written

PART = 16 * 2**20  # bytes
THREADS = 16
_SHOWN_BYTES, _SHOWN_FILES = 64 * 2**20, 200  # from here on a person at a terminal sees a progress bar
_TRIES = 3  # of a whole file, where the object changes under the reader or the server has lost an upload's first parts
_CONFLICT = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404")
T = TypeVar("T")
Progress = Callable[[int], None]  # is told of bytes that have gone through, also of some that have to go again (< 0)


@dataclass(frozen=True)
class Object:
    """An object that is there."""

    url: str
    size: int
    etag: str
    """Names its content; without quotes."""
    modified: float
    """Seconds since the epoch, by the server's clock, which has whole seconds."""


def split(url: str) -> tuple[str, str]:
    """s3://BUCKET/KEY -> (BUCKET, KEY). Raises UserError for anything else; KEY may be empty."""
    scheme, _, rest = str(url).partition("://")
    bucket, _, key = rest.partition("/")
    parts = key.removesuffix("/").split("/") if key else []
    if scheme != "s3" or not bucket or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"expected s3://BUCKET/PATH, got {url}")
    return bucket, key


def stat(url: str) -> Object | None:
    """What is at a URL, or None."""
    from botocore.exceptions import ClientError

    bucket, key = split(url)
    if not key:
        return None
    with explained(url):
        try:
            return _object(url, client().head_object(Bucket=bucket, Key=key))
        except ClientError as error:
            if code(error) not in ("404", "NoSuchKey"):
                _raise_with_reason(bucket, key, error)
    return None


def _raise_with_reason(bucket: str, key: str, error: Exception) -> None:
    """The answer to HEAD has no text: ask again in a way that has."""
    client().get_object(Bucket=bucket, Key=key)["Body"].close()
    raise error


def _object(url: str, response: dict[str, Any]) -> Object:
    etag = response["ETag"].strip('"')
    return Object(url, response["ContentLength"], etag, response["LastModified"].timestamp())


def listing(url: str, prefix: str = "", limit: int | None = None) -> list[Object]:
    """The objects below the folder `url` (recursive) whose names there start with `prefix`, in order of their names.

    limit: no more than so many.
    """
    bucket, key = split(url)
    folder = f"{key.removesuffix('/')}/" if key else ""
    with explained(url):
        pages = client().get_paginator("list_objects_v2")
        pages = pages.paginate(Bucket=bucket, Prefix=folder + prefix, PaginationConfig={"MaxItems": limit})
        entries = [entry for page in pages for entry in page.get("Contents", [])]
    return [
        Object(f"s3://{bucket}/{e['Key']}", e["Size"], e["ETag"].strip('"'), e["LastModified"].timestamp())
        for e in entries
        if not e["Key"].endswith("/")  # what some tools make for an empty folder
    ]


def put_bytes(url: str, data: bytes) -> str:
    """Write an object whole and return its ETag."""
    bucket, key = split(url)
    with explained(url):
        return client().put_object(Bucket=bucket, Key=key, Body=data)["ETag"].strip('"')


def put_if(url: str, data: bytes, etag: str) -> str:
    """Write an object in the place of its version `etag` ("": of none); its new ETag, or "" where it is not that one.

    The answer to a request that was carried out may be lost: the second try then finds its own work, and says "" too.
    """
    from botocore.exceptions import ClientError

    bucket, key = split(url)
    condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
    with explained(url):
        try:
            return client().put_object(Bucket=bucket, Key=key, Body=data, **condition)["ETag"].strip('"')
        except ClientError as error:
            if code(error) not in _CONFLICT:
                raise
            return ""


def get_bytes(url: str) -> bytes:
    """Read an object whole."""
    buffer = io.BytesIO()
    with _manager() as manager, explained(url):
        bucket, key = split(url)
        manager.download(bucket, key, buffer).result()
    return buffer.getvalue()


def delete(urls: Sequence[str]) -> None:
    """Remove objects; one that is not there is as good as removed."""

    def remove(url: str) -> None:
        bucket, key = split(url)
        with explained(url):
            client().delete_object(Bucket=bucket, Key=key)

    _parallel(remove, urls)


def upload(path: Path, url: str) -> Object:
    """Put a file at a URL. One that is replaced meanwhile goes as it was; one that grows, as far as it has come."""
    return upload_many([(path, url)])[0]


def upload_many(pairs: Sequence[tuple[Path, str]]) -> list[Object]:
    """Put files at URLs, side by side."""
    total = sum(path.stat().st_size for path, _ in pairs)
    with _manager() as manager, _progress("to S3", len(pairs), total) as progress:
        return _parallel(lambda pair: _upload(pair[0], pair[1], manager, progress), pairs)


def _upload(path: Path, url: str, manager: Any, progress: Progress) -> Object:
    bucket, key = split(url)
    with path.open("rb") as file:  # opened once: what takes its place meanwhile is another file
        size = os.fstat(file.fileno()).st_size
        if size <= PART:
            data = file.read(size)
            etag = put_bytes(url, data)
            progress(len(data))
            return Object(url, len(data), etag, 0.0)
        with explained(url):
            _tried(lambda: manager.upload(file, bucket, key, subscribers=_told(progress)).result(), file)
    found = stat(url)
    if found is None or found.size < size:
        raise UserError(f"{url} is not what was put there ({path}, {size} bytes): something else writes it too")
    return found


def download(url: str, path: Path) -> Object:
    """Fetch an object to a file: it is there whole, or as before."""
    found = stat(url)
    if found is None:
        raise UserError(f"there is nothing at {url}")
    return download_many([(url, path)], found.size)[0]


def download_many(pairs: Sequence[tuple[str, Path]], total: int = 0) -> list[Object]:
    """Fetch objects to files, side by side. total: bytes of all, where they are known, for the progress bar."""
    with _manager() as manager, _progress("from S3", len(pairs), total) as progress:
        return _parallel(lambda pair: _download(pair[0], pair[1], manager, progress), pairs)


def _download(url: str, path: Path, manager: Any, progress: Progress) -> Object:
    bucket, key = split(url)
    arriving = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with explained(url):
            meta = _tried(lambda: _result(manager.download(bucket, key, str(arriving), subscribers=_told(progress))))
        if arriving.stat().st_size != meta.size:
            raise UserError(f"{url} came with {arriving.stat().st_size} of {meta.size} bytes: try again")
        os.replace(arriving, path)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):
            arriving.unlink()
    return Object(url, meta.size, (meta.etag or _EMPTY).strip('"'), 0.0)


_EMPTY = hashlib.md5(b"", usedforsecurity=False).hexdigest()  # s3transfer knows no ETag of an empty object


def _result(future: Any) -> Any:
    future.result()
    return future.meta


def _tried(transfer: Callable[[], T], file: Any = None) -> T:
    """Run a transfer, from the start again where it cannot be continued."""
    from botocore.exceptions import ClientError
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    for _ in range(_TRIES - 1):
        try:
            return transfer()
        except (S3DownloadFailedError, RetriesExceededError):
            pass
        except ClientError as error:
            if code(error) != "NoSuchUpload":
                raise
        if file:
            file.seek(0)
    return transfer()


@contextmanager
def _manager() -> Iterator[Any]:
    """Moves the parts of large files; what still moves when the block fails is given up."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    config = TransferConfig(
        multipart_threshold=PART + 1,
        multipart_chunksize=PART,
        max_concurrency=THREADS,
        preferred_transfer_client="classic",
    )
    with create_transfer_manager(client(), config) as manager:
        yield manager


def _told(progress: Progress) -> list[Any]:
    from s3transfer.subscribers import BaseSubscriber

    class Told(BaseSubscriber):
        def on_progress(self, future: Any, bytes_transferred: int, **kwargs: Any) -> None:
            progress(bytes_transferred)

    return [Told()]


def _parallel(work: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """Results in the order of the items; the first error ends it, and what has not begun is left."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(THREADS, len(items)), "raymed-s3") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C
                give_up()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _progress(what: str, files: int, size: int) -> Iterator[Progress]:
    """A progress bar for a person, where there is something to wait for; it counts bytes."""
    if not sys.stderr.isatty() or (size <= _SHOWN_BYTES and files <= _SHOWN_FILES):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{files} files {what}" if files > 1 else what, total=size or None)
        yield lambda count: bar.advance(task, count)


def matches(path: Path, size: int, etag: str) -> bool:
    """True if a file has the content of an object of that size and ETag that raymed has put there.

    An ETag is the MD5 of the object, or that of its parts' MD5s and their number. A server that encrypts has others:
    then it says False.
    """
    if path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        if "-" not in etag:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == etag
        digests = [hashlib.md5(part, usedforsecurity=False).digest() for part in _parts(file)]
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}" == etag


def _parts(file: Any) -> Iterable[bytes]:
    return iter(lambda: file.read(PART), b"")
