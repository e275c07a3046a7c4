"""Ways to a far machine, which outlive the command: here they lead to servers on this one."""

import dataclasses
import os
import socket
import sys

import httpx
import pytest
from nodes import free_port, wait_for

from raymed.cluster import processes, state
from raymed.cluster.providers.tunnels import Tunnel, _runs, close, is_open, opened, port_for
from raymed.cluster.state import Cluster
from raymed.config import UserError


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "cluster"))


def served(port: int) -> Tunnel:
    words = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    return Tunnel("dashboard", port, words)


def test_opened_once_found_again_opened_anew_and_closed():
    tunnel = served(free_port())
    cluster = opened(Cluster("aws"), [tunnel])
    try:
        assert httpx.get(f"http://127.0.0.1:{tunnel.port}", trust_env=False).status_code == 200
        [first] = cluster.processes
        remembered = state.required()
        assert remembered.processes == cluster.processes
        assert opened(remembered, [tunnel]).processes == (first,), "it is open"

        processes.end([first], "")
        wait_for(lambda: not is_open(tunnel.port), 20, "the end of the tunnel")
        cluster = opened(remembered, [tunnel])
        assert cluster.processes != (first,) and is_open(tunnel.port)
    finally:
        close(state.required())
    wait_for(lambda: not is_open(tunnel.port), 20, "the end of the tunnel")


def test_a_way_that_leads_elsewhere_is_opened_anew():
    """By the words of its process; those of a script stand behind its interpreter."""
    old = served(free_port())
    new = dataclasses.replace(old, command=[*old.command, "--protocol=HTTP/1.1"])
    cluster = opened(Cluster("aws"), [old])
    try:
        [first] = cluster.processes
        assert processes.running(first)
        cluster = opened(cluster, [new])
        [second] = cluster.processes
        assert second != first and not processes.running(first) and is_open(new.port)
        assert opened(cluster, [new]).processes == (second,)
    finally:
        close(state.required())


def test_a_script_is_known_by_its_words(tmp_path):
    script = tmp_path / "way"
    script.write_text("#!/bin/sh\nread -r line < $2\n")
    script.chmod(0o755)
    os.mkfifo(tmp_path / "pipe")
    command = [str(script), "--to", str(tmp_path / "pipe")]
    process = processes.start("mlflow", command, os.environ, tmp_path / "log")
    try:
        wait_for(lambda: _runs(process, command), 20, "the script")
        assert not _runs(process, [*command[:-1], "elsewhere"])
    finally:
        processes.end([process], "")
    assert not _runs(process, command)


def test_a_way_that_does_not_open_says_why():
    words = [sys.executable, "-c", "import sys; sys.exit('Permission denied (publickey)')"]
    with pytest.raises(UserError, match=r"no way to mlflow of the cluster(.|\n)*Permission denied"):
        opened(Cluster("aws"), [Tunnel("mlflow", free_port(), words)])


def test_a_port_that_somebody_else_has_meanwhile():
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = somebody.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}, which led to dashboard, is taken by"):
            opened(Cluster("aws"), [served(port)])


def test_a_port_is_remembered():
    assert port_for(Cluster("aws", facts={"tunnels": {"mlflow": 12345}}), "mlflow") == 12345
    assert port_for(None, "mlflow") > 1024
