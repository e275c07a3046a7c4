"""Tokens of those who may ask: a file of names, hashes and ends. A token itself is told once, and kept nowhere.

{"tokens": [{"name": "pacs", "sha256": "...", "created": "2026-01-05T...", "expires": "2026-04-05T..."}]}
"""

import hashlib
import hmac
import json
import os
import secrets
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from raymed.config import UserError, check_range, to_dict, to_json
from raymed.serve.config import NAME, ServeConfig
from raymed.storage import lock, remote_of, storage_folder, write_private

ENVIRONMENT = "RAYMED_SERVE_TOKEN"
"""A single token, in place of a file or beside it; the log calls it by this name."""
_SHORTEST = 20
_LOOK_S = 1.0
"""Between two looks at whether the file has changed."""


@dataclass(frozen=True)
class Token:
    """What is kept of one. created, expires: ISO 8601, with time zone; expires "" = never."""

    name: str
    sha256: str
    created: str
    expires: str

    def __post_init__(self) -> None:
        if self.expires:
            datetime.fromisoformat(self.expires)

    def is_valid(self) -> bool:
        """Whether it has not expired."""
        return not self.expires or datetime.now(UTC) < datetime.fromisoformat(self.expires)


def tokens_file(file: str | Path | None = None, storage: str | None = None) -> Path:
    """The given one, or that of the storage; of a bucket that of this machine's copy, which no other machine sees."""
    return Path(file).expanduser() if file else storage_folder(storage) / "serve" / "tokens.json"


def check_is_shared(file: Path) -> None:
    """Raises UserError for a file of which every machine has its own."""
    if url := remote_of(file):
        raise UserError(
            f"{url} is in a bucket, and servers read tokens from a file: name one with --file (a change of {file} "
            "would be seen on this machine alone) and have the servers read it, access.tokens; a pod gets it from a "
            "mounted Secret"
        )


def add_token(file: Path, name: str, days: int) -> str:
    """A new token under a name that has none, valid for so many days. Raises UserError."""
    check_range("days", days, 1, 3650)
    if not NAME.fullmatch(name):
        raise UserError(f"a name of letters, digits and _ . - is expected, got {name!r}")
    token = f"raymed_{secrets.token_urlsafe(32)}"
    now = datetime.now(UTC).replace(microsecond=0)
    with _changing(file):
        others = read_tokens(file)
        if any(each.name == name for each in others):
            raise UserError(f"{name} has a token already: revoke it first, or take another name")
        new = Token(name, _hashed(token), now.isoformat(), (now + timedelta(days=days)).isoformat())
        _write(file, [*others, new])
    return token


def revoke_token(file: Path, name: str) -> None:
    """From now on nobody is known by it. Raises UserError where nobody was."""
    with _changing(file):
        before = read_tokens(file)
        if all(each.name != name for each in before):
            raise UserError(
                f"there is no token of {name!r}: there are {', '.join(each.name for each in before) or 'none'}"
            )
        _write(file, [each for each in before if each.name != name])


def read_tokens(file: Path) -> list[Token]:
    """All of them, also those that have expired; none where there is no file. Raises UserError for a file that cannot
    be read, or that others may write."""
    try:
        if os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & 0o022:
            raise UserError(f"other users may write {file}: chmod 600")
        return [Token(**entry) for entry in json.loads(file.read_text())["tokens"]]
    except FileNotFoundError:
        return []
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is no file of tokens ({type(error).__name__}): see jobs/serve_tokens.py") from None


class Tokens:
    """The valid tokens of a file, which is read again when it changes, and beside them one given as text."""

    def __init__(self, file: Path, single: str = ""):
        self.file = file
        self._single = [Token(ENVIRONMENT, _hashed(single), "", "")] if single else []
        self._seen = _state_of(file)
        self._looked = time.monotonic()
        self._all = [*read_tokens(file), *self._single]

    def valid(self) -> list[Token]:
        """Those that have not expired."""
        return [each for each in self._all if each.is_valid()]

    def name_of(self, token: bytes) -> str | None:
        """Whose it is; None where nobody is known by it. Takes as long whichever it is."""
        self._look()
        hashed, found = _hashed(token), None
        for each in self._all:
            if hmac.compare_digest(each.sha256, hashed):
                found = each
        return found.name if found is not None and found.is_valid() else None

    def _look(self) -> None:
        """A file that cannot be read lets nobody in, until a later look finds that it can."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked, state = now, _state_of(self.file)
        if state == self._seen:
            return
        try:
            found, self._seen = read_tokens(self.file), state
        except UserError:
            found, self._seen = [], None
        self._all = [*found, *self._single]


def tokens_of(config: ServeConfig) -> Tokens | None:
    """Of a server; None where anybody may ask. Raises UserError where nobody could."""
    if config.access.open:
        return None
    single = os.environ.get(ENVIRONMENT, "")
    if single and len(single) < _SHORTEST:
        raise UserError(f"{ENVIRONMENT} can be guessed: at least {_SHORTEST} characters are expected")
    tokens = Tokens(tokens_file(config.access.tokens, config.storage), single)
    if not tokens.valid() and config.access.client_ca is None:
        where = " --file FILE, and name it, --access.tokens FILE" if remote_of(tokens.file) else ""
        raise UserError(
            f"nobody could ask this server: there is no valid token in {tokens.file}. Make one, python "
            f"jobs/serve_tokens.py add NAME{where}, or let anybody on this machine ask, --access.open"
        )
    return tokens


def _state_of(file: Path) -> tuple[int, ...] | None:
    """Changes with the file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode


def _changing(file: Path):
    return lock(file.with_name(f".{file.name}.lock"))


def _write(file: Path, tokens: Sequence[Token]) -> None:
    write_private(file, to_json({"tokens": [to_dict(each) for each in tokens]}))


def _hashed(token: str | bytes) -> str:
    return hashlib.sha256(token.encode() if isinstance(token, str) else token).hexdigest()
