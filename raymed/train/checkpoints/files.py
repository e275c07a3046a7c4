"""One checkpoint on a disk: a folder of safetensors and a `state.json` that says what is in it.

`state.json` holds the progress of the phase, the sha256 and the size of every file, and a seal: the sha256 of all that
it says itself, so a flipped byte is found in it too. The folder is written under a temporary name, brought to the disk
and renamed: a killed process, a full disk or a power cut leaves a whole folder or none of that name.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from raymed.config import UserError
from raymed.storage import remote_of, write_atomic

STATE = "state.json"
_SEAL = "seal"


def write_folder(folder: Path, files: dict[str, dict[str, Tensor]], progress: dict[str, Any]) -> None:
    """Write files (name -> tensors by name, on the CPU) and their state. `folder` must not be in use.

    Raises OSError, e.g. where the disk is full, and leaves nothing behind then.
    """
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, tensors in files.items():
            _write(temporary / name, tensors)
        found = {name: temporary / name for name in files}
        state = progress | {
            "sha256": {name: _sha256(path) for name, path in found.items()},
            "bytes": {name: path.stat().st_size for name, path in found.items()},
        }
        write_atomic(temporary / STATE, sealed(state))
        sync(temporary)
        os.replace(temporary, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """What `state.json` says. Raises UserError where there is none or it is damaged."""
    path = folder / STATE
    if not path.is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no {STATE}")
    state = unsealed(path.read_bytes())
    if state is None:
        raise damaged(path, "it is not what was written")
    return state


def read_tensors(folder: Path, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of one file, memory-mapped: the processes of a machine share what they only read.

    Raises UserError where it is not the file that was written.
    """
    from safetensors.torch import load_file

    path = folder / name
    if problem := misfit(path, state):
        raise damaged(path, problem)
    if _sha256(path) != state["sha256"][name]:
        raise damaged(path, f"its sha256 is not the one in {STATE}")
    return load_file(path)


def misfit(path: Path, state: dict[str, Any]) -> str | None:
    """What is wrong with a file by its size alone, or None."""
    if not path.is_file():
        return "it is missing"
    size, written = path.stat().st_size, state["bytes"][path.name]
    return None if size == written else f"it has {size} bytes, and {written} were written"


def damaged(path: Path, how: str) -> UserError:
    """What to say of a file of a checkpoint that cannot be trusted."""
    url = remote_of(path.parent)
    again = f" (it is fetched from {url} again; if that one is damaged too, remove both)" if url else ""
    return UserError(
        f"{path} is damaged: {how}. Remove that checkpoint, the folder {path.parent}{again}: the run goes on from the "
        "one before, if there is one, else the phase begins again"
    )


def sealed(content: dict[str, Any]) -> str:
    """JSON that `unsealed` can check."""
    return json.dumps(content | {_SEAL: _hash_of(content)}, indent=2) + "\n"


def unsealed(text: bytes) -> dict[str, Any] | None:
    """The content of `sealed` text, or None where it is not what was sealed."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    seal = content.pop(_SEAL, None)
    return content if seal == _hash_of(content) else None


def sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """`save_file` lets the other threads run and needs no memory, where `save` does neither; but it says what went
    wrong in words only, and lets only its owner read the file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
        raise
    path.chmod(path.parent.stat().st_mode & 0o666)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
