"""What runs on a node of a cluster, and on this machine alike.

It travels by value, whole, to nodes that may have no raymed or another one: it imports nothing of raymed.
"""

import hashlib
import secrets
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "ray", "deepspeed", "mlflow")
_SECONDS = 5  # for an answer


class Answering:
    """An HTTP server on a free port of an address, which answers with a word that nobody else knows."""

    def __init__(self, host: str):
        word = self.word = secrets.token_hex(8)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(word)))
                self.end_headers()
                self.wfile.write(word.encode())

            def log_message(self, format: str, *args) -> None:  # names in a class body do not travel
                pass

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """No more answers."""
        self._server.shutdown()
        self._server.server_close()


def ask(url: str, client: str) -> tuple[int, str, str]:
    """Status, Server header and the first bytes of what answers a GET; (0, "", what went wrong) where nothing does.

    client: "requests" (MLflow, Ray's jobs) and "urllib" (S3) go where the proxy variables of the environment send them,
    each as it reads them; "direct" goes straight, and does not look at certificates.
    """
    import urllib.error
    import urllib.request

    import requests

    try:
        if client == "urllib":
            try:
                with urllib.request.build_opener().open(url, timeout=_SECONDS) as answer:  # urlopen reads proxies once
                    return answer.status, answer.headers.get("Server", ""), answer.read(64).decode(errors="replace")
            except urllib.error.HTTPError as error:
                return error.code, error.headers.get("Server", ""), ""
        with requests.Session() as session:
            session.trust_env = client == "requests"
            answer = session.get(url, timeout=_SECONDS, verify=client == "requests" or False, allow_redirects=False)
            return answer.status_code, answer.headers.get("Server", ""), answer.text[:64]
    except (OSError, ValueError) as error:  # what requests and urllib raise are OSErrors
        return 0, "", f"{type(error).__name__}: {error}"[:200]


def swallowed(url: str, word: str = "") -> str:
    """What the environment's proxies make of a request that gets through without them; "" where they do no harm.

    word: what the right server answers; "": any answer without proxies is the right one.
    """
    import warnings

    warnings.simplefilter("ignore")  # of certificates that nobody looks at
    straight = ask(url, "direct")
    if not straight[0] or (word and straight[2] != word):
        through = ask(url, "requests")
        return "" if through[0] and not word and through[0] < 500 else f"no answer from {url} ({straight[2]})"
    for client in ("requests", "urllib"):
        status, server, text = ask(url, client)
        if (status, server) != straight[:2] or (word and text != word):
            got = f"status {status}" if status else text
            return f"{url} answers without a proxy, and by the proxy variables {client} gets: {got}"
    return ""


def versions() -> dict[str, str]:
    """Versions of Python and of what has to agree; of raymed a digest of its files."""
    import importlib.metadata
    import importlib.util
    import platform

    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    spec = importlib.util.find_spec("raymed")
    digest = hashlib.sha256()
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return found | {"raymed": f"files {digest.hexdigest()[:8]}" if spec else "none"}


def multiplied() -> str:
    """What the first GPU of this process is, after it has multiplied two matrices. Raises RuntimeError."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    values = torch.randint(-4, 5, (256, 256)).float()
    for index in range(torch.cuda.device_count()):
        on_gpu = values.to(f"cuda:{index}")
        if not torch.equal((on_gpu @ on_gpu).cpu(), values @ values):
            raise RuntimeError(f"GPU {index} multiplies two matrices of whole numbers wrongly")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names)


def interface_of(address: str) -> str:
    """The network interface of this machine that has an IP address; "" where none has."""
    import psutil

    return next((name for name, at in psutil.net_if_addrs().items() if any(a.address == address for a in at)), "")


class Probe:
    """An actor on a node. Every method is for one check."""

    def __init__(self):
        self._server: Answering | None = None

    def versions(self) -> dict[str, str]:
        """See `versions`."""
        return versions()

    def time(self) -> float:
        """This node's clock."""
        return time.time()

    def multiplied(self) -> str:
        """See `multiplied`."""
        return multiplied()

    def listen(self) -> tuple[str, str]:
        """URL and word of a server on the address by which other nodes know this one."""
        import ray.util

        address = ray.util.get_node_ip_address()
        self._server = Answering(address)
        return f"http://{address}:{self._server.port}", self._server.word

    def swallowed(self, targets: list[tuple[str, str]]) -> list[str]:
        """What does not get through to these URLs, from here."""
        return [problem for url, word in targets if (problem := swallowed(url, word))]

    def memory(self) -> dict[str, Any]:
        """Where the object store of this node lies and where it spills to."""
        import psutil

        raylet = psutil.Process().parent()
        flags = dict(part.lstrip("-").split("=", 1) for part in (raylet.cmdline() if raylet else []) if "=" in part)
        session = flags.get("session_dir", "/tmp")
        disk = psutil.disk_usage(session)
        return {
            "folder": flags.get("plasma_directory", ""),
            "spills_to": session,
            "disk_used": disk.percent,
            "disk_free": disk.free,
        }

    def put(self, size: int) -> list[Any]:
        """A reference to an object of that many bytes in this node's store (in a list, so that it stays one)."""
        import ray

        return [ray.put(secrets.token_bytes(16) * (size // 16))]

    def got(self, references: list[Any]) -> int:
        """The size of what a reference leads to."""
        import ray

        return len(ray.get(references[0]))

    def rendezvous(self) -> tuple[str, int, str]:
        """An address of this node, with a free port, where a group may meet; and the address's network interface."""
        import ray.util

        address = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind(("", 0))
            return address, free.getsockname()[1], interface_of(address)

    def reduced(self, backend: str, rank: int, size: int, where: tuple[str, int], seconds: float) -> dict[str, str]:
        """An all-reduce with the other ranks. {"interface", "problem"}; a problem of "" means that it worked."""
        import os
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        name = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME"
        interface = os.environ.get(name, "")
        try:
            store = dist.TCPStore(where[0], where[1], size, rank == 0, timeout=timedelta(seconds=seconds))
            limit = timedelta(seconds=seconds)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            value = torch.full((1,), float(rank + 1), device="cuda" if backend == "nccl" else "cpu")
            dist.all_reduce(value)
            expected = size * (size + 1) / 2
            problem = "" if value.item() == expected else f"the sum is {value.item():g} where it is {expected:g}"
            dist.barrier()
            dist.destroy_process_group()
        except (RuntimeError, OSError, ValueError) as error:  # all that torch.distributed raises
            problem = str(error).strip().splitlines()[0][:300]
        return {"interface": interface, "problem": problem}
