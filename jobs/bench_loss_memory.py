"""Benchmark: peak memory and time of losses over pairs of an image and a text, at batches as large as BiomedCLIP's.

    python jobs/bench_loss_memory.py --out bench_loss_memory.json

One rank's share of a global batch of 32,768: 1,024 pairs against all candidates, forward and backward, features of
width 512; the other ranks are those of torch's fake process group, which talk to nobody but take as much memory.
Beside it open_clip's loss with the options that make its gradients right (local_loss, gather_with_grad), which holds
1,024 x 32,768 logits for each direction, and as it is by default, which holds all 32,768 x 32,768: that one is measured
at a batch of 8,192 and scaled up by the square. Every loss in a fresh process; on a GPU if there is one.
"""

import dataclasses
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_peers.machine import environment
from torch import Tensor

from raymed.config import to_json
from raymed.losses import PAIR_LOSSES

WIDTH = 512
PEER = "open_clip"


@dataclass(frozen=True)
class BenchLossMemory:
    """How large."""

    global_batch: int = 32_768
    ranks: int = 32
    full_batch: int = 8192
    """Of one process."""
    threads: int = os.cpu_count() or 1
    """Of torch."""
    out: Path | None = None
    """Where the figures are written as JSON too."""


def main(config: BenchLossMemory) -> None:
    """Measure and print."""
    text = to_json({"environment": environment(), "config": dataclasses.asdict(config)} | memory(config))
    print(text)
    if config.out:
        config.out.write_text(text)


def memory(config: BenchLossMemory) -> dict[str, Any]:
    """Bytes at the peak beyond the features of the rank, and seconds, of every loss."""
    share, whole, full = config.global_batch // config.ranks, config.global_batch, config.full_batch
    figures: dict[str, Any] = {
        f"{name}, {share} pairs against {whole}": in_fresh_process(name, share, config.ranks, config.threads)
        for name in (*PAIR_LOSSES, PEER)
    }
    for name in ("info_nce", PEER):
        figures[f"{name}, {full} pairs in one process"] = in_fresh_process(name, full, 1, config.threads)
    scaled = figures[f"{PEER}, {full} pairs in one process"]["bytes"] * (whole / full) ** 2
    return figures | {f"{PEER}, {whole} pairs in one process, scaled up": {"bytes": scaled}}


def in_fresh_process(*arguments: Any) -> dict[str, float]:
    """What `measure` returns there."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def measure(name: str, pairs: int, ranks: int, threads: int) -> dict[str, float]:
    """Of one rank's forward and backward pass."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    loss = open_clip_loss(ranks) if name == PEER else PAIR_LOSSES[name]()
    _pass(loss, torch.randn(2, 8, WIDTH, device=device))
    features = torch.randn(2, pairs, WIDTH, device=device)
    with _peak(device) as peak:
        began = time.perf_counter()
        _pass(loss, features)
        seconds = time.perf_counter() - began
    return {"bytes": peak[0], "seconds": seconds}


def open_clip_loss(ranks: int) -> Any:
    """With several ranks each compares its own pairs with all, and gradients return to where they belong."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss(local_loss=ranks > 1, gather_with_grad=ranks > 1, world_size=ranks)
    return lambda image, text, scale: loss(F.normalize(image, dim=1), F.normalize(text, dim=1), scale)


def _pass(loss: Any, features: Tensor) -> None:
    image, text = (half.detach().requires_grad_() for half in features.unbind())
    scale = torch.tensor(1 / 0.07, device=features.device, requires_grad=True)
    loss(image, text, scale=scale).backward()
    if features.is_cuda:
        torch.cuda.synchronize()


@contextmanager
def _peak(device: str) -> Iterator[list[float]]:
    """Yields a list that afterwards holds the most memory in use within, beyond that before, in bytes."""
    peak: list[float] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.append(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak; ru_maxrss cannot, and starts at the parent's
    before = _resident("VmRSS")
    yield peak
    peak.append(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes of this process now (VmRSS) or at the peak (VmHWM)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    import tyro

    main(tyro.cli(BenchLossMemory, description=__doc__))
