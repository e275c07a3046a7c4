"""Folders that commands leave in the project's: no job takes them along."""

import shutil
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env import packaging

from raymed.cluster import monitoring, sums
from raymed.cluster.monitoring import TOKEN, Monitoring
from raymed.cluster.state import Cluster
from raymed.cluster.submit import checked_size
from raymed.cluster.whole import check, keep_out, new_folder
from raymed.config import UserError

REPO = Path(__file__).resolve().parents[2]
OWN = {".gitignore", ".rayignore", "jobs/greet.py"}


@pytest.fixture
def project(tmp_path):
    """A job, with the ignore files of this project."""
    folder = tmp_path / "project"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs/greet.py").write_text("print('hello')")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(REPO / name, folder)
    return folder


def uploaded(project: Path) -> set[str]:
    """Names in the archive that Ray makes of a project."""
    archive = project.parent / "archive.zip"
    packaging.create_package(str(project), archive, include_gitignore=True)
    with zipfile.ZipFile(archive) as file:
        return {name for name in file.namelist() if not name.endswith("/")}


def test_backups_packs_and_monitoring_stay_here(project, monkeypatch):
    with new_folder(project / "monday", 0o700) as making:
        (making / "mlflow.db").write_text("patients")
        assert uploaded(project) == OWN
    monkeypatch.setenv(TOKEN, "of the server")
    cluster = Cluster("local", {"dashboard": "http://127.0.0.1:1"}, {"RAY_AUTH_TOKEN_PATH": "/nowhere"})
    monitoring.write(Monitoring(project / "watch", "http://127.0.0.1:8000"), cluster)
    (project / "watch/data").mkdir()
    (project / "watch/data/wal").write_bytes(b"1" * 5000)
    assert (project / "monday/mlflow.db").exists() and (project / "watch/serve.token").exists()
    assert uploaded(project) == OWN
    assert checked_size(project) == sum((project / name).stat().st_size for name in OWN)


def test_secrets_stay_here_wherever_they_lie(project):
    for name in ("serve.token", "jobs/serve.token", "cluster/docker/.env", "tls.key", "tls.pem", "cluster.json"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("secret")
    assert uploaded(project) == OWN


def test_an_ignore_file_that_is_there_stays(project):
    before = (project / ".gitignore").read_text()
    keep_out(project)
    assert (project / ".gitignore").read_text() == before and uploaded(project) == OWN


def test_a_folder_is_whole_without_its_ignore_file(tmp_path):
    with new_folder(tmp_path / "pack") as making:
        for name in ("file", "below/.gitignore"):
            (making / name).parent.mkdir(exist_ok=True)
            (making / name).touch()
    (tmp_path / "pack/.gitignore").unlink()  # as `cp pack/* TO` leaves it
    check(tmp_path / "pack", "pack")
    assert sums.IGNORE not in (tmp_path / "pack" / sums.FILE).read_text().split()
    (tmp_path / "pack/below/.gitignore").write_text("changed")
    with pytest.raises(UserError, match=r"below/\.gitignore is damaged"):
        check(tmp_path / "pack", "pack")
