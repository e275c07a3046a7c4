"""Collectives for losses and metrics that see the GLOBAL batch, differentiable where a gradient has to come back.

Every function is the identity without an initialised process group, and in one of a single process, so the same code
runs in a plain script. They use gloo on the CPU and NCCL on GPUs, whichever the group was made with.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401 -- see below
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from raymed.config import UserError
from raymed.ledger import COMMUNICATION, span

T = TypeVar("T")

# torch.distributed.nn, which torch itself imports sooner or later, and DeepSpeed have default arguments that are the
# default group at the moment of their import, and so keep it for ever if it was made before. So the first is imported
# here, and whoever makes a group for DeepSpeed imports that before. See `leave_group`.


def world_size() -> int:
    """Number of processes in the group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the group, from 0; 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_gather(x: Tensor) -> Tensor:
    """Concatenates x (b, ...) of every rank to (W * b, ...) in rank order; no gradient comes back.

    b must be the same on every rank: drop or pad the last batch.
    """
    return x.detach() if world_size() == 1 else _concatenate(x.detach())


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Concatenates x (b, ...) of every rank to (W * b, ...) in rank order, and returns gradients to where they belong.

    Forward: all-gather. Backward: sum the incoming gradients over the ranks, keep the rows of this rank. b must be the
    same on every rank. Twice differentiating raises.

    Why the sum: the loss of rank r depends on the features of every rank, so the features of this rank get a share of
    their gradient from the loss of each rank. When every rank evaluates the full loss of the global batch, each returns
    the same gradient: the sum is W times the gradient g of a single process, and averaging parameter gradients over the
    ranks (as DDP and DeepSpeed do) divides by W again. What remains after that average, G:

        loss on each rank            gather without gradient   this function
        full matrix (W b)^2          g / W                     g
        own rows only, b x W b       not proportional to g     g

    Adam hides the factor 1/W; clipping, weight decay and SGD do not.
    """
    return x if world_size() == 1 else _AllGather.apply(x)


def row_counts(x: Tensor) -> list[int]:
    """len(x) on every rank, in rank order. Collective."""
    if world_size() == 1:
        return [len(x)]
    return _concatenate(torch.tensor([len(x)], device=x.device)).tolist()


def all_gather_ragged(x: Tensor, counts: Sequence[int]) -> Tensor:
    """`all_gather_with_grad` of x (b_r, ...), where every rank has a number b_r of rows of its own.

    counts: those numbers, of `row_counts`.
    """
    if world_size() == 1:
        return x
    most = max(counts)
    padded = all_gather_with_grad(F.pad(x, (0, 0) * (x.ndim - 1) + (0, most - len(x))))
    return torch.cat([rows[:count] for rows, count in zip(padded.split(most), counts, strict=True)])


def all_reduce_sum_with_grad(x: Tensor) -> Tensor:
    """Sums x (any shape, the same on every rank) over the ranks; the backward pass sums the incoming gradients.

    With y = sum_r x_r in the loss L_s of every rank s, the gradient of the summed losses is d/dx_r = sum_s dL_s/dy, and
    averaging parameter gradients over the ranks gives that of the mean loss. Twice differentiating raises.
    """
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def all_gather_object(obj: T) -> list[T]:
    """The picklable object of every rank, in rank order."""
    if world_size() == 1:
        return [obj]
    objects: list[Any] = [None] * world_size()
    with span(COMMUNICATION):
        dist.all_gather_object(objects, obj)
    return objects


def max_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each of these numbers over the ranks. device: where the group communicates."""
    largest = torch.tensor([float(value) for value in values], device=device)
    if world_size() > 1:
        with span(COMMUNICATION):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def agreed(do: Callable[[], T]) -> T:
    """What `do` returns here, as soon as it has returned on every rank. Collective; `do` itself must not be.

    Where it raises an Exception on some ranks, all raise, so that none waits for them in the next collective: its own
    error there, and UserError with the words of the first of them elsewhere.
    """
    result, error = None, None
    try:
        result = do()
    except Exception as caught:
        error = caught
    told = all_gather_object(error and _in_words(error))
    if error:
        raise error
    for other, words in enumerate(told):
        if words:
            raise UserError(f"{words} (on worker {other})")
    return cast(T, result)


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def leave_group() -> None:
    """End the process group, if there is one, and its threads.

    `destroy_process_group` ends those of gloo only if nobody holds the group any more, and what holds it may wait for
    the garbage collector. A thread that lets go of a collective's tensors while Python shuts down aborts the process.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return _concatenate(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        start = rank() * ctx.rows
        return _sum(grad)[start : start + ctx.rows]


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _sum(grad)


def _concatenate(x: Tensor) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    with span(COMMUNICATION):
        dist.all_gather(parts, x)
    return torch.cat(parts)


def _sum(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    with span(COMMUNICATION):
        dist.all_reduce(total)
    return total
