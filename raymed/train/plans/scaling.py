"""Weak scaling, projected: how fast W workers would be, each with the share of the batch that was measured.

Every worker computes for t seconds a step and sends b(W) bytes (`sizes.py`; a ring all-reduce of n bytes sends
2 (W - 1) / W n). Over a link of B bytes/s with latency l a message from neighbour to neighbour, an all-reduce being
2 (W - 1) messages,

    c(W) = b(W) / B + 2 (W - 1) l
    step(W) = t + c(W)           communication after the backward pass
            = max(t, c(W))       hidden behind it as far as it goes
    efficiency(W) = t / step(W)

Inside a node a ring is as fast as one GPU's NVLink. Over nodes NCCL lays as many rings as there are network cards, each
for its part of the tensor, so that b crosses each node's whole network once: B is then that of a node, all its GPUs
together. Stragglers, congestion and the reading of data are left out: a bound from above.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """How workers reach each other."""

    name: str
    bytes_per_second: float
    """Each way: of one GPU inside a node, of a whole node between nodes."""
    latency: float
    """Seconds of one message."""


NVLINK = Link("NVLink", 450e9, 5e-6)
"""Fourth generation, inside a node of 8 H100 (900 GB/s in both directions together)."""
INFINIBAND = Link("InfiniBand", 8 * 50e9, 10e-6)
"""400 Gb/s for each of a node's 8 GPUs."""
ETHERNET = Link("Ethernet", 100e9 / 8, 50e-6)
"""100 Gb/s for a node."""
_NODE = 8  # GPUs that NVLink joins


@dataclass(frozen=True)
class Scaled:
    """A projection."""

    workers: int
    link: Link
    step_seconds: float
    efficiency: float
    """Of the speed of one worker times their number; 0 to 1."""


def weak_scaling(
    step_seconds: float, sent: Callable[[int], float], link: Link, workers: int, overlapped: bool = False
) -> Scaled:
    """The formula of this module.

    Args:
        step_seconds: of one worker's share, without communication.
        sent: number of workers -> bytes that each of them sends a step.
        overlapped: whether communication runs beside the computation.
    """
    wire = sent(workers) / link.bytes_per_second + 2 * (workers - 1) * link.latency
    step = max(step_seconds, wire) if overlapped else step_seconds + wire
    return Scaled(workers, link, step, step_seconds / step)


def projections(step_seconds: float, sent: Callable[[int], float]) -> list[Scaled]:
    """16 and 128 GPUs over both networks, and 8 in one node; not overlapped, as the engines are."""
    places = [(_NODE, NVLINK), *((workers, link) for workers in (16, 128) for link in (INFINIBAND, ETHERNET))]
    return [weak_scaling(step_seconds, sent, link, workers) for workers, link in places]


def ring(payload: float) -> Callable[[int], float]:
    """What each of W workers sends for one all-reduce of so many bytes."""
    return lambda workers: 2 * (workers - 1) / workers * payload
