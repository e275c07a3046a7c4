"""What of a project folder goes to other machines: the same rule for new nodes, hosts and offline packs."""

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from raymed.cluster import offline, outgoing
from raymed.cluster.providers import launcher, onprem_host
from raymed.cluster.whole import keep_out
from raymed.config import UserError

REPO = Path(__file__).resolve().parents[2]
CODE = ("LICENSE", "README.md", "pyproject.toml", "docs/head.png", "raymed/__init__.py", "raymed/page/app.js")
PRIVATE = (".env", "raymed/.env", "raymed/page/tls.key", "raymed/cluster.json", "docs/serve.token", "scans/1.dcm")
PRIVATE += ("raymed/monday/mlflow.db", "raymed/ours/scan.png", "raymed/page/.DS_Store")
MADE = ("raymed/__pycache__/x.pyc", "raymed/raymed.egg-info/SOURCES.txt")


@pytest.fixture
def project(tmp_path):
    """A project folder with code, and with what is nobody else's business."""
    for name in (*CODE, *PRIVATE, *MADE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(REPO / name, tmp_path)
    (tmp_path / "raymed/ours/.gitignore").write_text("*.png\n")
    keep_out(tmp_path / "raymed/monday")
    (tmp_path / "raymed/link").symlink_to(tmp_path / "scans")
    (tmp_path / "raymed/link.dcm").symlink_to(tmp_path / "scans/1.dcm")
    return tmp_path


def test_what_is_named_without_what_stays_here(project):
    named = ("LICENSE", "README.md", "docs", "no such file", "pyproject.toml", "raymed")
    assert outgoing.files(project, named) == sorted(CODE), "docs too, which jobs do not get: it is named"
    assert outgoing.files(project, (".rayignore", "raymed/page")) == [".rayignore", "raymed/page/app.js"]


def test_a_pattern_more_in_rayignore_holds_for_all(project, monkeypatch):
    """Nodes of clouds, hosts, and packs."""
    with (project / ".rayignore").open("a") as file:
        file.write("/raymed/page\n")
    for module in (launcher, onprem_host):
        monkeypatch.setattr(module, "PROJECT", project)
    cloud = project / "copy"
    launcher._copied(cloud)
    on_node = {path.relative_to(cloud).as_posix() for path in cloud.rglob("*") if path.is_file()}
    with tarfile.open(fileobj=io.BytesIO(onprem_host.project().archive)) as tar:
        on_host = {entry.name for entry in tar if entry.isfile()}
    with tarfile.open(offline._archive(project, project / "scans", "7.8")) as tar:
        packed = {entry.name.removeprefix("raymed-7.8/") for entry in tar if entry.isfile()}
    assert on_node == on_host == {"LICENSE", "README.md", "pyproject.toml", "raymed/__init__.py"}
    assert packed == on_host | {".gitignore", ".rayignore", "docs/head.png"}


def test_without_ray_or_ignore_files_nothing_goes(project, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"pip install 'raymed\[train\]'"):
        patch.setitem(sys.modules, "ray._private.runtime_env", None)
        outgoing.files(project, ["raymed"])
    (project / ".rayignore").unlink()
    with pytest.raises(UserError, match=r"\.rayignore cannot be read, and says what stays here: No such file"):
        outgoing.files(project, ["raymed"])


@pytest.mark.parametrize("names", [launcher._OF_PROJECT, (*onprem_host._CODE, *onprem_host._TEXTS), offline.PROJECT])
def test_all_that_git_has_and_nothing_that_it_ignores(names):
    found = outgoing.files(REPO, names)
    git = ["git", "-C", str(REPO)]
    if subprocess.run([*git, "rev-parse"], capture_output=True).returncode:
        pytest.skip("this project folder is no repository")
    tracked = subprocess.run([*git, "ls-files", *names], capture_output=True, text=True, check=True).stdout
    assert {name for name in tracked.splitlines() if (REPO / name).is_file()} <= set(found)
    asked = [*git, "check-ignore", "--no-index", "--stdin"]
    assert subprocess.run(asked, input="\n".join(found), capture_output=True, text=True).stdout == ""
