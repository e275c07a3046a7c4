"""Commands on other machines, by the `ssh` program of this one, with its own ideas of keys, jump hosts and agents.

Nobody is asked anything: a password, an unknown host or a key with a passphrase that no agent holds is an error.
Secrets go by standard input, since command lines can be seen by everybody on both machines.
"""

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from raymed.config import UserError

T = TypeVar("T")
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "StrictHostKeyChecking": "yes",
    "UpdateHostKeys": "no",
}
_SECONDS = 120.0
_AT_ONCE = 32


class Failed(UserError):
    """A command ended with another code than 0, or the machine could not be reached (`code` is None)."""

    def __init__(self, message: str, code: int | None = None):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Host:
    """A machine, as ssh names it: [USER@]NAME.

    key: the private key's file; default: what ssh finds. config: a file in place of ~/.ssh/config.
    """

    name: str
    key: str | None = None
    config: str | None = None

    def run(self, script: str, data: bytes = b"", seconds: float = _SECONDS) -> str:
        """What a script of sh prints there. data: its standard input. Raises Failed, with what it said last."""
        command = [*self._ssh("ControlMaster=auto", f"ControlPath={_sockets()}/%C", "ControlPersist=20"), self.name]
        try:
            done = subprocess.run(
                [*command, f"exec sh -c {shlex.quote(script)}"], input=data, capture_output=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.name}: no end after {seconds:g} s") from None
        said = done.stderr.decode(errors="replace").strip()
        if done.returncode == 255:
            raise Failed(f"{self.name}: {_reason(said, self.name)}")
        if done.returncode:
            shown = "\n".join((said or done.stdout.decode(errors="replace")).splitlines()[-15:])
            raise Failed(f"{self.name}: {shown or f'exit code {done.returncode}'}", done.returncode)
        return done.stdout.decode(errors="replace")

    def tunnel(self, here: int, there: str) -> list[str]:
        """What leads 127.0.0.1:here of this machine to `there` (ADDRESS:PORT), as that machine knows it."""
        forward = ["-N", "-L", f"127.0.0.1:{here}:{there}"]
        return [*self._ssh("ExitOnForwardFailure=yes", "ControlPath=none"), *forward, self.name]

    def _ssh(self, *options: str) -> list[str]:
        given = [*(f"{name}={value}" for name, value in _OPTIONS.items()), *options]
        words = ["ssh", *(["-F", self.config] if self.config else [])]
        words += ["-i", self.key, "-o", "IdentitiesOnly=yes"] if self.key else []
        return [*words, *(word for option in given for word in ("-o", option))]


def check_here(key: Path | None, config: Path | None) -> None:
    """Raises UserError where this machine cannot begin: no ssh, no key, a key that ssh would refuse."""
    if shutil.which("ssh") is None:
        raise UserError("ssh is not on this machine's PATH: apt install openssh-client")
    if config is not None and not config.is_file():
        raise UserError(f"--ssh-config {config} is not there")
    if key is None:
        return
    if not key.is_file():
        raise UserError(f"--key {key} is not there: name the file of a private key; `ssh-keygen -t ed25519` makes one")
    if key.stat().st_mode & 0o077:
        raise UserError(f"--key {key} can be read by others, so ssh does not use it: chmod 600 {key}")


def on_each(items: Iterable[T], do: Callable[[T], object]) -> None:
    """Do something for each at the same time. Raises one UserError that tells of all that failed."""
    errors: list[str] = []

    def attempt(item: T) -> None:
        try:
            do(item)
        except UserError as error:
            errors.append(str(error))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(attempt, items))
    if errors:
        raise UserError("\n".join(sorted(errors)))


def _sockets() -> Path:
    """Where connections that are used again have their sockets, whose paths must be short; for this user alone."""
    folder = Path(tempfile.gettempdir(), f"raymed-ssh-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise UserError(f"{folder} can be used by others: remove it")
    return folder


def _reason(said: str, name: str) -> str:
    """Why ssh did not get there, and what to do."""
    plain = name.rpartition("@")[2]
    for words, remedy in {
        "IDENTIFICATION HAS CHANGED": "its host key is another one than before. Where it was installed anew: "
        f"ssh-keygen -R {plain}; else somebody may be in between",
        "Host key verification failed": f"its host key is not known here: `ssh {name}` once, and compare the "
        "fingerprint with what `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints at its own console",
        "Permission denied": "it does not take the key: give another with --key, put the passphrase into ssh-agent, or "
        f"ssh-copy-id {name}",
        "Could not resolve": "nobody knows this name: give an address",
    }.items():
        if words in said:
            return remedy
    last = said.splitlines()[-1] if said else "ssh ended without a word"
    return f"cannot be reached ({last}): is it on, does sshd run, does a firewall let port 22 through?"
