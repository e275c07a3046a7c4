"""A cluster in a network namespace of its own: this machine gets in by a relay, nobody else; it gets out nowhere."""

import os
import shutil
import socket
import subprocess

import httpx
import psutil
import pytest
from local_up import check_gone, needs_programs, own_ports, run_job, tree

from raymed.cluster import isolated, ports, state
from raymed.cluster.providers import local

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    needs_programs,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"),
]
JOB = """
import os, socket
import ray

ray.init()

@ray.remote(num_cpus=1)
def look():
    from raymed.storage import locations
    locations.write_bytes("s3://raymed/from/inside", b"hello")
    return sorted(name for _, name in socket.if_nameindex())

print("SEEN", ray.get(look.remote()))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYMED_CLUSTER", str(tmp_path_factory.mktemp("isolated") / "cluster"))
        up = local.up(own_ports(isolated=True))
        yield up
        local.down(up)


def test_a_job_runs_there_and_sees_no_network(cluster, tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    assert "SEEN ['lo']" in run_job(cluster, tmp_path / "job.py")


def test_every_part_is_up_and_browsers_get_in(cluster):
    assert all(line.is_up for line in local.status(cluster))
    assert "ray" not in cluster.addresses and "RAY_ADDRESS" not in cluster.environment
    user = (cluster.environment["MLFLOW_TRACKING_USERNAME"], cluster.environment["MLFLOW_TRACKING_PASSWORD"])
    assert "<html" in httpx.get(cluster.addresses["dashboard"], trust_env=False).text
    page = httpx.get(cluster.addresses["mlflow"], auth=user, trust_env=False)
    assert page.status_code == 200
    assert httpx.get(cluster.addresses["mlflow"], trust_env=False).status_code == 401


def test_only_the_relay_listens_out_here_and_only_on_loopback(cluster):
    relay = next(p for p in cluster.processes if p.name == "relay")
    known = cluster.facts["ports"]
    wanted = sorted(f"127.0.0.1:{known[name]}" for name in ("dashboard", "mlflow", "s3", "serve"))
    assert {pid: sorted(found) for pid, found in ports.listening(tree(cluster)).items()} == {relay.pid: wanted}
    addresses = [a.address for all in psutil.net_if_addrs().values() for a in all if a.family == socket.AF_INET]
    for address in [a for a in addresses if not a.startswith("127.")]:
        for port in known.values():
            with pytest.raises(OSError):
                socket.create_connection((address, port), timeout=2).close()


def test_what_listens_inside_is_listed(cluster):
    found = " ".join(line.detail for line in local.status(cluster) if line.name.startswith("port of"))
    assert f"127.0.0.1:{cluster.facts['ports']['gcs']}" in found and "0.0.0.0" not in found


def test_nothing_is_left_and_the_namespace_is_gone(cluster):
    before = tree(cluster)
    local.down(cluster)
    check_gone(before, cluster)
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert cluster.facts["temporary"].rpartition("/")[2] not in names
    isolated.remove("no-such-namespace")
    assert state.load() is None
