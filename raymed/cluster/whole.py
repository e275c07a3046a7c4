"""A folder for others that is there whole, with the sums of its files, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raymed.cluster import sums
from raymed.config import UserError
from raymed.storage.leftovers import sweep, temporary
from raymed.storage.paths import not_written

_EVERYTHING = "*\n"


@contextmanager
def new_folder(folder: Path, mode: int = 0o755) -> Iterator[Path]:
    """Within: a folder beside `folder`, which takes its place at the end, with the sums of its files; where the block
    fails it goes. mode: of the folder. Raises UserError where `folder` is not new, or the disk is full."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent, deep=False)
        making = temporary(folder)
        making.mkdir(mode=mode)
        try:
            keep_out(making)
            yield making
            sums.write(making)
            os.replace(making, folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        raise not_written(folder, error) from error


def keep_out(folder: Path) -> None:
    """Let git, and what goes to other machines (`outgoing.files`, jobs), pass over a folder that may lie in the
    project's. A .gitignore that is there stays."""
    if not (folder / sums.IGNORE).exists():
        (folder / sums.IGNORE).write_text(_EVERYTHING)


def check(folder: Path, what: str) -> None:
    """Raise UserError unless every file of a folder is as it was written. what: it should be, as "backup"."""
    try:
        found = sums.damage(folder)
    except OSError as error:
        raise UserError(f"{folder} is no {what}: {error.filename}: {error.strerror}") from None
    if found:
        told = "\n".join(f"  {phrase}" for phrase in found)
        raise UserError(f"{folder} is not the {what} that was written:\n{told}\nbring these files again")
