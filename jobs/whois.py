"""Say whom pseudonyms stand for, where the key of the import is.

    python jobs/whois.py P-7F3K2Q4A C-2XQ7M4TD

A patient gives the identifiers in the images and the sheet, a case its key, an image its file. What is printed names
patients: it belongs in no log.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from raymed.command import command
from raymed.data.intake.pseudonyms import default_key_file, open_vault


@dataclass(frozen=True)
class WhoIs:
    """Which pseudonyms, under which key."""

    pseudonyms: tyro.conf.Positional[tuple[str, ...]]
    """P-... of a patient, C-... of a case, I-... of an image."""
    key_file: Path | None = None
    """The key of the import; None = ~/.config/raymed/pseudonyms.key."""


def work(config: WhoIs) -> str:
    """A line a pseudonym."""
    vault = open_vault(config.key_file or default_key_file())
    return "\n".join(f"{name}: {', '.join(vault.whois(name))}" for name in config.pseudonyms)


if __name__ == "__main__":
    command(WhoIs, work)
