"""Benchmark: servers of the same networks, of raymed and of others, under the same load.

    python jobs/bench_serve.py --out bench_serve.json
    python jobs/bench_serve.py --quick                      # does it work?

Two classifiers, EfficientNet-B0 at 224 pixels and a small network that stands for the identity, are asked about PNG
images of 224 pixels and of about 1 MB, as raw bodies. Servers, each in processes of its own (bench_serve_peers/; the
first, second and fourth import nothing from raymed, but put normalisations into convolutions and measure how many
threads are soonest, as it does):

1. In one process: FastAPI and uvicorn around the same network, with the same weights and image, computed in the event
   loop, which is soonest for one client; LitServe; raymed.
2. With Ray Serve: naively, JSON with base64 and `serve.batch` as it comes; raymed; raymed behind HAProxy.

Closed loops of 1, 8 and 32 clients, and Poisson arrivals at a half and four fifths of what the first server of the
group answers with 32. A client of one process takes turns with the servers, in an order drawn anew in each block. What
has a target is measured in every block, the rest in every third. In one process all compute on the GPU where there is
one, with Ray Serve on processors. All have OMP_WAIT_POLICY=passive, without which peers are many times slower where
clients share their processors, and NVIDIA_TF32_OVERRIDE=0, so that a GPU rounds as finely as they are compared.
HAProxy listens on all interfaces while it is measured.

Nothing is timed before all servers answer 16 images with equal probabilities, to 1e-5. Good: 200 within 200 ms. Figures
are for a machine with nothing else to do, and where others compute no target counts as met or missed.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import psutil
import torch
from bench_peers.machine import environment
from bench_serve_peers.models import BACKBONES, BODIES, write_bodies, write_model
from bench_serve_peers.servers import Server
from bench_train import spread, summary

from raymed.config import UserError, to_json

EQUAL = 1e-5
GOOD_S = 0.2
BUSY = 0.25
"""Of all processors, that others may use."""
FEWEST = 5
"""Turns that say something."""
CLIENTS = (1, 8, 32)
SHARES = (0.5, 0.8)
SMALL = "tiny"
WINDOW_S = {"b0": 1.5, SMALL: 0.8}
GROUPS = {
    "one process": ("bare FastAPI", "LitServe", "raymed"),
    "Ray Serve": ("Ray Serve, naive", "raymed on Ray", "raymed on Ray, HAProxy"),
}
"""The first is what the others are compared with."""
TARGETS = {("one process", 1): 0.95, ("one process", 32): 1.0, ("Ray Serve", 32): 2.0}
"""Of raymed's requests a second over those of the first of the group, at least, by group and clients."""
ON_GPU = {("one process", 32): 1.3}
"""In place of these where the servers compute on a GPU, which takes images in batches."""
P99_TARGET = 1.0
"""Of raymed's 99th percentile over that of the first of the group, at most, with as many clients as there are."""
Place = Literal["one process", "Ray Serve"]
Model = Literal["b0", "tiny"]
Body = Literal["224", "1MB"]


@dataclass(frozen=True)
class BenchServe:
    """What to measure, and for how long."""

    groups: tuple[Place, ...] = ("one process", "Ray Serve")
    servers: tuple[str, ...] = ()
    """Of those groups; none = all of them."""
    models: tuple[Model, ...] = ("b0", "tiny")
    bodies: tuple[Body, ...] = ("224", "1MB")
    blocks: int = 9
    """Turns of each server."""
    seconds: float = 1.0
    """Times the length of a turn: 1.5 s of EfficientNet-B0, 0.8 s of the small network."""
    quick: bool = False
    """One block of short turns."""
    out: Path | None = None
    """Where the figures are written as JSON too."""


@dataclass(frozen=True)
class Load:
    """What a server is put under: a closed loop of so many clients, or arrivals at a share of the capacity."""

    model: str
    body: str
    clients: int = 0
    share: float = 0.0

    @property
    def name(self) -> str:
        """For people."""
        how = f"{self.clients} clients" if self.clients else f"arrivals at {self.share:.0%}"
        return f"{self.model}, {self.body}, {how}"


@dataclass
class Turns:
    """What one server did under one load."""

    rates: list[float] = field(default_factory=list)
    """Requests a second that were answered, of each turn."""
    good: list[float] = field(default_factory=list)
    """Of them, as fast as wanted."""
    seconds: list[float] = field(default_factory=list)
    """Of each request that was answered."""
    failed: int = 0
    p99_s: list[float] = field(default_factory=list)
    """Within which 99 % were answered, of each turn; nan where none was."""
    cpu_s: list[float] = field(default_factory=list)
    """Of processors, a request, of each turn with its warm-up."""

    def add(self, told: dict[str, Any], cpu_s: float) -> None:
        """A turn, as the client tells of it."""
        self.cpu_s.append(cpu_s / max(1, told["asked"]))
        answered = [seconds for status, seconds in told["ended"] if status == 200]
        self.rates.append(len(answered) / told["seconds"])
        self.good.append(sum(seconds <= GOOD_S for seconds in answered) / told["seconds"])
        self.seconds += answered
        self.p99_s.append(float(np.quantile(answered, 0.99)) if answered else float("nan"))
        self.failed += len(told["ended"]) - len(answered)

    def figures(self) -> dict[str, Any]:
        """Medians over turns, and quantiles over all requests."""
        quantiles = np.quantile(self.seconds, (0.5, 0.95, 0.99)) if self.seconds else [float("nan")] * 3
        ms = {f"p{name}, ms": 1e3 * float(value) for name, value in zip((50, 95, 99), quantiles, strict=True)}
        rates = {"requests a second": spread(np.array(self.rates)), "good a second": float(np.median(self.good))}
        counts = {"CPU ms a request": 1e3 * float(np.median(self.cpu_s)), "requests": len(self.seconds)}
        return rates | ms | counts | {"failed": self.failed}


class Client:
    """The process that asks."""

    def __init__(self, folder: Path):
        script = Path(__file__).parent / "bench_serve_peers" / "http_load.py"
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, str(script)], stdin=pipe, stdout=pipe, text=True)
        self.folder = folder

    def __call__(self, server: Server, load: Load, window: float, rate: float, seed: int) -> dict[str, Any]:
        """Put a server under a load for a while."""
        how = {"at_once": load.clients} if load.clients else {"rate": rate, "seed": seed}
        warm_up = window * (0.2 if load.clients == 1 else 0.6)
        kind = "json" if server.kind.is_json else "png"
        bodies = sorted(map(str, (self.folder / load.body).glob(f"*.{kind}")))
        out = self.folder / "told.json"
        task = {"out": str(out), "url": server.url(load.model), "headers": server.headers, "bodies": bodies}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(task | how | {"warm_up": warm_up, "seconds": window}) + "\n")
        self.process.stdin.flush()
        if not self.process.stdout.readline():
            raise RuntimeError(f"the client has ended: {self.process.wait()}")
        return json.loads(out.read_text())

    def close(self) -> None:
        """No more tasks."""
        self.process.communicate(timeout=60)


def main(config: BenchServe) -> None:
    """Measure and print."""
    if config.quick:
        config = dataclasses.replace(config, blocks=1, seconds=0.5)
    figures: dict[str, Any] = {"environment": environment(), "config": dataclasses.asdict(config)}
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as scratch:
        folder = Path(scratch)
        models = {name: write_model(folder / name, *BACKBONES[name]) for name in config.models}
        for name in config.bodies:
            write_bodies(folder / "bodies" / name, BODIES[name])
        for group in config.groups:
            figures[group] = measure(config, group, models, folder)
            print(table(group, figures[group]), flush=True)
    if config.out:
        config.out.write_text(to_json(figures))


def measure(config: BenchServe, group: str, models: dict[str, Path], folder: Path) -> dict[str, Any]:
    """All servers of a group in turns."""
    device = device_of(group)
    names = [name for name in GROUPS[group] if not config.servers or name in config.servers]
    with running(names, models, folder) as servers, closing(Client(folder / "bodies")) as client:
        differ = check_equal(servers, config, folder / "bodies")
        found, busy = blocks(config, group, servers, client)
    figures = {load.name: {name: turns.figures() for name, turns in of.items()} for load, of in found.items()}
    return {
        "probabilities differ by": differ,
        "others used": busy,
        "loads": figures,
        "device": device,
        "ratios": ratios(group, device, found, float(np.median(busy))),
    }


def device_of(group: str) -> str:
    """What the servers of a group compute on: a replica of Ray Serve has no GPU that it has not asked for."""
    return "cuda" if group == "one process" and torch.cuda.is_available() else "cpu"


@contextmanager
def running(names: Sequence[str], models: dict[str, Path], folder: Path) -> Iterator[list[Server]]:
    """Servers that answer, started one after the other."""
    image = next((folder / "bodies").glob("*/0.png")).read_bytes()
    with ExitStack() as stack:
        servers = []
        for name in names:
            servers.append(Server(name, models, folder / f"{name}.log"))
            stack.callback(servers[-1].stop)
            for model in models:
                servers[-1].wait(model, image)
        yield servers


def check_equal(servers: Sequence[Server], config: BenchServe, bodies: Path) -> float:
    """Largest difference of their probabilities. Raises UserError where it is too large, or where an image makes none,
    so that equal answers would mean nothing."""
    found = np.array([answers(server, config, bodies) for server in servers])
    if np.ptp(found[0]) < 0.2:
        raise UserError("the networks answer all images alike")
    difference = float(np.abs(found - found[0]).max())
    if not difference <= EQUAL:
        raise UserError(f"the probabilities of the servers differ by {difference:.1e}: no timing would mean anything")
    return difference


def answers(server: Server, config: BenchServe, bodies: Path) -> list[float]:
    """Probabilities of all images by all models."""
    with httpx.Client(timeout=60) as client:
        return [
            server.probability(client, model, path.read_bytes())
            for model in config.models
            for body in config.bodies
            for path in sorted((bodies / body).glob("*.png"))
        ]


def blocks(
    config: BenchServe, group: str, servers: Sequence[Server], client: Client
) -> tuple[dict[Load, dict[str, Turns]], list[float]]:
    """What each server did under each load, and what others used of the processors before each block."""
    loads = [Load(m, b, clients=n) for m in config.models for b in config.bodies for n in CLIENTS]
    loads += [Load(m, config.bodies[0], share=share) for m in config.models for share in SHARES]
    found = {load: {server.name: Turns() for server in servers} for load in loads}
    busy = []
    for block in range(config.blocks):
        busy.append(psutil.cpu_percent(1) / 100)
        is_third = block % 3 == 2 or block == config.blocks - 1
        for load in loads:
            if not is_third and (group, load.clients) not in TARGETS:
                continue
            window = config.seconds * WINDOW_S[load.model] * (1 if load.clients else 2)
            rate = load.share * capacity(found, load, servers[0])
            for place in np.random.default_rng((block, loads.index(load))).permutation(len(servers)):
                server = servers[place]
                before = server.cpu_s()
                told = client(server, load, window, rate, seed=block)
                found[load][server.name].add(told, server.cpu_s() - before)
        print(f"{group}: {block + 1} of {config.blocks} blocks", file=sys.stderr, flush=True)
    return found, busy


def capacity(found: dict[Load, dict[str, Turns]], load: Load, server: Server) -> float:
    """Requests a second that a server has answered with as many clients as there are."""
    rates = found[Load(load.model, load.body, clients=CLIENTS[-1])][server.name].rates
    return float(np.median(rates)) if rates else 0.0


def ratios(group: str, device: str, found: dict[Load, dict[str, Turns]], busy: float) -> dict[str, Any]:
    """raymed's requests a second, and 99th percentile, over those of the first of the group, turn by turn, where there
    is a target."""
    reference = GROUPS[group][0]
    targets = TARGETS | ON_GPU if device == "cuda" else TARGETS
    compared: dict[str, Any] = {}
    for load, of in found.items():
        target = targets.get((group, load.clients))
        if target is None or reference not in of:
            continue
        for name in (name for name in of if name.startswith("raymed")):
            over = f"{load.name}: {name} over {reference}"
            ratio = np.array(of[name].rates) / np.array(of[reference].rates)
            compared[over] = judged(summary(ratio, target, "at least"), busy)
            if load.clients == CLIENTS[-1]:
                ratio = np.array(of[name].p99_s) / np.array(of[reference].p99_s)
                compared[f"{over}, p99"] = judged(summary(ratio, P99_TARGET, "at most"), busy)
    return compared


def judged(ratio: dict[str, Any], busy: float) -> dict[str, Any]:
    """Nothing is met or missed on a machine where others compute, or after a few turns."""
    if len(ratio["values"]) < FEWEST:
        return ratio | {"verdict": f"not resolved by fewer than {FEWEST} turns"}
    if busy > BUSY:
        return ratio | {"verdict": f"not resolved: others used {busy:.0%} of the processors"}
    return ratio


def table(group: str, figures: dict[str, Any]) -> str:
    """What people read."""
    lines = [f"{group}, on {figures['device']}: probabilities differ by {figures['probabilities differ by']:.0e}"]
    if any(load.startswith(SMALL) for load in figures["loads"]):
        lines.append(f"{SMALL}: a small network that stands for the identity, so that the servers themselves are seen")
    columns = ("requests a second", "p50, ms", "p95, ms", "p99, ms", "good a second", "CPU ms a request", "failed")
    lines.append(f"{'':54}" + "".join(f"{column:>18}" for column in columns))
    for load, of in figures["loads"].items():
        for name, found in of.items():
            values = [found[column] for column in columns]
            values[0] = values[0]["median"]
            lines.append(f"{load + ': ' + name:54}" + "".join(f"{value:18.1f}" for value in values))
    for name, ratio in figures["ratios"].items():
        shown = f"{ratio['median']:.2f} (+- {ratio['half_width_95']:.2f}), {ratio['target']}: {ratio['verdict']}"
        lines.append(f"{name}: {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(BenchServe, description=__doc__))
