"""Bytes by counting: what a network takes of a worker's memory, and of the wire, at each ZeRO stage.

Weights, gradients and optimiser state are fp32 (bf16 is autocast's), E elements in all of W workers:

                    weights     gradients   optimiser   master copy   sent a step (ring)
    stage 0         4 E         4 E         8 E         -             2 r
    stage 1         4 E         4 E *       8 E / W     4 E / W       3 r
    stage 2         4 E         4 E / W     8 E / W     4 E / W       (2 A + 1) r
    stage 3         4 E / W     4 E / W     8 E / W     4 E / W       (A + A or 2 A) r

with r = (W - 1) / W x 4 E, what a ring sends for half an all-reduce, and A micro-batches a step (* with one of them
4 E / W, since what is averaged is let go at once). 8 E is AdamW; SGD with momentum has half of that. Stages 1 to 3
move a flat fp32 copy of the weights, though these are fp32 already. Stages 1 and 2 average gradients by an all-reduce
where a reduce would do, and then gather the new weights. Stage 3 keeps what it gathered for the forward pass until the
backward pass, up to a billion elements, and beyond gathers twice; small parameters stay whole beside their pieces and
are gathered once a step. The formulas are DeepSpeed 0.19's, checked against its real tensors and collectives.

Networks are built whole on every device, and cut then: 4 E is needed at any stage, and once at stage 3.

A checkpoint is written from a copy of all that is in it, which rank 0 holds in the memory of its CPU: whole at any
stage, 4 E of weights, 4 E of averages where any are kept, 8 E of optimiser state, and what the task remembers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from raymed.tasks.task import Network, Phase
from raymed.train.engines.deepspeed import BUCKET, KEPT_WHOLE
from raymed.train.engines.optim import parameter_groups

T = TypeVar("T")

_FLOAT = 4  # bytes
_LIVE = 1_000_000_000  # elements that stage 3 keeps whole between forward and backward pass


@dataclass(frozen=True)
class Sizes:
    """A network by its numbers of elements."""

    groups: tuple[tuple[int, ...], ...]
    """Of every trained parameter, in the optimiser's groups."""
    fixed_bytes: int
    """Of parameters that are not trained, and of buffers."""
    moments: int = 0
    """Numbers that the optimiser keeps for each trained one: AdamW 2, SGD 1 or 0."""
    averaged: bool = False
    """Whether a running average is kept."""

    @property
    def trained(self) -> int:
        """Elements in all trained parameters."""
        return sum(map(sum, self.groups))

    @property
    def whole_bytes(self) -> int:
        """Of the network as it is built, before stage 3 cuts it."""
        return _FLOAT * self.trained + self.fixed_bytes

    @property
    def state_bytes(self) -> int:
        """Of the optimiser's state, whole: its numbers, and AdamW's step of every parameter."""
        steps = sum(map(len, self.groups)) if self.moments == 2 else 0
        return _FLOAT * (self.moments * self.trained + steps)

    @property
    def small(self) -> int:
        """Elements in those that stage 3 keeps whole."""
        return sum(size for group in self.groups for size in group if size <= KEPT_WHOLE)

    @property
    def largest(self) -> int:
        """Elements of the largest trained parameter."""
        return max(map(max, self.groups), default=0)


@dataclass(frozen=True)
class Bytes:
    """Memory of one worker."""

    weights: int = 0
    """Trained ones."""
    fixed: int = 0
    """What is not trained: frozen weights, statistics of normalisation."""
    gradients: int = 0
    optimizer: int = 0
    master: int = 0
    """fp32 copy that DeepSpeed moves in place of the weights."""
    average: int = 0
    buffers: int = 0
    """For communication: buckets, flat copies, gathered weights."""
    host: int = 0
    """What is offloaded to the memory of the CPU."""

    @property
    def states(self) -> int:
        """What is there all the time, on the device."""
        return self.weights + self.fixed + self.gradients + self.optimizer + self.master + self.average

    @property
    def total(self) -> int:
        """States and buffers."""
        return self.states + self.buffers

    def __add__(self, other: "Bytes") -> "Bytes":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Bytes(*(a + b for a, b in zip(mine, theirs, strict=True)))


def sizes_of(phase: Phase) -> dict[str, Sizes]:
    """Every network of a phase, counted without allocating it where its construction allows that."""
    return {name: _sizes(network) for name, network in _on_meta(phase.task.networks).items()}


def copied_bytes(phase: Phase, sizes: Mapping[str, Sizes]) -> int:
    """Of the copy from which a checkpoint of a phase is written while its training goes on. sizes: by network."""
    weights = sum(size.whole_bytes for size in sizes.values())
    averages = weights if any(size.averaged for size in sizes.values()) else 0
    memory = sum(tensor.nbytes for tensor in _on_meta(phase.task.memory).values())
    return weights + averages + sum(size.state_bytes for size in sizes.values()) + memory


def _on_meta(build: Callable[[], T]) -> T:
    """What `build` returns, without allocating its tensors where it allows that."""
    with torch.random.fork_rng():
        try:
            with torch.device("meta"):
                return build()
        except (NotImplementedError, RuntimeError):  # reads numbers, or computes with them
            return build()


def _sizes(network: Network) -> Sizes:
    parameters, buffers = list(network.module.parameters()), list(network.module.buffers())
    groups = [] if network.optim is None else list(parameter_groups(network).values())
    fixed = sum(p.nbytes for p in parameters + buffers) - sum(p.nbytes for group in groups for p in group)
    return Sizes(
        tuple(tuple(p.numel() for p in group) for group in groups), fixed, _moments(network), network.ema is not None
    )


def _moments(network: Network) -> int:
    if network.optim is None:
        return 0
    return 2 if network.optim.name == "adamw" else int(network.optim.momentum > 0)


def memory_of(sizes: Sizes, stage: int, workers: int, accumulate: int = 1, offload: bool = False) -> Bytes:
    """Memory of one worker for a network. A network that is not trained is whole on each of them."""
    whole, share = _FLOAT * sizes.trained, _FLOAT * shard(sizes, stage, workers)
    moved = share if stage else whole
    memory = Bytes(
        weights=share + _FLOAT * sizes.small if stage == 3 else whole,
        fixed=sizes.fixed_bytes,
        gradients=whole if stage == 0 or (stage == 1 and accumulate > 1) else share,
        optimizer=sizes.moments * moved,
        master=share if stage else 0,
        average=(share if stage == 3 else whole) if sizes.averaged else 0,
        buffers=_FLOAT * _buffers(sizes, stage, workers),
    )
    if not offload or stage < 2:
        return memory
    host = memory.gradients + memory.optimizer + memory.master
    return dataclasses.replace(memory, gradients=0, optimizer=0, master=0, host=host)


def shard(sizes: Sizes, stage: int, workers: int) -> int:
    """Elements of a trained network that one worker keeps: stage 3 cuts every parameter, 1 and 2 the optimiser's
    groups laid end to end, each padded to equal pieces."""
    whole = sizes.groups if stage == 3 else [(sum(group),) for group in sizes.groups]
    return sum(-(-size // workers) for group in whole for size in group)


def _buffers(sizes: Sizes, stage: int, workers: int) -> int:
    """Elements: the flat gradient that is averaged; a bucket of it, or the shard laid flat; a bucket and the gathered
    weights."""
    bucket = max(min(BUCKET, sizes.trained), sizes.largest if stage == 3 else 0)
    if stage == 0:
        return sizes.trained if workers > 1 else 0
    if stage == 3:
        cut = sizes.trained - sizes.small
        return bucket + (max(min(cut, _LIVE), sizes.largest) if cut else 0)
    return max(bucket, shard(sizes, stage, workers))


def sent_of(sizes: Sizes, stage: int, workers: int, accumulate: int) -> float:
    """Bytes that one worker sends for a network in one training step."""
    half = (workers - 1) / workers * _FLOAT
    if stage < 3:
        return (2, 3, 2 * accumulate + 1)[stage] * half * sizes.trained
    cut = sizes.trained - sizes.small
    gathers = 1 if cut <= _LIVE else 2
    return half * (accumulate * (1 + gathers) * cut + (accumulate + 1) * sizes.small)
