"""A folder of a working copy and its place in S3, kept in step in both directions.

What was in step is on record (`raymed.storage.in_step`), which tells which side has changed. `pull` fetches what is new
there; where both sides have changed the remote wins, but of *.jsonl, which only ever grow, always the longer one.
`push` puts what has changed here, but no *.jsonl over a longer one from elsewhere. What others rely on comes last: bulk
files first, then *.json and *.jsonl in the order in which they were written. Removing a file here does not remove it
there.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar

from raymed.config import UserError
from raymed.storage import s3
from raymed.storage.client import give_up
from raymed.storage.in_step import Known, Stamp
from raymed.storage.leftovers import sweep
from raymed.storage.locations import in_step, push_files, remote_of

_OF_THIS_MACHINE = ("lock", "*.lock", "*.pid", "*.cursor.json", "*.tmp", ".*")
_FOLDERS_OF_THIS_MACHINE = ("cache", "ray")
_IN_ORDER = (".json", ".jsonl")
F = TypeVar("F", Path, s3.Object)


def is_synced(name: str, only: Sequence[str] | None = None) -> bool:
    """Whether a file of that name, relative to the mirrored folder, is kept in step.

    only: patterns, one of which it must match. Checkpoints bring their files up by themselves, in an order of their
    own: they take part only when they are asked for by a pattern.
    """
    *folders, file = PurePosixPath(name).parts
    if any(fnmatchcase(file, pattern) for pattern in _OF_THIS_MACHINE):
        return False
    if any(folder in _FOLDERS_OF_THIS_MACHINE or folder.startswith(".") for folder in folders):
        return False
    if only is None:
        return "checkpoints" not in folders
    return any(fnmatchcase(name, pattern) or fnmatchcase(f"/{name}", pattern) for pattern in only)


class Mirror:
    """A folder below LOCAL/s3 and what is at `url`. All methods may be called from any thread of its process.

    Several processes may have a mirror of the same folder, or of one inside it. An error of the thread that `follow`
    starts is raised by the next call of any method.
    """

    def __init__(self, folder: Path, url: str):
        self.folder, self.url = folder, url
        self._record = in_step()
        self._busy = threading.RLock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @classmethod
    def of(cls, folder: Path) -> "Mirror | None":
        """None for a folder that is no working copy."""
        url = remote_of(folder)
        return None if url is None else cls(folder, url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pull(self, only: Sequence[str] | None = None) -> list[str]:
        """Fetch what is new or changed there and remove what was removed there; returns the names.

        only: patterns of names, such as "**/tracking.jsonl"; `*` also matches `/`.
        """
        self._raise()
        with self._busy:
            sweep(self.folder)
            before = self._record.below(self.url)
            there = {found.url: found for found in self._listed(only)}
            known = self._record.below(self.url)  # what another process has put meanwhile is there and on record
            wanted = [found for found in there.values() if self._is_wanted(found, known.get(found.url))]
            gone = [url for url in before if url not in there and is_synced(self._name(url), only)]
            removed = [url for url in gone if self._drop(url, before[url])]
            return self._fetch(wanted) + [self._name(url) for url in removed]

    def push(self, only: Sequence[str] | None = None) -> list[str]:
        """Put what has changed here since it was in step; returns the names."""
        self._raise()
        with self._busy:
            known = self._record.below(self.url)
            names = (path for path in self._files() if is_synced(self._relative(path), only))
            stamps = {path: stamp for path in names if (stamp := Stamp.of(path)) is not None}
            changed = [path for path, stamp in stamps.items() if self._is_wanted_there(path, stamp, known)]
            batches = _batches(changed, lambda path: stamps[path].time)
            for done, batch in enumerate(batches):
                try:
                    push_files([(path, self._url(path)) for path in batch], self._record)
                except FileNotFoundError:  # removed meanwhile: the next push sees what there is
                    batches = batches[:done]
                    break
            return [self._relative(path) for batch in batches for path in batch]

    def follow(self, period: float = 5.0, pulled: Sequence[str] = ()) -> None:
        """Push every `period` seconds, in a thread, until `close`, and pull what has names of these patterns."""

        def work() -> None:
            while not self._over.wait(period):
                try:
                    if pulled:  # first: what another node has gone on with is not to be put as it was
                        self.pull(pulled)
                    self.push()
                    self._error = None
                except Exception as error:
                    if str(error) != str(self._error):
                        line = f"{self.folder} does not get to {self.url}: {error}\n"
                        print(line, end="", file=sys.stderr, flush=True)  # in one piece: others print too
                    self._error = error

        self._thread = threading.Thread(target=work, name="raymed-mirror", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Push a last time and stop following."""
        self._over.set()
        try:
            if self._thread is not None:
                self._thread.join()
                self._thread = self._error = None  # the push says what is wrong now
            self.push()
        except UserError as error:
            raise UserError(
                f"{error}. The results are kept in {self.folder}: the same command brings them to {self.url}"
            ) from error
        except (KeyboardInterrupt, SystemExit):
            give_up()
            raise

    def _raise(self) -> None:
        if threading.current_thread() is not self._thread:
            error, self._error = self._error, None
            if error is not None:
                raise error

    def _listed(self, only: Sequence[str] | None) -> list[s3.Object]:
        """What is there. A pattern with a beginning that is no pattern costs a short list."""
        prefixes = {""} if only is None else {re.split(r"[*?[]", pattern)[0] for pattern in only}
        found = [o for prefix in sorted(prefixes) for o in s3.listing(self.url, prefix)]
        return [o for o in found if is_synced(self._name(o.url), only)]

    def _is_wanted(self, there: s3.Object, known: Known | None) -> bool:
        """Whether the object takes the place of the file here."""
        path = self._path(there.url)
        here = Stamp.of(path)
        if here is None:
            return True
        if known is not None and (known.etag == there.etag or known.is_being_pushed()):
            return False
        if (known is None or known.stamp != here) and s3.matches(path, there.size, there.etag):
            self._record.put([(there.url, there.etag, here)])
            return False
        if path.suffix == ".jsonl" and there.size <= here.size:
            self._record.forget([there.url])  # so that it is pushed
            return False
        return True

    def _is_wanted_there(self, path: Path, here: Stamp, known: Mapping[str, Known]) -> bool:
        """Whether the file takes the place of the object."""
        url = self._url(path)
        before = known.get(url)
        if before is not None and here == before.stamp and before.pusher is None:  # its push was not cut off
            return False
        if path.suffix != ".jsonl":
            return True
        there = s3.stat(url)
        return there is None or there.size <= here.size or (before is not None and before.etag == there.etag)

    def _fetch(self, objects: list[s3.Object]) -> list[str]:
        """In the order of `push`; of what was put in one second the deeper comes first."""
        batches = _batches(objects, lambda found: (found.modified, -found.url.count("/")))
        for batch in batches:
            got = s3.download_many([(o.url, self._path(o.url)) for o in batch], sum(o.size for o in batch))
            stamps = [(found.url, found.etag, Stamp.of(self._path(found.url))) for found in got]
            self._record.put((url, etag, stamp) for url, etag, stamp in stamps if stamp is not None)
        return [self._name(found.url) for batch in batches for found in batch]

    def _drop(self, url: str, known: Known) -> bool:
        """Remove the file of an object that is gone, unless it has changed since."""
        if known.is_being_pushed():
            return False
        self._record.forget([url])
        path = self._path(url)
        if Stamp.of(path) != known.stamp:
            return False
        path.unlink(missing_ok=True)
        return True

    def _files(self) -> Iterator[Path]:
        for place, folders, names in os.walk(self.folder):
            folders[:] = sorted(f for f in folders if f not in _FOLDERS_OF_THIS_MACHINE and not f.startswith("."))
            yield from (Path(place, name) for name in sorted(names))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _url(self, path: Path) -> str:
        return f"{self.url}/{self._relative(path)}"

    def _name(self, url: str) -> str:
        return url.removeprefix(f"{self.url}/")

    def _path(self, url: str) -> Path:
        return self.folder / self._name(url)


def _batches(files: Sequence[F], age: Callable[[F], Any]) -> list[list[F]]:
    """All bulk files at once, then one by one, by age, those that say something of others."""
    in_order = [file for file in files if _path_of(file).endswith(_IN_ORDER)]
    bulk = [file for file in files if not _path_of(file).endswith(_IN_ORDER)]
    return [*([bulk] if bulk else []), *([file] for file in sorted(in_order, key=age))]


def _path_of(file: Path | s3.Object) -> str:
    return file.url if isinstance(file, s3.Object) else file.name
