"""The storage folder, and files that are there whole or not at all."""

import errno
import os
import tempfile
import uuid
from pathlib import Path

from raymed.config import UserError

_CHECK_SECONDS = 15.0  # a person waits


def storage_folder(location: str | Path | None = None) -> Path:
    """The absolute folder everything persistent lies under: `location`, else $RAYMED_HOME, else ~/.raymed; that of
    s3://BUCKET/PREFIX is its working copy (`raymed.storage.locations`). It need not exist."""
    given = str(location or os.environ.get("RAYMED_HOME") or "~/.raymed")
    if given.startswith("s3://"):
        from raymed.storage.locations import working_copy

        return working_copy(given)
    return Path(given).expanduser().absolute()


def resolve_storage(location: str | Path | None = None) -> Path:
    """`storage_folder`, created and tried out. Raises UserError when it cannot be written, or, of a bucket, deleted
    from, or is neither."""
    given = str(location or os.environ.get("RAYMED_HOME") or "")
    if "://" in given:
        _try_bucket(given)
        return _writable(storage_folder(given), "RAYMED_LOCAL")
    return _writable(storage_folder(location), "--storage PATH")


def _try_bucket(url: str) -> None:
    from raymed.storage import s3
    from raymed.storage.client import patience

    if not url.startswith("s3://"):
        raise UserError(
            f"--storage must be a folder (a mounted one for several nodes) or s3://BUCKET/PREFIX, got {url}"
        )
    probe = f"{url.rstrip('/')}/.raymed-{uuid.uuid4().hex}"
    with patience(_CHECK_SECONDS):
        s3.listing(url, limit=1)  # some servers would make a missing bucket when an object is put
        s3.put_bytes(probe, b"")
        s3.delete([probe])
    _check_endpoint(url)


def _check_endpoint(url: str) -> None:
    """Buckets of one name on two servers must not share a working copy. Those of AWS are one namespace."""
    from raymed.storage.client import host
    from raymed.storage.locations import working_copy
    from raymed.storage.s3 import split

    server = "amazonaws.com" if host().endswith(".amazonaws.com") else host()
    place = working_copy(f"s3://{split(url)[0]}") / ".endpoint"
    before = place.read_text() if place.is_file() else server
    if before != server:
        raise UserError(
            f"{place.parent} is the working copy of a bucket at {before}, and AWS_ENDPOINT_URL leads to {server}: set "
            f"RAYMED_LOCAL to another folder or, where it is the same server under another name, remove {place}"
        )
    _writable(place.parent, "RAYMED_LOCAL")
    write_atomic(place, server)


def not_written(path: str | Path, error: OSError) -> UserError:
    """What to say of a file that the disk does not take."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk of {path} is full: make room; the same command goes on")
    return UserError(f"{path} cannot be written: {error.strerror or error}")


def _writable(folder: Path, by: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {folder} ({reason}): give a writable folder with {by}") from error
    return folder


def write_private(path: str | Path, data: str | bytes) -> None:
    """`write_atomic` of a file that at any time only its owner can read; its folder, where there is none, is made so
    too. Raises UserError where the disk does not take it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(path, data, 0o600)
    except OSError as error:
        raise not_written(path, error) from error


def write_atomic(path: str | Path, data: str | bytes, mode: int = 0o666) -> None:
    """Write a file so that a reader, also after a crash, sees the old content or the new one, never a part.

    The data go to a temporary name in the same folder, to the disk, and then take the place of `path`, whose mode is
    `mode` less the umask from then on.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
