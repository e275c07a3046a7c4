"""Two nodes in network namespaces of their own, which offer each other the wrong address, and the right one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from guarded import Guarded

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"),
]
SOURCES = str(Path(__file__).resolve().parents[2])
SPACES = {"head": f"rd{os.getpid()}-a", "far": f"rd{os.getpid()}-b"}
ADDRESSES = {"head": "10.78.0.1", "far": "10.78.0.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def joined() -> Iterator[None]:
    """A cable between the two."""
    for space in SPACES.values():
        ip("netns", "add", space)
        ip("-n", space, "link", "set", "lo", "up")
    ip("link", "add", "eth0", "netns", SPACES["head"], "type", "veth", "peer", "name", "eth0", "netns", SPACES["far"])
    for node, space in SPACES.items():
        ip("-n", space, "addr", "add", f"{ADDRESSES[node]}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
    yield
    for space in SPACES.values():
        ip("netns", "del", space)


def inside(node: str) -> list[str]:
    return ["ip", "netns", "exec", SPACES[node]]


def test_gloo_on_the_wrong_interface(joined, tmp_path, monkeypatch):
    """The loopback is what a host name that resolves to 127.0.0.1 leads to."""
    monkeypatch.setenv("PYTHONPATH", SOURCES)
    with Guarded(tmp_path / "ray", prefix=inside, ip=ADDRESSES.get) as nodes:
        nodes.add_node(name="far")
        nodes.add_faulty("head", f"--node-ip-address={ADDRESSES['head']}")
        doctor = [
            *inside("head"),
            sys.executable,
            "-m",
            "raymed.doctor",
            "--only",
            "Ray",
            "nodes: ways",
            "nodes: all-reduce",
        ]
        good = subprocess.run(doctor, env=nodes.environment, capture_output=True, text=True, timeout=240)
        wrong = nodes.environment | {"GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "400"}
        bad = subprocess.run(doctor, env=wrong, capture_output=True, text=True, timeout=300)
    assert good.returncode == 0 and "gloo: 2 processes over eth0" in " ".join(good.stdout.split()), (
        good.stdout + good.stderr
    )
    assert bad.returncode == 1 and "over lo: " in bad.stdout, bad.stdout
    said = " ".join(bad.stdout.replace("│", " ").split())
    assert "set GLOO_SOCKET_IFNAME to the interface that has the node's address (eth0)" in said, bad.stdout
