"""What a run records besides its own figures: code, machine, packages and load."""

import importlib.metadata
import itertools
import os
import platform
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any, Self

from raymed.telemetry import telemetry_off
from raymed.tracking.outbox import SYSTEM_PREFIX, Outbox

LIBRARIES = ("raymed", "torch", "torchvision", "timm", "ray", "deepspeed", "mlflow", "optuna", "numpy")


def git_state(folder: str | Path = ".") -> dict[str, Any]:
    """{"commit", "branch", "dirty"} of the repository around `folder`; all None where there is none, or no git.

    dirty: some file differs from the commit or is new to git (ignored files do not count). branch is None on a
    detached head.
    """
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if not commit:
        return {"commit": None, "branch": None, "dirty": None}
    changes = _output("git", "-C", str(folder), "status", "--porcelain")
    branch = _output("git", "-C", str(folder), "branch", "--show-current")
    return {"commit": commit, "branch": branch or None, "dirty": None if changes is None else bool(changes)}


def environment() -> dict[str, Any]:
    """Python, platform, versions of the libraries that decide a result (None = not installed), cores and GPUs."""
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or ""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "num_cpus": os.cpu_count(),
        "gpus": gpus.splitlines(),
    }


def installed_packages() -> str:
    """Every installed distribution as `name==version`, one a line, sorted: what `pip freeze` shows."""
    found = {(dist.metadata["Name"], dist.version) for dist in importlib.metadata.distributions()}
    lines = sorted((f"{name}=={version}" for name, version in found if name), key=str.lower)
    return "\n".join(lines) + "\n"


class SystemMetrics:
    """Samples CPU, memory, disk, network and GPUs of this machine into an outbox, as the metrics `system/...`.

    Used as a context manager around the work. The step is the number of the sample and goes on where an earlier process
    stopped; a last sample is taken at the end.

    period: seconds between samples.
    """

    def __init__(self, outbox: Outbox, period: float = 10.0):
        self.outbox, self.period = outbox, period
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="raymed-system-metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._is_over.set()
        self._thread.join()

    def _work(self) -> None:
        import psutil

        monitors = _monitors()
        psutil.cpu_percent()  # it measures since its last call
        for step in itertools.count(_num_samples(self.outbox)):
            is_last = self._is_over.wait(self.period)
            self.outbox.metrics(_sample(monitors), step)
            if is_last:
                return


def _sample(monitors: list[Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        values |= {SYSTEM_PREFIX + name: value for name, value in monitor.aggregate_metrics().items()}
        monitor.clear_metrics()
    return values


def _monitors() -> list[Any]:
    """MLflow's collectors, as far as this machine has what they count."""
    telemetry_off()
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        try:
            monitors.append(kind())
        except (ImportError, RuntimeError, AttributeError):  # no GPU library, no GPU, no network counters
            continue
    return monitors


def _num_samples(outbox: Outbox) -> int:
    metrics = [record for record in outbox.records() if record["op"] == "metrics"]
    samples = [record["step"] for record in metrics if any(name.startswith(SYSTEM_PREFIX) for name in record["values"])]
    return max(samples, default=-1) + 1


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(program: str, *arguments: str) -> str | None:
    """What a program prints, or None if it is not there, fails, or takes too long."""
    if shutil.which(program) is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
