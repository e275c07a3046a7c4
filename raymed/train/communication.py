"""What workers say to each other, seen: within `measured_communication` every collective is a span of the ledger and
its bytes are counted, whoever calls it, DeepSpeed included.

DeepSpeed reduces in hooks of the backward pass and gathers in hooks of the forward pass, so no code of ours stands
around its collectives. They all end in functions of `torch.distributed`, looked up when they are called (two are kept
by its backend object), and what is asynchronous ends in `Work.wait`: these are wrapped while the context is open. With
gloo the calls block the host; with NCCL they, or `wait`, hold up the stream: both are what a ledger measures, the time
in which nothing else is done. Torch's own DistributedDataParallel reduces in C++ and is not seen.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from raymed.ledger import COMMUNICATION, span, within

_TRIPS = {"all_reduce": 2, "all_gather": 1, "all_gather_into_tensor": 1, "all_gather_single": 1, "reduce_scatter": 1,
          "reduce_scatter_tensor": 1, "reduce_scatter_single": 1, "broadcast": 1, "reduce": 1}  # fmt: skip
"""How often a ring of W workers passes (W - 1) / W of the whole tensor on, for each collective of tensors."""
_UNCOUNTED = ("all_gather_object", "broadcast_object_list", "barrier")
_KEPT = {"all_gather_function": "all_gather_into_tensor", "reduce_scatter_function": "reduce_scatter_tensor"}
"""Attributes of DeepSpeed's backend that hold a function of torch.distributed."""


@dataclass
class Traffic:
    """What this worker's tensors cost on the wire."""

    bytes: float = 0.0
    """Sent by this worker if each collective of n bytes is a ring: 2 (W - 1) / W n for an all-reduce, and half of it
    for either half (all-gather, reduce-scatter) and for broadcast and reduce."""
    calls: int = 0
    """Collectives of tensors."""

    def add(self, trips: int, arguments: tuple[Any, ...], group: Any) -> None:
        """One collective; the whole tensor is the largest of its arguments."""
        workers = dist.get_world_size(group)
        self.bytes += trips * (workers - 1) / workers * max(map(_size, arguments))
        self.calls += 1


@contextmanager
def measured_communication() -> Iterator[Traffic]:
    """Within: the collectives of this process are spans "communication" of the active ledger; yields what they sent."""
    traffic = Traffic()
    with ExitStack() as stack:
        for name, trips in _TRIPS.items():
            if hasattr(dist, name):  # some have another name from torch 2.13 on
                _replace(stack, dist, name, _counted(traffic, trips, getattr(dist, name)))
        for name in _UNCOUNTED:
            _replace(stack, dist, name, within(COMMUNICATION, getattr(dist, name)))
        _replace(stack, dist.Work, "wait", within(COMMUNICATION, dist.Work.wait))
        backend = getattr(sys.modules.get("deepspeed.comm.comm"), "cdb", None)
        for kept, name in _KEPT.items() if backend is not None else ():
            _replace(stack, backend, kept, _counted(traffic, _TRIPS[name], getattr(backend, kept)))
        yield traffic


def _replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _counted(traffic: Traffic, trips: int, collective: Callable) -> Callable:
    @functools.wraps(collective)
    def measured(*args: Any, **kwargs: Any) -> Any:
        with span(COMMUNICATION):
            traffic.add(trips, (*args, *kwargs.values()), kwargs.get("group"))
            return collective(*args, **kwargs)

    return measured


def _size(argument: Any) -> int:
    """Bytes of a tensor or of a list of tensors."""
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(_size, argument)) if isinstance(argument, list | tuple) else 0
