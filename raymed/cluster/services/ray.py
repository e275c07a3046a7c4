"""Ray's nodes: a head that only drivers run on, and workers with the CPUs and GPUs.

The dashboard listens on 127.0.0.1; GCS, raylets, agents and workers where Ray puts them, which is on this machine's
addresses to the outside. All of them ask for the token but one: anybody may read a node's metrics.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from raymed.cluster.services import Silent, get
from raymed.train.places.cluster import DRIVER

_DRIVERS = 1000
_HEAD_STORE = 200 * 2**20  # bytes of what drivers put
_LEAST_STORE = 80 * 2**20  # Ray refuses less than 75 MiB
# Ray would tell of 100 nodes, whichever, and keeps the dead ones; it takes no higher limit than this.
_LIVE = {"detail": 1, "limit": 10_000, "filter_keys": "state", "filter_predicates": "=", "filter_values": "ALIVE"}
_STORE_SHARE, _MEMORY_SHARE = 0.15, 0.7  # of the memory that is available, over all workers


@dataclass(frozen=True)
class Share:
    """A worker's part of this machine."""

    cpus: int
    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them."""
    memory: int
    store: int
    """Bytes of shared memory for objects."""


def head(temporary: Path, gcs: int, client: int, dashboard: int, metrics: int) -> list[str]:
    """What starts the head on these ports, with its files below `temporary`."""
    own = ["--head", f"--port={gcs}", f"--ray-client-server-port={client}"]
    own += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    own += ["--num-cpus=0", "--num-gpus=0", f"--resources={json.dumps({DRIVER: _DRIVERS})}"]
    return _start("head", temporary, metrics, _HEAD_STORE, [*own, f"--memory={2**30}"])


def worker(name: str, temporary: Path, gcs: int, metrics: int, share: Share) -> list[str]:
    """What starts a worker, which joins the head whose GCS is at port `gcs`."""
    # A folder of its own: of two that start at once below one, both would take the same sockets.
    own = [f"--address=127.0.0.1:{gcs}", f"--num-cpus={share.cpus}", f"--num-gpus={len(share.gpus)}"]
    # One log monitor a machine: two would tell a driver everything twice.
    own += [f"--memory={share.memory}", "--include-log-monitor=false"]
    return _start(name, temporary / name, metrics, share.store, own)


def _start(name: str, temporary: Path, metrics: int, store: int, own: Sequence[str]) -> list[str]:
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    words += ["--node-ip-address=127.0.0.1", f"--node-name={name}", f"--temp-dir={temporary}"]
    words += ["--dashboard-agent-listen-port=0", f"--metrics-export-port={metrics}", f"--object-store-memory={store}"]
    return [*words, *own]


def shares(workers: int, cpus: int) -> list[Share]:
    """The machine divided among its workers: CPUs and GPUs as equally as they go, and the memory that is available."""
    import psutil

    gpus, free = _gpus(), psutil.virtual_memory().available
    store = max(_LEAST_STORE, int(free * _STORE_SHARE / workers))
    memory = int(free * _MEMORY_SHARE / workers)
    return [Share(len(range(i, cpus, workers)), tuple(gpus[i::workers]), memory, store) for i in range(workers)]


def _gpus() -> list[str]:
    """This machine's, of those that CUDA_VISIBLE_DEVICES allows."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu and gpu != "-1"]
    return [str(i) for i in range(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())]


def ask_dashboard(url: str, environment: Mapping[str, str]) -> str:
    """How the head is, asked by its dashboard. Raises Silent."""
    version = _get(f"{url}/api/version", environment)["ray_version"]
    return f"{url}, asks for the token; Ray {version}"


def nodes(url: str, environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The live nodes by name, as the head knows them. Raises Silent."""
    answer = _get(f"{url}/api/v0/nodes?{urlencode(_LIVE)}", environment)
    return {node["node_name"]: node for node in answer["data"]["result"]["result"]}


def describe(node: Mapping[str, Any]) -> str:
    """What a node has, in words."""
    have = node["resources_total"]
    memory = have.get("memory", 0) / 2**30
    return f"{have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs, {memory:.1f} GiB at {node['node_ip']}"


def _get(url: str, environment: Mapping[str, str]) -> Any:
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    try:
        bearer = {"Authorization": f"Bearer {token.read_text().strip()}"}
    except OSError as error:
        raise Silent(f"no token: {error}") from None
    return get(url, headers=bearer)
