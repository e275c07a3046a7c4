"""The checkpoints of a phase in an S3 bucket: the same folders and the same index as on the disk.

A folder is put there file by file, its `state.json` last, and then the index that names it: what the index does not
name is not a checkpoint. A folder comes here under a temporary name and is renamed when all of it is there.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from raymed.config import UserError
from raymed.storage import join, s3
from raymed.train.checkpoints.files import STATE, misfit, sync, unsealed
from raymed.train.checkpoints.index import Index

_INDEX = "index.json"


class Bucket:
    """One folder of checkpoints and its URL. Every request waits out a server that is down (`raymed.storage.s3`)."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.url = folder, url

    def index(self) -> Index:
        """The checkpoints that are whole there."""
        return self._index()[0]

    def _index(self) -> tuple[Index, str]:
        """What is whole there, and the ETag of the index, which is at most as new as what was read; "" for none."""
        found = s3.stat(self._url(_INDEX))
        if found is None:
            return Index(), ""
        index = Index.parse(s3.get_bytes(self._url(_INDEX)))
        if index is None:
            raise UserError(
                f"{self._url(_INDEX)} is damaged. Remove it, and what is on this machine is put there again"
            )
        return index.within({name for name in index.names() if s3.stat(self._url(name, STATE))}), found.etag

    def put(self, index: Index) -> Index:
        """Bring there what the index names, then the index, and remove what it does not name.

        Returns the index that is there now: what somebody pinned there stays. Raises UserError where somebody else has
        come further there.
        """
        index = self._put_index(index)
        kept = index.names() | {_INDEX}
        below = {found.url: found.url.removeprefix(f"{self.url}/").split("/")[0] for found in s3.listing(self.url)}
        s3.delete([url for url, name in below.items() if name not in kept])
        return index

    def _put_index(self, index: Index) -> Index:
        """With the folders before it, and again where the index has changed meanwhile."""
        while True:
            there, etag = self._index()
            if there.step > index.step:
                raise UserError(
                    f"another process writes to {self.url}: it has come to {there.last}, and this one to {index.last}. "
                    "End one of the two, and try again"
                )
            index = replace(index, pinned=there.pinned | index.pinned)
            for name in sorted(index.names() - there.names()):
                self._put_folder(name)
            if s3.put_if(self._url(_INDEX), index.text().encode(), etag):
                return index

    def _put_folder(self, name: str) -> None:
        files = sorted(path for path in (self.folder / name).iterdir() if path.name != STATE)
        s3.upload_many([(path, self._url(name, path.name)) for path in files])
        s3.upload(self.folder / name / STATE, self._url(name, STATE))

    def take(self, names: set[str]) -> None:
        """Bring here those of these checkpoints that are not here."""
        for name in sorted(names):
            if not (self.folder / name).is_dir():
                self._take_folder(name)

    def _take_folder(self, name: str) -> None:
        temporary = self.folder / f".{name}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            found = s3.listing(self._url(name))
            s3.download_many([(one.url, temporary / one.url.rsplit("/", 1)[1]) for one in found])
            self._check(temporary, name)
            sync(temporary)
            os.replace(temporary, self.folder / name)
        except OSError as error:
            raise UserError(
                f"{self._url(name)} cannot be brought to {self.folder}: {error.strerror or error}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _check(self, folder: Path, name: str) -> None:
        """Raises UserError unless every file of the checkpoint has come, in its length."""
        state = unsealed((folder / STATE).read_bytes())
        problems = {STATE: "it is not what was written"}
        if state is not None:
            problems = {file: misfit(folder / file, state) for file in state["bytes"]}
        for file, problem in problems.items():
            if problem:
                raise UserError(
                    f"{self._url(name, file)} is damaged: {problem}. Remove {self._url(name)}: the run goes on from "
                    "the checkpoint before, if there is one, else the phase begins again"
                )

    def _url(self, *names: str) -> str:
        return str(join(self.url, *names))
