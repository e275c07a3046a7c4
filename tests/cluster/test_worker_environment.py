"""What the driver's environment says of S3, MLflow and the network holds on every node."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from nodes import Nodes

from raymed.train.places.cluster import _preparation, interface_of

pytestmark = pytest.mark.ray
DRIVER = """
import json, os
import ray
from raymed.train.places.cluster import connected

with connected():
    address = ray.util.get_node_ip_address()
    seen = ray.get(ray.remote(num_cpus=1)(lambda: dict(os.environ)).remote())
    print(json.dumps({"address": address, **seen}), flush=True)
"""


@pytest.mark.slow
def test_settings_reach_workers_of_a_cluster_that_was_started_without_them(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    given = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "MLFLOW_TRACKING_URI": "http://127.0.0.1:2"}
    with Nodes(tmp_path / "cluster") as nodes:
        driver = nodes.driver(script, MLFLOW_RUN_ID="of one run", RAYMED_LOCAL="/here", **given)
        assert driver.wait() == 0, driver.said()
        seen = json.loads(driver.said().strip().splitlines()[-1])
        own = nodes.driver(script, GLOO_SOCKET_IFNAME="ib0")
        assert own.wait() == 0, own.said()

    assert seen.items() >= given.items() and seen["RAYMED_LOCAL"] == "/here"
    assert "MLFLOW_RUN_ID" not in seen, "every worker would log to one run"
    assert seen["GLOO_SOCKET_IFNAME"] == interface_of(seen["address"])
    assert json.loads(own.said().strip().splitlines()[-1])["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_nodes_own_interfaces_hold_and_not_the_drivers(monkeypatch):
    """Machines name their interfaces differently."""
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    for name, of_driver in {"GLOO": "eno1", "NCCL": "eno1"}.items():
        monkeypatch.setenv(f"{name}_SOCKET_IFNAME", of_driver)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    prepare_worker = _preparation()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ens5")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.delenv("NCCL_DEBUG")
    prepare_worker()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ens5"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eno1", "the node says nothing of it"
    assert os.environ["NCCL_DEBUG"] == "INFO"


def test_the_interface_of_an_address():
    assert interface_of("127.0.0.1") in [path.name for path in Path("/sys/class/net").iterdir()]
    assert interface_of("203.0.113.77") is None
