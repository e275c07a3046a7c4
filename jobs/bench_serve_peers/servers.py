"""The servers of jobs/bench_serve.py: how each is started, asked and stopped."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import psutil

HERE = Path(__file__).resolve().parent
TOKEN = "only-for-this-benchmark-0123456789"
_START_S, _STOP_S = 300.0, 90.0


@dataclass(frozen=True)
class Kind:
    """A way to serve."""

    script: Path
    path: str
    """Of a model."""
    environment: dict[str, str] = field(default_factory=dict)
    is_ours: bool = False
    """Takes bundles and tokens, and answers as raymed does."""
    is_json: bool = False
    """Takes {"image": base64} in place of bytes."""


_PREDICT = "/v1/models/{}:predict"
_ON_RAY = Kind(HERE / "raymed_on_ray.py", _PREDICT, environment={"RAYMED_SERVE_TOKEN": TOKEN}, is_ours=True)
_HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
KINDS = {
    "bare FastAPI": Kind(HERE / "bare_fastapi.py", "/{}"),
    "LitServe": Kind(HERE / "litserve_server.py", "/{}"),
    "raymed": Kind(HERE.parent / "serve_models.py", _PREDICT, is_ours=True),
    "Ray Serve, naive": Kind(HERE / "naive_serve.py", "/{}", is_json=True),
    "raymed on Ray": _ON_RAY,
    "raymed on Ray, HAProxy": replace(_ON_RAY, environment=_ON_RAY.environment | _HAPROXY),
}


class Server:
    """One of them, running, with some models: folders by name."""

    def __init__(self, name: str, models: dict[str, Path], log: Path):
        self.kind, self.name, self.log = KINDS[name], name, log
        self.port = _free_port()
        given = [f"{model}={folder / 'bundle' if self.kind.is_ours else folder}" for model, folder in models.items()]
        command = [sys.executable, str(self.kind.script), *self._arguments(given)]
        # A pool of threads that spins while it waits takes the processors from whoever asks; raymed sets this itself.
        # TF32 has 10 bits: on a GPU it rounds by more than the probabilities of the servers may differ by.
        alike = {"OMP_WAIT_POLICY": "passive", "NVIDIA_TF32_OVERRIDE": "0"}
        environment = os.environ | alike | self.kind.environment
        with log.open("w") as told:
            self.process = subprocess.Popen(command, env=environment, stdout=told, stderr=told)

    def _arguments(self, models: list[str]) -> list[str]:
        if self.kind.script.name == "serve_models.py":
            return ["--access.open", "--port", str(self.port), "--models", *models]
        return [str(self.port), *models]

    @property
    def headers(self) -> dict[str, str]:
        """Of a request."""
        content = "application/json" if self.kind.is_json else "image/png"
        return {"Content-Type": content} | ({"Authorization": f"Bearer {TOKEN}"} if self.kind.is_ours else {})

    def url(self, model: str) -> str:
        """Of a model."""
        return f"http://127.0.0.1:{self.port}{self.kind.path.format(model)}"

    def body(self, image: bytes) -> bytes:
        """Of a request."""
        return json.dumps({"image": base64.b64encode(image).decode()}).encode() if self.kind.is_json else image

    def probability(self, client: httpx.Client, model: str, image: bytes) -> float:
        """The answer for an image."""
        answer = client.post(self.url(model), content=self.body(image), headers=self.headers).raise_for_status().json()
        return answer["result"]["probability"] if self.kind.is_ours else answer["probability"]

    def wait(self, model: str, image: bytes) -> None:
        """Until it answers. Raises RuntimeError when it ends, or never does."""
        end = time.monotonic() + _START_S
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < end and self.process.poll() is None:
                try:
                    self.probability(client, model, image)
                    return
                except httpx.HTTPError:
                    time.sleep(0.5)
        raise RuntimeError(f"{self.name} does not answer:\n{self.log.read_text()[-2000:]}")

    def cpu_s(self) -> float:
        """Of processors, that it and what it has started have used so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self._processes())

    def _processes(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def stop(self) -> None:
        """End it, and what it has started."""
        started = self._processes()[1:] if self.process.poll() is None else []
        self.process.terminate()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        _, alive = psutil.wait_procs(started, timeout=10)
        for process in alive:
            process.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
