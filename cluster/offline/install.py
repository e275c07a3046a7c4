"""Install raymed from an offline pack, and from nothing else: no index is asked, nothing is downloaded.

    python3 PACK/install.py VENV                       raymed as it was packed
    python3 PACK/install.py VENV --project FOLDER      the project in FOLDER, editable, with the packed packages

Every file of the pack is held against its SHA256SUMS first. Exit codes: 0; 2 with one clear message.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import sums

PACK = Path(__file__).resolve().parent


class Refused(Exception):
    """What the user can mend."""


def check_machine(facts: dict) -> None:
    """Raise Refused unless the packed wheels run here."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != facts["python"]:
        raise Refused(f"the pack is for Python {facts['python']}, and this is {here}: start this with the other one")
    glibc, machine = facts["platform"].removeprefix("manylinux_").split("_", 2)[1:]
    if sys.platform != "linux" or platform.machine() != machine:
        raise Refused(f"the pack is for Linux on {machine}, and this is {sys.platform} on {platform.machine()}")
    name, version = platform.libc_ver()
    if name != "glibc" or int(version.split(".")[1]) < int(glibc):
        raise Refused(f"the pack needs glibc 2.{glibc} or newer, and this machine has {name or 'another'} {version}")


def check_files() -> None:
    """Raise Refused unless every file is as it was packed."""
    try:
        found = sums.damage(PACK)
    except OSError as error:
        raise Refused(f"{PACK} is not a whole pack: {error.filename}: {error.strerror}") from None
    if found:
        told = "\n".join(f"  {what}" for what in found)
        raise Refused(f"nothing was installed: {PACK} is not as it was packed\n{told}\nbring these files again")


def make(venv: Path) -> Path:
    """The venv's interpreter; the venv is made where there is none, or one without pip, which was half made."""
    python = venv / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
        made = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
        if made.returncode:
            raise Refused(f"no venv could be made (Debian: its package python3-venv)\n{made.stdout}{made.stderr}")
    return python


def pip(python: Path, *words: str) -> None:
    """Run a venv's pip, cut off from every index and from the user's settings."""
    command = [str(python), "-m", "pip", "--isolated", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"pip {words[0]} failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def install(venv: Path, project: Path | None) -> None:
    """Put the packed packages into a venv, and raymed."""
    python = make(venv)
    wheels = sorted(PACK.glob("wheels/*.whl"))
    if project:
        wheels = [wheel for wheel in wheels if not wheel.name.startswith("raymed-")]
    quiet = ("install", "--quiet", "--no-index", "--no-deps")
    pip(python, *quiet, *map(str, wheels))
    if project:
        pip(python, *quiet, "--no-build-isolation", "--editable", str(project))
    pip(python, "check")


def main() -> int:
    """Do what the words say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path, help="folder of the virtual environment; made where there is none")
    parser.add_argument("--project", type=Path, help="folder of the project, to be installed in place")
    given = parser.parse_args()
    try:
        if given.project and not (given.project / "pyproject.toml").is_file():
            raise Refused(f"--project {given.project}: there is no pyproject.toml")
        check_files()
        facts = json.loads((PACK / "pack.json").read_text())
        check_machine(facts)
        print(f"raymed {facts['raymed']}, packed {facts['made']}; sha256 of its {sums.FILE}:", flush=True)
        print(f"  {sums.of(PACK / sums.FILE)}", flush=True)
        install(given.venv, given.project)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 2
    print(f"installed in {given.venv}: {given.venv}/bin/python")
    return 0


if __name__ == "__main__":
    sys.exit(main())
