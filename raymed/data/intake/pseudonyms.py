"""Pseudonyms of patients, cases and images, and the vault that takes them back.

    identifier -> HMAC-SHA256(key, kind, identifier) -> base32 -> P-7F3K2Q4A

The same key gives the same pseudonym for ever, so a set may grow. Without the key nobody can try out identifiers; a
plain hash could be undone by hashing all 10^8 numbers of eight digits. HMAC: RFC 2104.

The vault lies beside the key and is encrypted with it. That is no protection against whoever has both, but a copy of
the vault alone, in a backup or an e-mail, says nothing: `whois` works only where the key is. Files are of mode 0600.
"""

import base64
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from raymed.config import UserError, check_choice
from raymed.data.intake.header import normal
from raymed.storage import lock, write_private

_KINDS = {"patient": ("P", 8), "case": ("C", 8), "image": ("I", 16)}
"""Letter and number of characters, 5 bits each: 100 000 patients collide with a probability of 0.5 %, and then it is
noticed (`Vault.add`)."""
PSEUDONYM = re.compile("[PC]-[A-Z2-7]{8}")
"""What the pseudonym of a patient or case looks like."""
_BYTES = 32


class Pseudonyms:
    """Gives pseudonyms under one key."""

    def __init__(self, key: bytes):
        self._key = key

    def of(self, kind: str, identifier: str) -> str:
        """The pseudonym of an identifier (NFC, spaces around it do not count), e.g. "P-7F3K2Q4A".

        Args:
            kind: "patient", "case" or "image": one number as each of them gives different pseudonyms.
        """
        check_choice("kind", kind, _KINDS)
        letter, length = _KINDS[kind]
        digest = hmac.digest(self._key, f"{kind}\0{normal(identifier)}".encode(), "sha256")
        return f"{letter}-{base64.b32encode(digest).decode()[:length]}"


class Vault:
    """Which identifiers a pseudonym stands for."""

    def __init__(self, key: bytes, path: Path):
        from cryptography.fernet import Fernet

        self._cipher = Fernet(base64.urlsafe_b64encode(hmac.digest(key, b"vault", "sha256")))
        self._path = path
        self._pseudonyms = Pseudonyms(key)

    def add(self, entries: Mapping[str, Iterable[str]]) -> None:
        """Remember identifiers, beside those that are known.

        A patient may have several, of which the pseudonym is that of one. Raises UserError where it is that of two
        patients, or one of a case or image would stand for two.
        """
        with lock(self._path.with_suffix(".lock")):
            known = self._read()
            for pseudonym, identifiers in entries.items():
                together = sorted({*known.get(pseudonym, []), *identifiers})
                own = {normal(one) for one in together if self._pseudonyms.of("patient", one) == pseudonym}
                if len(own if pseudonym.startswith("P-") else together) > 1:
                    raise UserError(f"two identifiers have the pseudonym {pseudonym}: import with another --key-file")
                known[pseudonym] = together
            write_private(self._path, self._cipher.encrypt(json.dumps(known, ensure_ascii=False).encode()))

    def whois(self, pseudonym: str) -> list[str]:
        """The identifiers behind it. Raises UserError where it is not known here."""
        known = self._read()
        if pseudonym not in known:
            raise UserError(f"{pseudonym} is not in {self._path}: was it made with another key?")
        return known[pseudonym]

    def _read(self) -> dict[str, list[str]]:
        from cryptography.fernet import InvalidToken

        if not self._path.is_file():
            return {}
        try:
            return json.loads(self._cipher.decrypt(self._path.read_bytes()))
        except InvalidToken as error:
            raise UserError(f"{self._path} is damaged or belongs to another key: bring both from one backup") from error


def default_key_file() -> Path:
    """$XDG_CONFIG_HOME/raymed/pseudonyms.key, else below ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "raymed" / "pseudonyms.key"


def vault_of(key_file: Path, key: bytes) -> Vault:
    """The vault beside a key."""
    return Vault(key, key_file.with_suffix(".vault"))


def open_vault(key_file: str | Path) -> Vault:
    """The vault of a key that is there. Raises UserError where it is not."""
    key_file = Path(key_file).expanduser().absolute()
    if not key_file.is_file():
        raise UserError(f"there is no key {key_file}: pseudonyms are taken back only where the key is (--key-file)")
    return vault_of(key_file, load_key(key_file))


def load_key(path: str | Path, apart_from: Iterable[Path] = ()) -> bytes:
    """The key in a file of 64 hexadecimal digits, which is made (mode 0600) where there is none.

    Args:
        apart_from: folders it must not lie in: the project's, the images'.

    Raises:
        UserError: it lies in one of them or in a git repository, others may read it, it is no key, or it is gone while
            its vault is still there.
    """
    path = Path(path).expanduser().absolute()
    _check_apart(path, apart_from)
    if not path.exists():
        if path.with_suffix(".vault").exists():
            raise UserError(
                f"{path} is gone, but its vault is there: a new key would give every patient a new pseudonym. Bring "
                "the key back from a backup, or move the vault away"
            )
        _create(path)
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(f"other users may read the key {path}: chmod 600, on a disk that keeps permissions")
    try:
        key = bytes.fromhex(path.read_text().strip())
    except ValueError:
        key = b""
    if len(key) != _BYTES:
        raise UserError(f"{path} is no key of {2 * _BYTES} hexadecimal digits: name the right file, or a new one")
    return key


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_bytes(_BYTES).hex() + "\n")
        file.flush()
        os.fsync(file.fileno())


def _check_apart(path: Path, folders: Iterable[Path]) -> None:
    real = path.resolve()
    repositories = [folder for folder in real.parents if (folder / ".git").exists()]
    for folder in [*folders, *repositories]:
        if real.is_relative_to(folder.expanduser().resolve()):
            raise UserError(
                f"the key {path} must not lie in {folder}, from where it would be shared with the data: give another "
                "--key-file"
            )
