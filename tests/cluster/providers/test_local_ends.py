"""A cluster on this machine that is interrupted, killed, brought up again, or beside another Ray: what is left."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from local_up import check_gone, command, needs_programs, own_ports, tree, wait_for
from nodes import Nodes

from raymed.cluster import state
from raymed.cluster.providers import local
from raymed.cluster.services import mlflow, s3
from raymed.storage import server

pytestmark = [pytest.mark.ray, pytest.mark.slow, needs_programs]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "cluster"))
    yield tmp_path / "cluster"
    left = state.load()
    if left:
        local.down(left)


def half_up(home, name):
    """(`up` that is at work, the cluster as it is remembered) once a part has been started."""
    up = command(home, "local.up(local.Config())")

    def has_begun():
        cluster = state.load()
        return cluster if cluster and name in [p.name for p in cluster.processes] else None

    return up, wait_for(has_begun, 60, f"{name} is started")


@pytest.mark.parametrize("name", ["s3", "head"])
def test_an_up_that_is_interrupted_leaves_nothing(home, name):
    up, cluster = half_up(home, name)
    before = tree(cluster)
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=60)
    assert up.returncode and state.load() is None and before
    check_gone(before, cluster)


def test_an_up_that_is_killed_is_ended_by_down(home):
    up, _ = half_up(home, "head")
    up.kill()
    up.communicate(timeout=60)
    cluster = state.required()
    before = tree(cluster)
    assert len(before) >= 3 and any(not line.is_up for line in local.status(cluster))
    local.down(cluster)
    check_gone(before, cluster)


def test_what_was_started_and_not_yet_remembered_is_ended_too(home):
    """SIGKILL between the start of a process and the note of it."""
    up, cluster = half_up(home, "mlflow")
    up.kill()
    up.communicate(timeout=60)
    before = tree(state.required())
    state.save(cluster.__class__("local", cluster.addresses, cluster.environment, (), cluster.facts))
    local.down(state.required())
    check_gone(before, cluster)


def test_what_is_stored_stays_and_another_ray_goes_on(home, tmp_path):
    with Nodes(tmp_path / "other") as other:
        theirs = {p.pid for p in psutil.Process(other.head.process.pid).children(recursive=True)}
        first = local.up(own_ports())
        client = server.client_of(first.environment)
        client.put_object(Bucket=s3.BUCKET, Key="kept", Body=b"yes")
        store = _as_client(first, "import mlflow; print(mlflow.create_experiment('kept'))")
        before = tree(first)
        local.down(first)
        check_gone(before, first)
        assert theirs <= {p.pid for p in psutil.Process(other.head.process.pid).children(recursive=True)}
        second = local.up(local.Config(workers=1))
        names = ("dashboard", "mlflow", "s3", "serve", "gcs")
        assert [second.facts["ports"][n] for n in names] == [first.facts["ports"][n] for n in names]
        assert server.client_of(second.environment).get_object(Bucket=s3.BUCKET, Key="kept")["Body"].read() == b"yes"
        again = _as_client(second, "import mlflow; print(mlflow.get_experiment_by_name('kept').experiment_id)")
        assert again == store
        local.down(second)
        assert len(other.alive()) == 1


def _as_client(cluster, code):
    environment = os.environ | cluster.environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_a_part_that_does_not_start_is_an_error_with_its_last_words(home, monkeypatch):
    monkeypatch.setattr(mlflow, "command", lambda *_: ["sh", "-c", "echo the disk is on fire; exit 3"])
    with pytest.raises(local.UserError, match="mlflow did not start(.|\n)*the disk is on fire"):
        local.up(local.Config())
    assert state.load() is None
