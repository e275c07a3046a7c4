"""Ports of this machine: free ones, who has one, and what a set of processes listens on.

python -m raymed.cluster.ports PID...        what these listen on, as JSON; for use in another network namespace
"""

import json
import random
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress

import psutil

from raymed.config import UserError

GRPC = 10_000
"""SeaweedFS puts the gRPC companion of a port so much above it."""
_BELOW_EPHEMERAL = range(20_000, 32_000)  # what the kernel, and so Ray, gives out by itself begins at 32768


def is_free(port: int) -> bool:
    """Whether 127.0.0.1:port can be listened on now."""
    with socket.socket() as probe:
        # What has just been closed is no obstacle to a server either.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def choose(flag: str, asked: int, liked: Sequence[int], taken: Iterable[int] = (), companion: int = 0) -> int:
    """A port to listen on: the one asked for, or for 0 the first of `liked` that is free, else any free one.

    Args:
        flag: names `asked` in errors.
        taken: not these.
        companion: port + companion must be free too.

    Raises:
        UserError: the port that was asked for is taken, or is none.
    """
    taken = set(taken)
    if asked:
        return _asked(flag, asked, taken, companion)
    drawn = random.Random().sample(_BELOW_EPHEMERAL, 1000)
    return next(p for p in [*liked, *drawn] if p not in taken and is_free(p) and is_free(p + companion))


def _asked(flag: str, port: int, taken: set[int], companion: int) -> int:
    if not 1024 <= port <= 65535 - companion:
        raise UserError(f"{flag} must be 0 (a free one) or from 1024 to {65535 - companion}, got {port}")
    if port in taken:
        raise UserError(f"{flag} {port} is the port of another part of this cluster: give another, or 0 for a free one")
    for wanted in {port, port + companion}:
        if not is_free(wanted):
            beside = "" if wanted == port else f" (it needs {wanted} too)"
            raise UserError(
                f"{flag} {port}{beside} is taken by {owner(wanted)}: end that, give another, or 0 for a free one"
            )
    return port


def owner(port: int) -> str:
    """Who listens on a port, in words."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid:
                    return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return "a process of somebody else's"


def listening(pids: Iterable[int], within: Sequence[str] = ()) -> dict[int, list[str]]:
    """{process: ["127.0.0.1:8265", ...]} of those that listen on TCP ports.

    within: words before a command that run it in the processes' network namespace; none where it is this one.
    """
    if within:
        words = [*within, sys.executable, "-m", __spec__.name, *map(str, pids)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        return {int(pid): found for pid, found in json.loads(done.stdout or "{}").items()}
    return {pid: found for pid in pids if (found := _listening(pid))}


def _listening(pid: int) -> list[str]:
    with suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections("tcp")
        found = {c.laddr for c in connections if c.status == psutil.CONN_LISTEN}
        return [_shown(*at) for at in sorted(found, key=lambda at: (at.port, at.ip))]
    return []


def _shown(host: str, port: int) -> str:
    host = host.removeprefix("::ffff:")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


if __name__ == "__main__":
    print(json.dumps(listening(map(int, sys.argv[1:]))))
