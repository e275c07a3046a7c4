"""A phase's networks, engines and batches in a scratch copy, for a few steps that are thrown away: what estimates,
plans and FLOP counts are taken from.

Nothing is written, and as every draw is a function of the step, no later result changes.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raymed.data.dataset import DataSet
from raymed.random import derive
from raymed.tasks.task import Phase, Step
from raymed.train.compute import Compute
from raymed.train.evaluate import Feed, evaluate
from raymed.train.loop import sampler_of, take_step
from raymed.train.nets import Networks

_SCORED = 128  # images that stand for all when scoring is timed


def plain(compute: Compute) -> Compute:
    """The same machine with the plain torch engine: replicated, not compiled."""
    changes = {"engine": "torch", "zero_stage": 0, "network_stages": (), "offload": False, "compile": False}
    return dataclasses.replace(compute, **changes)


class DryRun:
    """One worker of a phase under the plain torch engine, with its share of every micro-batch. Communication is left
    out; what the phase starts from is not read, since other weights cost as much."""

    def __init__(self, phase: Phase, data: DataSet, seed: int, compute: Compute):
        self.phase, self.compute = phase, plain(compute)
        self.data, self.seed = data, seed
        self.few = data.splits["val"][:_SCORED]
        self.device = compute.resolved_device()
        self.sampler = sampler_of(phase, data, seed)
        self.feed = Feed(dataclasses.replace(data, splits={"few": self.few}), self.device)
        self.build()

    def build(self) -> None:
        """Networks and engines, fresh."""
        self.networks = Networks(self.phase, self.seed, self.compute)
        self.networks.build_engines(self.phase.steps)

    def keep_frozen(self) -> None:
        """The frozen networks' outputs for a few images; zeros stand in for the others."""
        self.feed.cached = {}
        self.feed.keep_frozen(self.phase, self.networks)

    def step(self, number: int) -> None:
        """A whole step, which moves the scratch weights."""
        take_step(self.phase, self.networks, self._work(number, self.phase.accumulate))

    def backward(self) -> None:
        """Forward and backward passes of one micro-batch alone; the gradients stay until `forget`."""
        step = self._work(0, 1)
        for loss in self.phase.task.losses(step, self.networks):
            self.networks.engines[loss.trains].backward(loss.value, last=False)

    def forget(self) -> None:
        """Drop the gradients."""
        for engine in self.networks.engines.values():
            engine.module.zero_grad(set_to_none=True)

    def score(self) -> None:
        """Evaluate a few images."""
        evaluate(self.phase, self.networks, self.feed, "few")

    @property
    def micro_batch(self) -> int:
        """Images of one micro-batch on this worker."""
        return math.ceil(self.phase.batch_size / self.phase.accumulate / self.compute.workers)

    def flops_per_sample(self) -> float:
        """See `raymed.train.plans.flops`; what activation checkpointing computes again is left out."""
        if self.compute.activation_checkpointing:
            without = dataclasses.replace(self.compute, activation_checkpointing=False)
            other = DryRun(self.phase, self.data, self.seed, without)
            other.feed = self.feed
            return other.flops_per_sample()
        # The counter does not know the CPU's own kernel of attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.backward()
        self.forget()
        return counter.get_total_flops() / self.micro_batch

    def activation_bytes(self) -> int:
        """The most memory that a micro-batch holds beside weights, gradients and optimiser state.

        On a GPU measured: what torch's allocator had at its peak more than before, temporary buffers included. On the
        CPU counted: tensors that are neither weights nor buffers, kept for the backward pass, at the most at a time.
        """
        if self.device.type == "cuda":
            return self._gpu_peak()
        state = [tensor for network in self.networks.networks.values() for tensor in _tensors(network.module)]
        kept = _Kept({_key(tensor) for tensor in state})
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(tensor, kept), lambda saved: saved.tensor):
            self.backward()
        self.forget()
        return kept.most

    def _gpu_peak(self) -> int:
        self.backward()  # from here on the gradients exist
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.backward()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        self.forget()
        return peak - before

    def _work(self, number: int, micro_batches: int) -> Step:
        number %= self.phase.steps
        micro = np.array_split(self.sampler.indices(number), self.phase.accumulate)[:micro_batches]
        share = [np.array_split(rows, self.compute.workers)[0] for rows in micro]
        seed = derive(self.seed, "phase", self.phase.name)
        return Step(number, seed, 0, tuple(map(self.feed.batch, share)))


class _Kept:
    """Storages that are kept for a backward pass, each counted once."""

    def __init__(self, apart: set[int]):
        self.apart = apart
        self.holders: dict[int, int] = {}
        self.now = self.most = 0


class _Saved:
    """A tensor that autograd keeps; when autograd lets go of it, it is no longer counted."""

    __slots__ = ("kept", "tensor")

    def __init__(self, tensor: Tensor, kept: _Kept):
        self.tensor, self.kept = tensor, kept
        self._count(+1)

    def __del__(self) -> None:
        self._count(-1)

    def _count(self, change: int) -> None:
        kept, key = self.kept, _key(self.tensor)
        if key in kept.apart:
            return
        before = kept.holders.get(key, 0)
        kept.holders[key] = before + change
        if (before == 0) != (before + change == 0):
            kept.now += change * self.tensor.untyped_storage().nbytes()
            kept.most = max(kept.most, kept.now)


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _key(tensor: Tensor) -> int:
    """Names the tensor's storage."""
    return tensor.untyped_storage()._cdata
