"""What `up onprem --install` brings to hosts: this project as it is, by scripts that a shell of this machine runs."""

import json
import subprocess
from pathlib import Path

import pytest

from raymed.cluster.providers import onprem_host, ssh


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project of little code, which is what goes to hosts."""
    folder = tmp_path / "project"
    (folder / "raymed" / "page").mkdir(parents=True)
    files = {"raymed/__init__.py": "", "raymed/page/page.js": "1", "pyproject.toml": "requires = []", "README.md": "x"}
    for name, text in {**files, "LICENSE": "free", ".gitignore": "*.pyc", ".rayignore": ""}.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(onprem_host, "PROJECT", folder)
    return folder


@pytest.mark.parametrize(
    ("name", "is_other"),
    [
        ("raymed/__init__.py", True),
        ("raymed/new.py", True),
        ("raymed/page/page.js", True),
        ("pyproject.toml", True),
        ("README.md", False),
        ("raymed/__init__.pyc", False),
    ],
)
def test_code_and_requirements_make_another_project(name, is_other, project):
    before = onprem_host.project().digest
    assert onprem_host.project().digest == before
    (project / name).write_text("changed")
    assert (onprem_host.project().digest != before) is is_other


# A Python that tells the right versions, and whose pip keeps what it is to install, unless there is a file `broken`.
# With a file `half` it has no pip.
PYTHON = """#!/bin/sh
home=$(dirname "$0")/..
if [ "$1" = -c ]; then cat "$home/versions"; exit; fi
if [ -e "$home/half" ]; then echo No module named pip >&2; exit 1; fi
if [ "$3" = --version ]; then exit; fi
for last; do :; done
rm -rf "$home/kept"; cp -r "${last%\\[all\\]}" "$home/kept"
[ ! -e "$home/broken" ]
"""


@pytest.fixture
def this_machine(tmp_path, monkeypatch) -> Path:
    """The virtual environment of a host whose scripts a shell of this machine runs."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "venv" / "versions").write_text(json.dumps({**onprem_host.own_versions(), "flask-wtf": "1"}))

    def run(host: ssh.Host, script: str, data: bytes = b"", seconds: float = 0.0) -> str:
        done = subprocess.run(["sh", "-c", script], input=data, capture_output=True)
        if done.returncode:
            raise ssh.Failed(done.stderr.decode())
        return done.stdout.decode() + ("systemd=yes\nroot=yes\n" if "uname" in script else "")

    monkeypatch.setattr(ssh.Host, "run", run)
    monkeypatch.setattr(onprem_host, "as_root", lambda host, script, data=b"", **how: host.run(script, data))
    return tmp_path / "venv"


def test_a_host_remembers_which_project_it_got(this_machine, project):
    """Where pip has failed, none: it is installed again."""
    venv, host = str(this_machine), ssh.Host("a")

    def install() -> None:
        onprem_host.install(onprem_host.survey(host, venv), venv, "sh", None, onprem_host.project())

    def has_it() -> bool:
        return onprem_host.has_installed(onprem_host.survey(host, venv), venv, onprem_host.project())

    assert not has_it()
    install()
    assert has_it() and (this_machine / "kept" / "raymed" / "page" / "page.js").read_text() == "1"
    (project / "raymed" / "new.py").touch()
    assert not has_it()
    install()
    assert has_it() and (this_machine / "kept" / "raymed" / "new.py").is_file()
    (this_machine / "broken").touch()
    with pytest.raises(ssh.Failed):
        install()
    assert not has_it()
    (this_machine / "broken").unlink()
    install()
    (this_machine / "versions").write_text(json.dumps({**onprem_host.own_versions(), "ray": "2.1.0"}))
    assert not has_it(), "somebody has changed it since"


def test_an_environment_that_was_half_made_is_made_again(this_machine, project, tmp_path):
    """Debian without python3-venv leaves a Python without pip, and says what is missing."""
    venv, python = str(this_machine), tmp_path / "python"
    (this_machine / "half").touch()

    def install() -> None:
        machine = onprem_host.survey(ssh.Host("a"), venv)
        onprem_host.install(machine, venv, str(python), None, onprem_host.project())

    python.write_text("#!/bin/sh\necho ensurepip is not available >&2\nexit 1\n")
    python.chmod(0o755)
    for _ in range(2):
        with pytest.raises(ssh.Failed, match="ensurepip is not available"):
            install()
    python.write_text('#!/bin/sh\nrm "$3/half"\n')
    install()
    assert (this_machine / "kept" / "raymed").is_dir()
