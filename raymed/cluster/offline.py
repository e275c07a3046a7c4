"""One folder from which raymed installs on machines without internet.

    python -m raymed.cluster.offline pack DIR --extras all --weights FOLDER
    python -m raymed.cluster.offline check DIR

Run it in the project folder, on Linux, with the Python version of the machines it is for.

    DIR/wheels/          every package, as wheels for a named platform; raymed's own too
    DIR/raymed-*.tar.gz  the project: jobs, cluster files, documentation
    DIR/weights/NAME/    weights and tokenizers
    DIR/licences/        LICENCES.md, and the texts that the packages carry
    DIR/pack.json        what it is for
    DIR/SHA256SUMS       of every other file
    DIR/install.py       installs, from this folder alone (`make install OFFLINE=DIR`)
"""

import platform as machine
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email import message_from_string
from email.message import Message
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from raymed.cluster import outgoing, sums
from raymed.cluster.whole import check, new_folder
from raymed.command import command
from raymed.config import UserError, check_choice, to_json

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PROJECT = (".gitignore", ".rayignore", "ARCHITECTURE.md", "LICENSE", "Makefile", "README.md", "README.ko.md", "cluster")
PROJECT += ("docs", "jobs", "pyproject.toml", "raymed")
_SOURCES = ("deepspeed",)  # which the index has as source alone; a wheel of it runs anywhere
_OLD_TAGS = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
_PLATFORM = re.compile(r"manylinux_2_(\d+)_(x86_64|aarch64)")
_SHOWN = 1500  # characters of what pip complains


@dataclass(frozen=True)
class Pack:
    """Make a pack in a new folder. It takes some minutes and 0.6 GB with CPU torch, several with CUDA."""

    folder: Positional[Annotated[str, arg(metavar="DIR")]]
    """The new folder."""
    platform: str = f"manylinux_2_28_{machine.machine()}"
    """manylinux_2_GLIBC_MACHINE of the oldest system that it is for."""
    extras: tuple[str, ...] = ("all",)
    """Of pyproject.toml."""
    weights: tuple[str, ...] = ()
    """Folders of weights and tokenizers, as `hf download ORG/NAME --local-dir FOLDER` leaves them."""

    def __post_init__(self) -> None:
        if not _PLATFORM.fullmatch(self.platform):
            raise UserError(f"--platform must be like manylinux_2_28_x86_64 (glibc 2.28 or newer), got {self.platform}")


@dataclass(frozen=True)
class Check:
    """Hold every file of a pack against its SHA256SUMS."""

    folder: Positional[Annotated[str, arg(metavar="DIR")]]
    """The pack."""


def work(config: Pack | Check) -> str:
    """Make or check a pack. Raises UserError for what the user can mend; a pack is there whole or not at all."""
    if isinstance(config, Pack):
        return pack(config, Path.cwd())
    folder = Path(config.folder).expanduser().absolute()
    check(folder, "pack")
    return f"{folder} is whole; sha256 of its {sums.FILE}: {sums.of(folder / sums.FILE)}"


def pack(config: Pack, project: Path) -> str:
    """Make a pack of the project in a folder."""
    described = _described(project)
    weights = _weights(config.weights)
    for extra in config.extras:
        check_choice("--extras", extra, described["project"].get("optional-dependencies", {}))
    folder = Path(config.folder).expanduser().absolute()
    with new_folder(folder) as making:
        archive = _archive(project, making, described["project"]["version"])
        _collect(archive, described, config, making / "wheels")
        for name, source in weights.items():
            shutil.copytree(source, making / "weights" / name)
        _write_licences(making)
        for name in ("install.py", "README.md"):
            shutil.copy(project / "cluster" / "offline" / name, making)
        shutil.copy(Path(sums.__file__), making)
        (making / "pack.json").write_text(to_json(_facts(config, described["project"]["version"])))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return (
        f"{folder}: {len(list(folder.glob('wheels/*.whl')))} wheels, {size / 1e9:.2f} GB, for {config.platform} with "
        f"Python {_python()}\nsha256 of its {sums.FILE}: {sums.of(folder / sums.FILE)}\n"
        f"there: make install OFFLINE={folder.name}"
    )


def _described(project: Path) -> dict[str, Any]:
    try:
        described = tomllib.loads((project / "pyproject.toml").read_text())
    except OSError:
        described = {}
    if described.get("project", {}).get("name") != "raymed":
        raise UserError(f"{project} is not raymed's project folder: start this there")
    return described


def _weights(folders: Iterable[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        path = Path(folder).expanduser().absolute()
        if not path.is_dir():
            raise UserError(f"--weights {folder}: there is no such folder")
        if path.name in found:
            raise UserError(f"--weights: two folders have the name {path.name}; rename one")
        found[path.name] = path
    return found


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _facts(config: Pack, version: str) -> dict[str, Any]:
    made = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"format": 1, "raymed": version, "python": _python(), "platform": config.platform, "made": made}
    return facts | {"extras": config.extras}


def _archive(project: Path, into: Path, version: str) -> Path:
    """The project as one file."""
    path = into / f"raymed-{version}.tar.gz"

    def of_nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(path, "w:gz") as tar:
        for name in outgoing.files(project, PROJECT):
            tar.add(project / name, f"raymed-{version}/{name}", filter=of_nobody)
    return path


def _collect(archive: Path, described: dict[str, Any], config: Pack, wheels: Path) -> None:
    """Build what has to be built, then download the rest."""
    version = described["project"]["version"]
    with TemporaryDirectory() as scratch:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        _say(f"building raymed {version}")
        _pip("wheel", "--no-deps", f"--wheel-dir={wheels}", f"{scratch}/raymed-{version}")
    for requirement in _required(described, config.extras):
        if requirement.name in _SOURCES:
            _say(f"building {requirement.name}")
            built = f"{requirement.name}{requirement.specifier}"
            _pip("wheel", "--no-deps", f"--wheel-dir={wheels}", built)
    own = next(wheels.glob("raymed-*.whl"))
    _say(f"downloading wheels for {config.platform}, Python {_python()}")
    names = [f"--platform={name}" for name in tags(config.platform)]
    places = [f"--dest={wheels}", f"--find-links={wheels}"]
    wanted = f"{own}[{','.join(config.extras)}]"
    _pip("download", *places, "--only-binary=:all:", *names, wanted, *described["build-system"]["requires"])


def _required(described: dict[str, Any], extras: Sequence[str]) -> "Iterator[Requirement]":
    """The requirements of the project with these extras, which may name each other."""
    from packaging.requirements import Requirement

    texts, waiting, seen = list(described["project"].get("dependencies", [])), list(extras), set()
    while waiting:
        extra = waiting.pop()
        if extra not in seen:
            texts += described["project"]["optional-dependencies"][extra]
        seen.add(extra)
        own = [found for text in texts if (found := Requirement(text)).name == "raymed"]
        waiting += [name for found in own for name in found.extras if name not in seen]
    yield from (Requirement(text) for text in dict.fromkeys(texts))


def tags(name: str) -> list[str]:
    """The platform tags of wheels that run on a platform: those of every older glibc too."""
    match = _PLATFORM.fullmatch(name)
    assert match is not None
    newest, machine = int(match[1]), match[2]
    found = [f"manylinux_2_{minor}_{machine}" for minor in range(newest, 4, -1)]
    return found + [f"{old}_{machine}" for minor, old in _OLD_TAGS.items() if minor <= newest]


def _say(line: str) -> None:
    print(line, flush=True)


def _pip(*words: str) -> None:
    """Run pip with the user's settings: indexes, certificates, proxies."""
    done = subprocess.run([sys.executable, "-m", "pip", *words, "--quiet"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"pip {words[0]} failed:\n{(done.stdout + done.stderr).strip()[-_SHOWN:]}")


def _write_licences(folder: Path) -> None:
    """A line a package and a folder of weights, and the texts that the packages carry."""
    into = folder / "licences"
    into.mkdir()
    lines = ["# Licences", "", "| what | version | licence, as it states |", "|---|---|---|"]
    for wheel in sorted(folder.glob("wheels/*.whl")):
        with zipfile.ZipFile(wheel) as file:
            lines.append(_licence(file, into))
    for weights in sorted(folder.glob("weights/*")):
        lines.append(f"| weights/{weights.name} | | {_licence_of_weights(weights)} |")
    (into / "LICENCES.md").write_text("\n".join(lines) + "\n")


def _licence(wheel: zipfile.ZipFile, into: Path) -> str:
    """A row of the table; the texts go to a folder of the package's own."""
    metadata = next(name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
    about, described = (
        message_from_string(wheel.read(metadata).decode(errors="replace")),
        metadata.removesuffix("METADATA"),
    )
    for name in wheel.namelist():
        if name.startswith(described) and re.search(r"licen[cs]e|copying|notice|authors", name, re.I):
            place = into / f"{about['Name']}-{about['Version']}" / name.removeprefix(described).replace("/", "-")
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(wheel.read(name))
    return f"| {about['Name']} | {about['Version']} | {_stated(about)} |"


def _stated(about: Message) -> str:
    """One line: the expression, else the classifiers, else the first line of what stands there."""
    classified = [text.rpartition(" :: ")[2] for text in about.get_all("Classifier", []) if text.startswith("License")]
    free = (about["License"] or "").strip().partition("\n")[0][:80]
    return about["License-Expression"] or ", ".join(classified) or free or "not stated"


def _licence_of_weights(folder: Path) -> str:
    """From the front matter of the model card."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    stated = (metadata_load(card) if card.is_file() else None) or {}
    return str(stated.get("license_name") or stated.get("license") or "not stated")


if __name__ == "__main__":
    command(Pack | Check, work)  # type: ignore[arg-type]
