"""A Ray cluster of real nodes on this machine, each in processes of its own, which can be lost and replaced.

Every node is a `ray start --block` with ephemeral ports on 127.0.0.1; the head has its own temporary folder and HOME. A
driver is another process (`Nodes.environment`), since a second Ray does not start in one process.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

RAY = Path(sys.executable).with_name("ray")
_QUICK = {  # a lost node is noticed after about two seconds, not thirteen
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
_EVALUATION = "images/s"  # what stands in the line of each
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


@dataclass
class Node:
    """One node."""

    name: str
    process: subprocess.Popen
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    """Every process that was once seen below it."""

    def processes(self) -> list[psutil.Process]:
        """What runs on it: raylet, workers, agents; on the head also the driver's actors and the GCS."""
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            self.seen |= {p.pid: p for p in [top, *top.children(recursive=True)]}
        return [p for p in self.seen.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def workers(self, title: str = "RayTrainWorker") -> list[psutil.Process]:
        """Those of its processes that run such an actor, by the title that Ray gives them."""
        return [p for p in self.processes() if title in title_of(p)]

    def kill(self) -> None:
        """SIGKILL to all of it at once, as a machine that loses its power; returns when it is dead."""
        dying = self.processes()
        raylets = [p for p in dying if "raylet" in _name(p)]
        for process in [*raylets, *dying]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        _, alive = psutil.wait_procs(dying, timeout=30)
        assert not alive, f"{self.name} did not die: {alive}"


@dataclass
class Driver:
    """A driver's process."""

    process: subprocess.Popen
    log: Path
    start: int
    """Where in the log its own words begin."""

    def said(self) -> str:
        """What it has said so far."""
        return self.log.read_bytes()[self.start :].decode(errors="replace")

    def says(self, text: str, seconds: float = 300) -> None:
        """Wait until it has said that; AssertionError when it ends without, or after so many seconds."""
        wait_for(lambda: text in self.said() or self.process.poll() is not None, seconds, f"{text!r}\n{self.said()}")
        assert text in self.said(), f"it did not say {text!r}:\n{self.said()}"

    def evaluates(self, times: int = 1) -> None:
        """Wait for so many more evaluations."""
        before = self.said().count(_EVALUATION)
        wait_for(lambda: self.said().count(_EVALUATION) >= before + times, 300, f"an evaluation\n{self.said()}")

    def wait(self, seconds: float = 300) -> int:
        """Wait for its end; its exit code."""
        return self.process.wait(seconds)


class Nodes:
    """A cluster: a head node of `cpus` CPUs, and those that are added. A context manager: at its end all is killed.

    prefix(name): words before the command of a node, such as `ip netns exec NAME`; its address: `ip(name)`.
    """

    def __init__(
        self,
        folder: Path,
        cpus: int = 1,
        prefix: Callable[[str], Sequence[str]] = lambda name: (),
        ip: Callable[[str], str] = lambda name: "127.0.0.1",
        dashboard: bool = False,
    ):
        self.folder, self.prefix, self.ip = folder, prefix, ip
        self.temp = Path(f"/tmp/ray-nodes-{os.getpid()}-{time.monotonic_ns() % 10**6}")  # sockets need short paths
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.nodes: list[Node] = []
        self.drivers: list[subprocess.Popen] = []
        port = free_port()
        self.address = f"{ip('head')}:{port}"
        more = ["--head", f"--port={port}", f"--temp-dir={self.temp}", f"--ray-client-server-port={free_port()}"]
        more += [f"--include-dashboard={str(dashboard).lower()}", "--dashboard-port=0"]
        self.head = self._start("head", cpus, more)

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *error: object) -> None:
        import shutil

        for driver in self.drivers:
            with suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait(30)
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.temp, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """Of a driver: this cluster, its token, one thread, none of the user's own settings of Ray or raymed."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RAYMED_"))}
        own = {"HOME": str(self.home), "RAY_ADDRESS": self.address, "RAYMED_HOME": str(self.folder / "raymed")}
        return kept | _QUIET | _QUICK | own

    def add_node(self, cpus: int = 1, name: str | None = None, **environment: str) -> Node:
        """One node more; returns when the cluster has it. What runs there has this environment besides."""
        name = name or f"node-{len(self.nodes)}"
        return self._start(name, cpus, [f"--address={self.address}", f"--temp-dir={self.temp}"], environment)

    def kill_node(self, node: Node) -> None:
        """The node is lost."""
        node.kill()
        self.nodes.remove(node)

    def drain_node(self, node_id: str, seconds: int = 60) -> None:
        """What a cloud's notice does: the node (its id in hexadecimals) will go in so many seconds."""
        words = [str(RAY), "drain-node", f"--address={self.address}", f"--node-id={node_id}"]
        words += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot notice"]
        words += [f"--deadline-remaining-seconds={seconds}"]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def driver(self, script: Path, *arguments: object, **environment: str) -> "Driver":
        """Starts a driver on the head, in a process group of its own. What it says is added to folder/driver.log."""
        words = [*self.prefix("head"), sys.executable, str(script), *map(str, arguments)]
        path = self.folder / "driver.log"
        with open(path, "a") as log:
            env = self.environment | environment
            process = subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)
        self.drivers.append(process)
        return Driver(process, path, path.stat().st_size)

    def alive(self) -> list[dict]:
        """The live nodes, as the cluster knows them: dictionaries of ray.nodes()."""
        return [node for node in self._table() if node["Alive"]]

    def _table(self) -> list[dict]:
        """ray.nodes(), from a process of its own."""
        code = "import ray, json; ray.init(logging_level='ERROR', log_to_driver=False); print(json.dumps(ray.nodes()))"
        words = [*self.prefix("head"), sys.executable, "-c", code]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=120)
        return json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else []

    def _start(self, name: str, cpus: int, more: Sequence[str], own: dict[str, str] | None = None) -> Node:
        words = [*self.prefix(name), str(RAY), "start", "--block", "--disable-usage-stats", f"--num-cpus={cpus}"]
        words += [f"--node-ip-address={self.ip(name)}", f"--object-store-memory={80 * 2**20}"]
        words += ["--dashboard-agent-listen-port=0", "--include-log-monitor=" + str(name == "head").lower(), *more]
        path = self.folder / f"{name}.log"
        environment = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"} | (own or {})
        with open(path, "w") as log:
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
        node = Node(name, process)
        self.nodes.append(node)
        wait_for(lambda: "Ray runtime started" in path.read_text() or process.poll() is not None, 120, f"{name}")
        assert process.poll() is None, f"{name} did not start: {path.read_text()}"
        return node


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> object:
    """What `condition` returns once that is true; AssertionError after so many seconds."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"waited {seconds:g} s in vain: {what}"
        time.sleep(0.05)
    return value


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def title_of(process: psutil.Process) -> str:
    """Its command line, which Ray replaces; "" of one that is gone."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def _name(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""
