"""The doctor beside a real cluster: one that is in order, and one with a node that has most faults at once."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.nodes import free_port
from guarded import Guarded, other_raymed, skewed

from raymed.cluster import state
from raymed.doctor.checks import CHECKS

pytestmark = pytest.mark.ray
SOURCES = str(Path(__file__).resolve().parents[2])
NODES = tuple(check.name for check in CHECKS if check.name.startswith("nodes: "))
CONNECTION = ("--only", "Ray", "Ray's token")


def nodes_checks(found: dict[str, dict]) -> dict[str, str]:
    """Levels of the checks of nodes."""
    return {name.removeprefix("nodes: "): one["level"] for name, one in found.items() if name.startswith("nodes: ")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Guarded]:
    """Behind a token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", SOURCES)
        nodes = Guarded(tmp_path_factory.mktemp("guarded") / "ray", dashboard=True)
        with nodes:
            nodes.add_node(cpus=2)
            yield nodes


def test_a_cluster_that_is_in_order(cluster, doctor):
    elsewhere = ("versions", "GPUs", "MLflow")  # of this machine alone, and slow
    asked = [check.name for check in CHECKS if check.name not in elsewhere]
    code, found = doctor("--trials", "2", "--only", *asked, **cluster.environment)
    assert code == 0 and {one["level"] for one in found.values()} <= {"ok", "warning"}, found
    assert nodes_checks(found) == dict.fromkeys(
        ("versions", "ways", "clocks", "object store", "storage", "GPUs", "all-reduce"), "ok"
    )
    assert "2 node(s), 2 CPUs, 0 GPUs" in found["Ray"]["found"]
    assert "and the dashboard let in who has the token, and nobody else" in found["Ray's token"]["found"]
    assert "gloo: 2 processes over" in found["nodes: all-reduce"]["found"]
    assert found["sweep"]["level"] == "ok"


def test_a_wrong_token(cluster, doctor, tmp_path):
    (tmp_path / "token").write_text("b" * 64)
    code, found = doctor(*CONNECTION, **cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})
    assert code == 1 and list(found) == ["Ray"] and "token" in found["Ray"]["found"], found
    assert "RAY_AUTH_TOKEN_PATH" in found["Ray"]["remedy"]


def test_a_token_that_is_not_there(cluster, doctor, tmp_path):
    """Ray itself would end the process."""
    code, found = doctor(*CONNECTION, **cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})
    assert code == 1 and f"there is no token at {tmp_path / 'none'}" in found["Ray"]["found"]


@pytest.mark.slow
def test_a_cluster_that_is_reached_by_its_dashboard_alone(cluster, doctor, tmp_path, monkeypatch):
    """The doctor runs there, as a job."""
    words = [sys.executable, "-c", "import ray; print(ray.init(log_to_driver=False).dashboard_url)"]
    asked = subprocess.run(words, env=cluster.environment, capture_output=True, text=True, timeout=120, check=True)
    address = asked.stdout.split()[-1]
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "state"))
    state.save(state.Cluster("local", {"dashboard": f"http://{address}"}, cluster.auth))
    code, found = doctor("--only", "disk space", "Ray", "sweep", "--trials", "1", "--workers", "3")
    assert code == 1 and "head: Ray" in found, found.get("head")
    assert found["head: Ray"]["level"] == "ok" and "2 node(s)" in found["head: Ray"]["found"], found
    assert found["head: sweep"]["level"] == "failure" and "head: disk space" in found
    assert not {"sweep", "disk space"} & set(found), "this machine is not where it would run"
    words = [sys.executable, "-m", "raymed.cluster", "stop"]
    stopped = subprocess.run(words, env=dict(os.environ), capture_output=True, text=True, timeout=60)
    assert stopped.returncode == 2 and "no job was submitted" in stopped.stderr, "the doctor's job is nobody's own"


def test_a_cluster_that_is_gone(doctor):
    code, found = doctor(*CONNECTION, RAY_ADDRESS=f"127.0.0.1:{free_port()}")
    assert code == 1 and list(found) == ["Ray"] and found["Ray"]["remedy"], found


@pytest.mark.parametrize(
    ("flags", "level", "said"),
    [
        (("--trials", "4"), "warning", "2 of 4 trainings with 1 worker(s) of 1 CPUs and 0 GPUs run at a time"),
        (("--trials", "1", "--workers", "3"), "failure", "its CPU is enough for 0"),
        (("--trials", "1", "--gpus-per-worker", "1"), "failure", "its GPU is enough for 0"),
    ],
)
def test_sweeps_that_have_no_room(flags, level, said, cluster, doctor):
    code, found = doctor("--only", "sweep", *flags, **cluster.environment)
    assert found["sweep"]["level"] == level and code == (level == "failure")
    assert said in found["sweep"]["found"] and "lower --workers" in found["sweep"]["remedy"]


@pytest.mark.slow
def test_a_node_with_many_faults(cluster, doctor, tmp_path):
    """Another raymed, a clock that is ahead, a GPU that is not there, and a proxy."""
    path = f"{skewed(tmp_path / 'clock')}:{other_raymed(tmp_path / 'other')}:{SOURCES}"
    proxy = f"http://127.0.0.1:{free_port()}"
    node = cluster.add_faulty("faulty", "--num-gpus=1", PYTHONPATH=path, http_proxy=proxy)
    code, found = doctor("--no-nodes", "--only", "Ray", *NODES, **cluster.environment)
    assert code == 0 and list(found) == ["Ray"], "nobody asked the nodes"
    code, found = doctor("--only", "Ray", *NODES, **cluster.environment)
    cluster.kill_node(node)
    assert code == 1
    levels = nodes_checks(found)
    for name in ("versions", "ways", "clocks", "GPUs"):
        assert levels[name] == "failure", found[f"nodes: {name}"]
    assert "raymed files" in found["nodes: versions"]["found"]
    assert "by the proxy variables" in found["nodes: ways"]["found"] and "NO_PROXY=" in found["nodes: ways"]["remedy"]
    assert "ahead of this machine's" in found["nodes: clocks"]["found"]
    assert "sees no GPU" in found["nodes: GPUs"]["found"]


HOLDS_A_GPU = """
import sys, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(log_to_driver=False, logging_level="ERROR")
node = next(n for n in ray.nodes() if n["NodeManagerAddress"] == sys.argv[1])
place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
held = ray.remote(num_cpus=0, num_gpus=1, scheduling_strategy=place)(type("Holder", (), {"there": lambda self: 0}))
holder = held.remote()
ray.get(holder.there.remote())
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.timeout(800)  # a minute twice, for what is in use
def test_a_cluster_at_rest_and_one_in_use(tmp_path, doctor, monkeypatch):
    """A head without CPUs and nobody else; then one of two nodes' GPUs, which are made up, is taken by a training."""
    monkeypatch.setenv("PYTHONPATH", SOURCES)
    (tmp_path / "holds.py").write_text(HOLDS_A_GPU)
    addresses = {"a": "127.0.0.2", "b": "127.0.0.3"}
    asked = ("--only", "Ray", "nodes: all-reduce")
    nodes = Guarded(tmp_path / "ray", ip=lambda name: addresses.get(name, "127.0.0.1"))
    with nodes:
        code, found = doctor(*asked, **nodes.environment)
        assert code == 0 and found["nodes: all-reduce"]["level"] == "ok", found
        assert "no node has CPUs" in found["nodes: all-reduce"]["found"]
        for name in addresses:
            nodes.add_faulty(name, "--num-gpus=1")
        for address in addresses.values():
            driver = nodes.driver(tmp_path / "holds.py", address)
            driver.says("held")
            code, found = doctor(*asked, **nodes.environment)
            driver.process.kill()
            driver.wait()
            reduced = found["nodes: all-reduce"]
            assert code == 0 and reduced["level"] == "warning", found
            assert "gloo: 2 processes over" in reduced["found"]
            busy = reduced["found"].partition("nccl: in use, so not tried: ")[2]
            assert busy.startswith(f"{address} (") and "," not in busy.partition(")")[2], found


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a mount of its own needs root")
def test_a_node_with_disks_of_its_own(cluster, doctor, tmp_path, monkeypatch):
    """Its storage is not that of the others, and where Ray spills to there is no room."""
    storage, session = cluster.folder / "raymed", (cluster.temp / "session_latest").resolve()
    sockets = tmp_path / "sockets"  # a driver may come by those of any node
    sockets.mkdir()
    storage.mkdir(exist_ok=True)
    mounts = f"""
        mount -t tmpfs none {storage}
        mount --bind {session}/sockets {sockets}
        mount -t tmpfs -o size=100m none {session}
        mkdir {session}/sockets
        mount --bind {sockets} {session}/sockets
        fallocate -l 97m {session}/full
        exec "$@" """
    monkeypatch.setattr(cluster, "prefix", lambda name: ["unshare", "--mount", "sh", "-ec", mounts, "sh"])
    node = cluster.add_node(name="apart")
    code, found = doctor("--only", "Ray", "nodes: storage", "nodes: object store", **cluster.environment)
    cluster.kill_node(node)
    assert code == 1 and found["Ray"]["level"] == "ok"
    kept, store = found["nodes: storage"], found["nodes: object store"]
    assert kept["level"] == store["level"] == "failure", found
    assert kept["found"].endswith(f": {storage} is not the folder of this machine") and ";" not in kept["found"]
    assert "every node sees under one path" in kept["remedy"]
    assert f"% of the disk of {session}" in store["found"] and "; " not in store["found"], "of this node alone"
    assert "make room" in store["remedy"]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a mount of its own needs root")
def test_a_node_without_shared_memory(tmp_path, doctor, monkeypatch):
    """Ray itself only writes a line to a log, and the store is on a disk. This cluster asks for no token either."""
    monkeypatch.setenv("PYTHONPATH", SOURCES)
    small = 'mount -t tmpfs -o size=32m none /dev/shm; exec "$@"'

    def prefix(name: str) -> list[str]:
        return ["unshare", "--mount", "sh", "-ec", small, "sh"] if name == "small" else []

    with Guarded(tmp_path / "ray", token=False, prefix=prefix, dashboard=True) as nodes:
        nodes.add_node(name="small")
        code, found = doctor("--only", "Ray's token", "nodes: object store", **nodes.environment)
    assert code == 1
    store, token = found["nodes: object store"], found["Ray's token"]
    assert store["level"] == "warning" and "the object store is on a disk" in store["found"], found
    assert "--shm-size" in store["remedy"]
    assert token["level"] == "failure" and "the dashboard and 127.0.0.1" in token["found"], found
    assert "RAY_AUTH_MODE=token" in token["remedy"]
