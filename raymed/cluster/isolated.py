"""A network namespace around a cluster: it has a loopback interface and nothing else, so that nobody outside of this
machine reaches any port in it, and nothing in it reaches the network.

A relay lets this machine in: it listens on 127.0.0.1 here and connects to the same port on 127.0.0.1 there.

    python -m raymed.cluster.isolated NAMESPACE PORT...        the relay
"""

import asyncio
import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from raymed.config import UserError

_CLONE_NEWNET = 0x40000000
_CHUNK = 2**16


def check_allowed() -> None:
    """Raise UserError where no namespace can be made."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        raise UserError("--isolated makes a network namespace: that needs Linux, root and iproute2; leave it out")


def create(name: str) -> None:
    """Make a namespace with a loopback interface. Raises UserError where the kernel refuses."""
    for words in (["netns", "add", name], ["-n", name, "link", "set", "lo", "up"]):
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"--isolated: ip {' '.join(words)} failed ({done.stderr.strip()}); leave it out")


def remove(name: str) -> None:
    """Remove a namespace, if there is one of that name."""
    subprocess.run(["ip", "netns", "del", name], capture_output=True)


def within(name: str) -> list[str]:
    """Words before a command that is to run in a namespace."""
    return ["ip", "netns", "exec", name]


def relay(name: str, ports: Sequence[int]) -> list[str]:
    """What starts the relay for these ports."""
    return [sys.executable, "-m", __spec__.name, name, *map(str, ports)]


def _enter(name: str) -> None:
    """Move this thread into a namespace; the sockets that it has stay where they are."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{name}") as place:
        if libc.setns(place.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


def _to(port: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, to_there = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_copy(reader, to_there), _copy(there, writer))

    return connect


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
            return
    writer.close()


async def _serve(listeners: dict[int, socket.socket]) -> None:
    servers = [await asyncio.start_server(_to(port), sock=listener) for port, listener in listeners.items()]
    await asyncio.gather(*(server.serve_forever() for server in servers))


def _main(name: str, ports: Sequence[int]) -> None:
    listeners = {port: socket.create_server(("127.0.0.1", port)) for port in ports}
    _enter(name)
    asyncio.run(_serve(listeners))


if __name__ == "__main__":
    _main(sys.argv[1], [int(port) for port in sys.argv[2:]])
