"""The commands that a README states, as a shell would read them."""

import re
import shlex
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.ko.md")
FIVE = {"README.md": "Your own data in five commands", "README.ko.md": "내 데이터로 다섯 명령"}
"""README -> the heading of the section on own data."""


def sections(name: str) -> dict[str, str]:
    """Heading -> the text below it."""
    pieces = re.split(r"^## (.*)$", (REPO / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def commands(text: str) -> list[list[str]]:
    """The words of each `python jobs/...` in indented blocks, without comments and where output goes; lines that end
    in a backslash go on."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    blocks = [line for line in lines if line.startswith("    ")]
    jobs = [line.partition(" > ")[0] for line in blocks if line.strip().startswith("python jobs/")]
    return [shlex.split(line, comments=True) for line in jobs]


def five(name: str = "README.md") -> dict[str, list[list[str]]]:
    """Job -> the arguments of each of its commands in the section on own data."""
    found: dict[str, list[list[str]]] = {}
    for _, file, *arguments in commands(sections(name)[FIVE[name]]):
        found.setdefault(Path(file).stem, []).append(arguments)
    return found
