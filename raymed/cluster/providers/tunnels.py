"""Ports of a far machine on this one: processes that outlive the command, opened again where they have ended."""

import dataclasses
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from raymed.cluster import ports, processes, state
from raymed.cluster.state import Cluster, Process
from raymed.config import UserError

_READY_S = 90.0


@dataclass(frozen=True)
class Tunnel:
    """127.0.0.1:port of this machine leads to a part of the cluster while `command` runs."""

    name: str
    port: int
    command: Sequence[str]


def port_for(cluster: Cluster | None, name: str) -> int:
    """The port that a part had here before, else a free one. Raises UserError where the one before is taken."""
    before = (cluster.facts.get("tunnels") or {}).get(name) if cluster else None
    return before or ports.choose(f"--{name}-port", 0, ())


def is_open(port: int) -> bool:
    """Whether something listens on 127.0.0.1:port."""
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def opened(cluster: Cluster, tunnels: Sequence[Tunnel]) -> Cluster:
    """The cluster with every tunnel open; saved. Raises UserError for one that does not open, with what it said."""
    for tunnel in tunnels:
        cluster = _opened(cluster, tunnel)
    return cluster


def close(cluster: Cluster) -> None:
    """End all of them."""
    processes.end(cluster.processes, "")


def _runs(process: Process, command: Sequence[str]) -> bool:
    """Whether a process runs with these words; a script's program stands behind its interpreter."""
    with suppress(psutil.Error):
        found = processes.running(process)
        return found is not None and found.cmdline()[-len(command) :][1:] == list(command[1:])
    return False


def _opened(cluster: Cluster, tunnel: Tunnel) -> Cluster:
    old = [process for process in cluster.processes if process.name == tunnel.name]
    if old and _runs(old[0], tunnel.command) and is_open(tunnel.port):
        return cluster
    processes.end(old, "")
    if is_open(tunnel.port):
        raise UserError(
            f"port {tunnel.port}, which led to {tunnel.name}, is taken by {ports.owner(tunnel.port)}: end that first"
        )
    log = state.folder() / "logs" / f"tunnel-{tunnel.name}.log"
    started = processes.start(tunnel.name, tunnel.command, os.environ, log)
    others = [process for process in cluster.processes if process.name != tunnel.name]
    cluster = dataclasses.replace(cluster, processes=(*others, started))
    state.save(cluster)
    deadline = time.monotonic() + _READY_S
    while not is_open(tunnel.port):
        if not processes.running(started) or time.monotonic() > deadline:
            said = processes.last_lines(log, 5)
            raise UserError(f"no way to {tunnel.name} of the cluster: {' '.join(tunnel.command)} said:\n{said}")
        time.sleep(0.2)
    return cluster
