"""Who may ask a server: make, list and revoke tokens. A running server sees the change within a second.

    python jobs/serve_tokens.py add pacs --days 90          # prints the token, once: it is stored nowhere
    python jobs/serve_tokens.py list
    python jobs/serve_tokens.py revoke pacs

Requests bear it as Authorization: Bearer TOKEN. The file (--file; by default tokens.json in the storage's folder serve,
as --access.tokens of the server) holds names, hashes and ends. Where the storage is a bucket it has to be named, in
both places.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raymed.command import command
from raymed.serve.access.tokens import add_token, check_is_shared, read_tokens, revoke_token, tokens_file


@dataclass(frozen=True)
class Place:
    """Where the tokens are."""

    file: Path | None = None
    """File of tokens, as --access.tokens of the server; None = tokens.json in the storage's folder serve."""
    storage: str | None = None
    """Where raymed keeps things; None = $RAYMED_HOME, else ~/.raymed."""

    def path(self) -> Path:
        """The file. Raises UserError for one that no server would read."""
        path = tokens_file(self.file, self.storage)
        if self.file is None:
            check_is_shared(path)
        return path


@dataclass(frozen=True)
class Add(Place):
    """Make a token and print it."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")] = tyro.MISSING
    """Name of whoever asks, such as pacs or reading-room; it stands in the server's log."""
    days: int = 90
    """Days for which the token is valid."""

    def __call__(self) -> str:
        return add_token(self.path(), self.name, self.days)


@dataclass(frozen=True)
class List(Place):
    """Print names, and when each token was made and ends."""

    def __call__(self) -> str:
        tokens = read_tokens(self.path())
        lines = [f"{t.name:24} {t.created}  {t.expires}{'' if t.is_valid() else '  expired'}" for t in tokens]
        return "\n".join([f"{'name':24} {'made':25}  until", *lines]) if lines else f"no tokens in {self.path()}"


@dataclass(frozen=True)
class Revoke(Place):
    """Make a token worthless: whoever bears it is refused from now on."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")] = tyro.MISSING
    """Name that the token was made for."""

    def __call__(self) -> str:
        revoke_token(self.path(), self.name)
        return f"revoked: {self.name}"


@dataclass(frozen=True)
class ServeTokens:
    """What to do."""

    do: Annotated[Add | List | Revoke, tyro.conf.arg(name="")]


if __name__ == "__main__":
    command(ServeTokens, lambda config: config.do())
