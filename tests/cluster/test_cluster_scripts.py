"""The scripts of cluster/ for clouds, run by bash; programs of this test stand for what a cloud's machine has."""

import os
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from raymed.cluster.providers.launcher import PROJECT

CLUSTER = PROJECT / "cluster"
SILENT = ("apt-get", "curl", "install", "lsb_release", "ray", "sleep", "systemctl", "systemd-run")
PYTHON = """case "$*" in
*freeze*) printf 'ray==2.60.0\\ntorch==2.13.0+cpu\\nzipp==3.1\\n' ;;
*--version*) [ ! -e "$HOME/half" ] ;;
esac
"""
"""Of a virtual environment, which has a pip unless it is half made."""


class Machine:
    """A machine of a cloud: its home, and programs that write down how they were called."""

    def __init__(self, folder: Path):
        self.home, self.told = folder / "home", folder / "told"
        self.bin = folder / "bin"
        self.project = self.home / "raymed"
        self.bin.mkdir(parents=True)
        (self.project / "cluster").mkdir(parents=True)
        shutil.copy(CLUSTER / "node.sh", self.project / "cluster")
        for name in SILENT:
            self.program(name, "")
        self.program("sudo", 'exec "$@"')
        self.program("tee", "exec cat")
        self.program("mountpoint", "exit 1")
        self.program("venv-python", PYTHON)
        copied = f'mkdir -p "$3/bin"; cp {self.bin}/venv-python "$3/bin/python"; rm -f "$HOME/half"'
        self.program("python3", copied)
        self.variables()

    def program(self, name: str, does: str) -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/bash\necho "$(basename "$0") $*" >> {self.told}\n{does}\n')
        path.chmod(0o755)

    def variables(self, **values: str) -> None:
        """What the machine gets as ~/raymed.env."""
        (self.home / "raymed.env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))

    def run(self, script: Path | None = None, *words: str) -> subprocess.CompletedProcess:
        environment = {"HOME": str(self.home), "PATH": f"{self.bin}:{os.environ['PATH']}", "RAY_HEAD_IP": "10.0.0.1"}
        environment["BASH_FUNC_ulimit%%"] = "() { :; }"  # this machine may allow fewer files
        command = ["bash", str(script or self.project / "cluster" / "node.sh"), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    def calls(self, *words: str, script: Path | None = None) -> list[str]:
        """What a script calls, node.sh unless another is named."""
        self.told.write_text("")
        done = self.run(script, *words)
        assert done.returncode == 0, done.stderr
        return self.told.read_text().splitlines()

    def pip(self, kind: str) -> str:
        """How `setup` calls pip to install."""
        [line] = [line for line in self.calls("setup", kind) if "pip install" in line]
        return line


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_a_head_on_google_has_what_starts_googles_machines(machine):
    """Without it Ray's autoscaler ends on its first line, and no worker ever comes."""
    assert machine.pip("cpu").endswith("/raymed[train,cluster,serve]")
    machine.variables(RAYMED_BUCKET="bucket", RAYMED_HOME=str(machine.home / "storage"))
    assert machine.pip("cpu").endswith("/raymed[train,cluster,serve,gcp]")


def test_a_bucket_lets_folders_be_renamed(machine):
    """As checkpoints are."""
    machine.program("gcsfuse", "")
    machine.variables(RAYMED_BUCKET="bucket", RAYMED_HOME=str(machine.home / "storage"))
    machine.calls("setup", "cpu")
    mount = f"gcsfuse --implicit-dirs --rename-dir-limit 1000 bucket {machine.home}/storage"
    for words in (("head",), ("worker", "gcp")):
        assert mount in machine.calls(*words)


def test_workers_install_what_the_head_has(machine):
    (machine.home / "ray_bootstrap_config.yaml").touch()
    assert "--constraint" not in machine.pip("cpu"), "a new head takes what is newest"
    machine.calls("head")
    told = machine.project / "constraints.txt"
    assert told.read_text() == "ray==2.60.0\ntorch==2.13.0\nzipp==3.1\n", "a worker's torch is the one with CUDA"
    assert "--constraint" not in machine.pip("cpu"), "a head that is started again, with a newer raymed"
    (machine.home / "ray_bootstrap_config.yaml").unlink()  # a worker
    assert f" --constraint {told} " in machine.pip("cuda")
    told.unlink()
    assert "--constraint" not in machine.pip("cuda")


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_what_workers_get_of_the_head_has_its_versions(name):
    """Ray's autoscaler brings workers the file mounts as they lie on the head."""
    content = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    assert "~/raymed" in content["file_mounts"]
    assert not [pattern for pattern in content["rsync_exclude"] if fnmatch("~/raymed/constraints.txt", pattern)]


def test_a_machine_whose_own_apt_runs_is_waited_for(machine):
    """As at its first boot: `update` fails at once while another has the lists."""
    busy = machine.home / "busy"
    busy.write_text("3")
    fails = (
        f'[ "$*" = "-qq update" ] && left=$(cat {busy}) && [ "$left" -gt 0 ] && echo $((left - 1)) > {busy} && exit 100'
    )
    machine.program("apt-get", f"{fails}\nexit 0")
    calls = machine.calls("setup", "cuda")
    assert calls.count("apt-get -qq update") == 4
    installs = [line for line in calls if line.startswith("apt-get") and " install " in line]
    assert installs and all("DPkg::Lock::Timeout=600" in line for line in installs)

    machine.program("apt-get", "exit 100")
    done = machine.run(None, "setup", "cuda")
    assert done.returncode == 1 and "apt-get update has failed for ten minutes" in done.stderr


def test_gcsfuse_comes_from_its_own_archive_once(machine):
    machine.variables(RAYMED_BUCKET="bucket", RAYMED_HOME=str(machine.home / "storage"))
    calls = machine.calls("setup", "cuda")
    assert [line for line in calls if "--no-install-recommends gcsfuse" in line and "Lock::Timeout=600" in line]
    assert calls.count("apt-get -qq update") == 2
    machine.program("gcsfuse", "")
    assert not [line for line in machine.calls("setup", "cuda") if line.endswith(" gcsfuse")]
    machine.variables()
    (machine.bin / "gcsfuse").unlink()
    assert not [line for line in machine.calls("setup", "cuda") if line.endswith(" gcsfuse")], "S3 needs none"


def test_a_virtual_environment_that_was_half_made_is_made_again(machine):
    assert "python3 -m venv" in " ".join(machine.calls("setup", "cuda"))
    assert "python3 -m venv" not in " ".join(machine.calls("setup", "cuda"))
    (machine.home / "half").touch()
    assert "python3 -m venv" in " ".join(machine.calls("setup", "cuda"))


def test_both_accounts_of_google_may_use_the_bucket(machine):
    """Also the head's, which Ray would make: its rights end where the cluster's project does, and the bucket's may be
    another."""
    machine.program("gcloud", 'case "$*" in *describe*) exit 1 ;; esac')
    calls = machine.calls("ours", "europe-west4", "bucket", script=CLUSTER / "gcp-once.sh")
    for name in ("raymed-worker", "ray-autoscaler-sa-v1"):
        made = f"gcloud --quiet --project ours iam service-accounts create {name} "
        member = f"--member serviceAccount:{name}@ours.iam.gserviceaccount.com"
        bound = f"storage buckets add-iam-policy-binding gs://bucket {member} --role roles/storage.objectUser"
        [first] = [number for number, line in enumerate(calls) if line.startswith(made)]
        [second] = [number for number, line in enumerate(calls) if line.endswith(bound)]
        assert first < second
    machine.program("gcloud", "")
    assert not [line for line in machine.calls("ours", "e", "b", script=CLUSTER / "gcp-once.sh") if "create" in line]
