"""All images below a folder with their harmless tags, also from a file share that comes and goes.

A share that does not answer is asked again a few times, with growing waits. If it stays silent, what was scanned lies
in the checkpoint and the same call goes on from there.

    files in order of their names -> describe (header only) -> Found, or counted under why it is no image
"""

import difflib
import fnmatch
import functools
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO, TypeVar

from raymed.config import UserError, check_choice
from raymed.data.intake.header import COLUMNS, PATH_KEYS, SITE_TAGS, Found, describe, normal

__all__ = ["CLOSED", "COLUMNS", "FOREIGN", "LINK", "PATH_KEYS", "PATIENCE", "SITE_TAGS", "Found", "Scan"]
__all__ += ["Silent", "answers", "is_foreign", "patiently", "scan"]

T = TypeVar("T")

PATIENCE = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before a silent share is asked again."""
_FREE_TEXT = "series"
CLOSED, LINK = "cannot be opened", "link to a folder, not followed"
FOREIGN = "name is not UTF-8: mount the share with iocharset=utf8"


class Silent(UserError):
    """A share stopped answering: what lies there may be had again later."""


@dataclass(frozen=True)
class Scan:
    """found: the images, in order of their paths. others: why files are no images, with how many are so."""

    found: list[Found]
    others: dict[str, int]


@dataclass(frozen=True)
class _File:
    """A file in the list: path relative to the folder with "/", size in bytes, time of its last change in ns. closed:
    why it is not even looked at; "" where it is."""

    path: str
    size: int = 0
    changed: int = 0
    closed: str = ""


def scan(
    folder: str | Path,
    key: str = "AccessionNumber",
    *,
    patterns: Sequence[str] = ("*",),
    site: str = "",
    persons: Mapping[str, str] | None = None,
    checkpoint: Path | None = None,
    patience: Sequence[float] = PATIENCE,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    r"""Find and describe all images below a folder.

    Args:
        folder: the images' folder; on Windows also \\server\share\folder.
        key: DICOM keyword that links an image to its label, or "path", "name", "stem" (see `PATH_KEYS`).
        patterns: only files whose relative path matches one of them, such as "*.dcm" ("*" matches "/" too).
        site: DICOM keyword that becomes the column `site`, one of `SITE_TAGS`; "" = no such column.
        persons: Patient ID -> the one that stands for the person, for those with several.
        checkpoint: file that holds what was scanned until all is done, then removed. It holds identifiers: it belongs
            beside the key of the pseudonyms. None = an interrupted scan begins again.
        patience: seconds to wait before each further try.
        progress: called with (files scanned, files in all) after every file.

    Raises:
        UserError: there is no such folder, or no file in it that matches; key or site is no such tag.
        Silent: the share stopped answering (what was scanned is kept).
    """
    root = _folder(folder)
    _check_tags(key, site)
    try:
        files = [file for file in _files(root, patience) if file.closed or _matches(file.path, patterns)]
    except OSError as error:
        raise _silent(root, error, 0, None, checkpoint) from error
    if not files:
        raise UserError(f"{root} holds no file that matches {', '.join(map(repr, patterns))}: give the images' folder")
    with _Checkpoint(checkpoint, {"folder": str(root), "key": key, "site": site}) as done:
        for count, file in enumerate(files):
            if done.get(file) is None:
                try:
                    result = _describe(root, file, key, site, patience)
                except OSError as error:
                    raise _silent(root, error, count, len(files), checkpoint) from error
                done.add(file, result)
            if progress:
                progress(count + 1, len(files))
        results = [done.get(file) for file in files]
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    others = Counter(result for result in results if isinstance(result, str))
    found = [result for result in results if isinstance(result, Found)]
    return Scan(list(_without_rare_texts(found, persons or {})), dict(sorted(others.items())))


def _without_rare_texts(found: Sequence[Found], persons: Mapping[str, str]) -> Iterator[Found]:
    """The images without descriptions of a series that only one of several patients has: what nobody else has may be a
    name, also in letters that the header does not spell it in."""
    patients: dict[str, set[str]] = defaultdict(set)
    for image in found:
        patients[image.tags.get(_FREE_TEXT, "")].add(persons.get(image.patient, image.patient) or image.key)
    several = len(set().union(*patients.values())) > 1
    for image in found:
        if several and _FREE_TEXT in image.tags and len(patients[image.tags[_FREE_TEXT]]) == 1:
            tags = {name: value for name, value in image.tags.items() if name != _FREE_TEXT}
            image = replace(image, tags=tags, telling=(*image.telling, _FREE_TEXT))
        yield image


def _folder(folder: str | Path) -> Path:
    if os.name != "nt" and str(folder).startswith(("\\\\", "smb:")):
        share = str(folder).removeprefix("smb:").replace("\\", "/")
        share = f"//{share.lstrip('/')}"
        raise UserError(
            f"{folder} is a share of Windows: mount it on this machine (mount -t cifs {share} /mnt/images) and give "
            "that folder"
        )
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give the images' folder, and check that its share is connected")
    return root


def _check_tags(key: str, site: str) -> None:
    from pydicom.datadict import keyword_dict, tag_for_keyword

    if key not in PATH_KEYS and tag_for_keyword(key) is None:
        near = difflib.get_close_matches(key, keyword_dict, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{key!r} is no DICOM keyword{hint}; expected one such as 'AccessionNumber', or {PATH_KEYS}")
    if site:
        check_choice("site", site, SITE_TAGS)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(normal(path).casefold(), normal(pattern).casefold()) for pattern in patterns)


def _files(root: Path, patience: Sequence[float]) -> Iterator[_File]:
    """All files below the folder, in order of their names; links to folders are not followed."""
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            entries = patiently(functools.partial(_entries, root, below), patience)
        except OSError:
            if not below or not answers(root):
                raise
            yield _File(below, closed=CLOSED)
            continue
        yield from (entry for entry in entries if isinstance(entry, _File))
        pending += [entry for entry in reversed(entries) if isinstance(entry, str)]


def _entries(root: Path, below: str) -> list[_File | str]:
    """Files of a folder, and its folders as relative paths ending in "/"."""
    with os.scandir(root / below) as listing:
        entries: list[_File | str] = []
        for entry in sorted(listing, key=lambda entry: entry.name):
            if is_foreign(entry.name):
                shown = os.fsencode(f"{below}{entry.name}").decode("cp949", "replace")
                entries.append(_File(shown, closed=FOREIGN))
            elif entry.is_dir(follow_symlinks=False):
                entries.append(f"{below}{entry.name}/")
            elif entry.is_file():
                status = entry.stat()
                entries.append(_File(f"{below}{entry.name}", status.st_size, status.st_mtime_ns))
            else:
                entries.append(_File(f"{below}{entry.name}", closed=LINK if entry.is_dir() else CLOSED))
        return entries


def is_foreign(name: str) -> bool:
    """Whether a file's name holds bytes that are no UTF-8, as one in cp949 does."""
    return any("\udc80" <= sign <= "\udcff" for sign in name)


def _describe(root: Path, file: _File, key: str, site: str, patience: Sequence[float]) -> Found | str:
    if file.closed:
        return file.closed
    try:
        return patiently(functools.partial(describe, root / file.path, file.path, key, site), patience)
    except OSError:
        if not answers(root):
            raise
        return CLOSED


def patiently(call: Callable[[], T], patience: Sequence[float] = PATIENCE) -> T:
    """What `call` returns. Where a file share does not answer (an OSError), it is asked again after each of the waits.

    Raises:
        OSError: what the last try raises, or a refusal: PermissionError, IsADirectoryError.
    """
    for wait in patience:
        try:
            return call()
        except (PermissionError, IsADirectoryError):  # the share has answered
            raise
        except OSError:
            time.sleep(wait)
    return call()


def answers(root: Path) -> bool:
    """Whether the folder is still there. One that has lost its share may be there and empty."""
    try:
        with os.scandir(root) as listing:
            return next(listing, None) is not None
    except OSError:
        return False


def _silent(root: Path, error: OSError, done: int, total: int | None, checkpoint: Path | None) -> Silent:
    reached = "while its files were listed" if total is None else f"after {done} of {total} files"
    onward = "the same command goes on from there" if checkpoint and total else "start the same command again"
    reason = error.strerror or type(error).__name__
    return Silent(f"{root} stopped answering {reached} ({reason}): check the share or the network; then {onward}")


class _Checkpoint:
    """Results so far, kept in a file of JSON lines (mode 0600): first what was asked, then one line a file."""

    def __init__(self, path: Path | None, asked: dict[str, str]):
        self._path, self._asked = path, asked
        self._results: dict[_File, Found | str] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> "_Checkpoint":
        if self._path:
            self._file = self._open(self._path)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def get(self, file: _File) -> Found | str | None:
        return self._results.get(file)

    def add(self, file: _File, result: Found | str) -> None:
        self._results[file] = result
        if result != CLOSED:  # it may open another time
            self._write({"file": asdict(file), "result": result if isinstance(result, str) else asdict(result)})

    def _write(self, line: dict) -> None:
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def _open(self, path: Path) -> TextIO:
        lines = list(_json_lines(path)) if path.is_file() else []
        goes_on = lines[:1] == [{"asked": self._asked}]
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8")
        self._file = opened
        self._write({"asked": self._asked})
        for line in lines[1:] if goes_on else []:
            result = line["result"]
            found = result if isinstance(result, str) else Found(**result | {"telling": tuple(result["telling"])})
            self.add(_File(**line["file"]), found)
        return opened


def _json_lines(path: Path) -> Iterator[dict]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the last line, cut off
            return
