"""SHA256SUMS of a folder, in the form that `sha256sum --check` reads: what was changed, lost or added since is named.

Needs Python alone: an offline pack carries a copy of this file.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

FILE = "SHA256SUMS"
IGNORE = ".gitignore"
"""Of the folder itself. It has no sum: `cp FOLDER/* TO` leaves it behind."""


def of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path) -> str:
    """Write the sums of all files of a folder into it; returns the sha256 of that list."""
    lines = [f"{of(folder / name)}  {name}\n" for name in _names(folder)]
    (folder / FILE).write_text("".join(lines))
    return of(folder / FILE)


def damage(folder: Path) -> list[str]:
    """What is not as it was when the sums were written, a phrase a file. Raises OSError where there are no sums."""
    lines = (folder / FILE).read_text(errors="replace").splitlines()
    known = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
    there = set(_names(folder))
    found = [f"{name} is missing" for name in known if name not in there]
    found += [f"{name} was added" for name in sorted(there - known.keys())]
    return found + [f"{name} is damaged" for name in known if name in there and of(folder / name) != known[name]]


def _names(folder: Path) -> Iterator[str]:
    """Relative names of all files but the list itself and the folder's IGNORE; of Python's caches none."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        names = sorted(Path(place, file).relative_to(folder).as_posix() for file in files)
        yield from (name for name in names if name not in (FILE, IGNORE))
