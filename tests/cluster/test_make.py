"""The Makefile without its jobs: when it installs, and the commands that it makes of what is typed."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tyro

from raymed.cluster import backup, offline

REPO = Path(__file__).resolve().parents[2]
INSTALL = "python3 ../pack/install.py .venv --project .\n"


@pytest.fixture
def project(tmp_path):
    """A project folder with the Makefile, in which everything was installed before."""
    folder = tmp_path / "project"
    (folder / ".venv").mkdir(parents=True)
    shutil.copy(REPO / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    os.utime(folder / "pyproject.toml", (1, 1))
    (folder / ".venv/.installed").touch()
    return folder


def make(project: Path, *words: str) -> subprocess.CompletedProcess:
    """As typed in a shell."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "OFFLINE", "ARGS"))
    }
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=60)


def told(project: Path, *words: str) -> str:
    """The commands that it would run."""
    done = make(project, "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", [["install"], []])
def test_a_pack_that_is_named_is_installed_over_what_was_installed(words, project):
    assert INSTALL in told(project, *words, "OFFLINE=../pack", "PYTHON=python3")
    done = make(project, *words, "OFFLINE=../missing")
    assert done.returncode == 2 and "install.py" in done.stderr
    assert ".venv" not in told(project, *words)


def test_an_environment_that_was_half_made_is_made_again(project, tmp_path):
    """Debian without python3-venv leaves a Python without pip, and says what is missing."""
    (project / ".venv/.installed").unlink()
    python = tmp_path / "python"
    half = 'mkdir -p "$3/bin"; printf "#!/bin/sh\\nexit 1\\n" > "$3/bin/python"; chmod 755 "$3/bin/python"'
    python.write_text(f"#!/bin/sh\n{half}\necho ensurepip is not available >&2\nexit 1\n")
    python.chmod(0o755)
    for _ in range(2):
        done = make(project, "install", f"PYTHON={python}")
        assert done.returncode == 2 and "ensurepip is not available" in done.stderr
    python.write_text(f"#!/bin/sh\n{half.replace('exit 1', 'exit 0')}\n")
    for _ in range(2):
        assert make(project, "install", f"PYTHON={python}").returncode == 0
    assert (project / ".venv/.installed").exists()


def test_other_targets_install_once(project):
    assert INSTALL not in told(project, "serve", "OFFLINE=../pack", "PYTHON=python3")
    (project / ".venv/.installed").unlink()
    assert told(project, "serve", "OFFLINE=../pack", "PYTHON=python3").startswith(INSTALL)
    assert "pip install" in told(project, "serve")


@pytest.mark.parametrize(
    ("words", "module", "config"),
    [
        (
            ["offline-pack", "TO=pack", "ARGS=--weights resnet"],
            offline,
            offline.Pack("pack", weights=("resnet",)),
        ),
        (["backup", "TO=monday"], backup, backup.Save("monday")),
        (["backup", "TO=monday", "ARGS=--cluster"], backup, backup.Save("monday", backup.Place(cluster=True))),
        (
            ["restore", "FROM=monday", "ARGS=--storage /new"],
            backup,
            backup.Restore("monday", backup.Place(storage="/new")),
        ),
    ],
)
def test_packs_and_backups_are_what_was_typed(words, module, config, project):
    python, _, name, *args = shlex.split(told(project, *words))
    kinds = (offline.Pack | offline.Check) if module is offline else (backup.Save | backup.Check | backup.Restore)
    assert (python, name) == (".venv/bin/python", module.__name__)
    assert tyro.cli(kinds, args=args) == config  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),
        (["NAME=raymed-worker@admin@10.0.0.1"], ["raymed-worker@admin@10.0.0.1"]),
        (["NAME=node head", "ARGS=--follow"], ["node head", "--follow"]),
    ],
)
def test_the_name_of_a_log_is_one_word(words, expected, project):
    assert shlex.split(told(project, "logs", *words))[4:] == expected
