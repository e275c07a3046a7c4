"""A cluster on this machine whose workers come and go with the work, for tests and rehearsals.

The head has no CPUs for work. The autoscaler is Ray's own, which clouds have too; its provider is the one that Ray is
tested with: a node is a few processes here, and comes in seconds rather than minutes.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymed.cluster import ports, processes
from raymed.cluster.processes import MARK
from raymed.config import UserError
from raymed.storage import write_private
from raymed.train.places.cluster import DRIVER

_START = 120.0  # seconds that the head may take
_STORE = 80 * 2**20  # bytes of shared memory of a node; Ray refuses less than 75 MiB
_HEAD = "ray.head.default"  # as the provider calls it
_LISTS = (
    "initialization_commands setup_commands head_setup_commands worker_setup_commands head_start_ray_commands "
    "worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter"
).split()


@dataclass
class Autoscaled:
    """Runs from its construction until `end`.

    folder: for its logs, its token and the storage of jobs.
    workers: nodes of so many `cpus` that may come.
    idle_seconds: after which one goes that has nothing to do.
    told: whether jobs can know how far it may grow (`raymed.train.places.growth`).
    dashboard: whether it has one, at `dashboard_url`.
    """

    folder: Path
    workers: int = 2
    cpus: int = 1
    idle_seconds: float = 6.0
    told: bool = True
    dashboard: bool = False

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # the paths of sockets must be short
        self.address = f"127.0.0.1:{ports.choose('', 0, [])}"
        self.dashboard_url = f"http://127.0.0.1:{ports.choose('', 0, [])}"
        token, config, self._log = (self.folder / name for name in ("token", "autoscaler.json", "head.log"))
        write_private(token, secrets.token_hex(32))
        config.write_text(json.dumps(self._config()))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        kept |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        self.environment = kept | {"RAY_ADDRESS": self.address, "RAYMED_HOME": str(self.folder / "storage")}
        """Of whoever uses it."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        own = kept | fake | {MARK: str(self.temporary), "PATH": path}
        self._head = processes.start("head", self._command(config), own, self._log)
        try:
            self._wait_ready()
            if self.told:
                words = [sys.executable, "-m", "raymed.train.places.growth", str(config)]
                subprocess.run(words, env=self.environment, check=True, timeout=_START)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Autoscaled":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill all of it. Its folder stays."""
        processes.end([self._head], str(self.temporary))
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _wait_ready(self) -> None:
        until = time.monotonic() + _START
        while "Ray runtime started" not in self._log.read_text():
            if processes.running(self._head) is None or time.monotonic() > until:
                raise UserError(f"the head did not start:\n{processes.last_lines(self._log)}")
            time.sleep(0.1)

    def _command(self, config: Path) -> list[str]:
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        words += ["--node-ip-address=127.0.0.1", f"--port={self.address.rpartition(':')[2]}"]
        words += [f"--ray-client-server-port={ports.choose('', 0, [])}", f"--temp-dir={self.temporary}"]
        words += [f"--include-dashboard={str(self.dashboard).lower()}", "--dashboard-host=127.0.0.1"]
        words += [f"--dashboard-port={self.dashboard_url.rpartition(':')[2]}", "--dashboard-agent-listen-port=0"]
        words += [f"--object-store-memory={_STORE}"]
        words += ["--num-cpus=0", "--num-gpus=0", f"--resources={json.dumps({DRIVER: 1000})}"]
        return [*words, f"--autoscaling-config={config}"]

    def _config(self) -> dict[str, Any]:
        """As Ray's autoscaler reads it."""
        worker = {"CPU": self.cpus, "object_store_memory": _STORE}
        return {name: [] for name in _LISTS} | {
            "cluster_name": "autoscaled",
            "max_workers": self.workers,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": self.idle_seconds / 60,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            "provider": {
                "type": "fake_multinode",
                "gcs_address": self.address,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "head_node_type": _HEAD,
            "available_node_types": {
                _HEAD: {"resources": {"CPU": 0, DRIVER: 1000}, "node_config": {}, "max_workers": 0},
                "worker": {"resources": worker, "node_config": {}, "max_workers": self.workers},
            },
        }
