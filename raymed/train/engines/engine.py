"""An engine moves one network: forward, backward, step, and its optimiser's state by parameter name.

`TorchEngine` is here; `deepspeed.py` has the other. Both average gradients over the workers, clip their global norm,
and keep fp32 weights; with precision "bf16" the forward pass runs under autocast.
"""

import warnings
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raymed.config import UserError
from raymed.distributed import rank, world_size
from raymed.ledger import COMMUNICATION, OPTIMIZER, span
from raymed.tasks.task import Ema, Network, Optim
from raymed.train.compute import Compute
from raymed.train.engines.ema import Average
from raymed.train.engines.optim import build_optimizer, clip_gradients, schedule, set_schedule

OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}; all but the step have the parameter's shape."""


class Engine(Protocol):
    """What the loop asks of an engine."""

    module: nn.Module

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward pass in training."""

    def raw(self, *inputs: Tensor) -> Any:
        """Forward pass past the engine, under the same autocast, for losses that differentiate twice."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient; with `last`, the one before `step`."""

    def step(self, number: int) -> Tensor:
        """Clip, move the weights, clear the gradient. Returns the gradient's norm before clipping."""
        ...

    def full_state(self) -> dict[str, Tensor]:
        """The module's state_dict on rank 0, whole tensors, copied to the CPU; {} on the others. Collective."""
        ...

    def average(self, ema: Ema) -> Average:
        """A running average of the weights that this engine trains."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """Whole (unsharded) state by parameter name on rank 0, copied to the CPU; {} on the others. Collective."""
        ...

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Continue from such a state, whichever engine, stage or number of workers it came from: the same on every
        rank. The module's weights have been loaded before the engine was built."""


class TorchEngine:
    """Plain torch. With several workers the gradient is averaged by one all-reduce a step."""

    def __init__(self, network: Network, steps: int, compute: Compute):
        if network.optim is None:
            raise UserError("an engine needs a network with an optimiser")
        self.module = network.module
        self.optim: Optim = network.optim
        self.steps = steps
        self.compute = compute
        self.optimizer = build_optimizer(network)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.forward = torch.compile(self.module) if compute.compile else self.module

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward, compiled and under autocast where asked."""
        if self.compute.compile:
            _lengths_vary(inputs)
        with self.compute.autocast():
            return self.forward(*inputs)

    def raw(self, *inputs: Tensor) -> Any:
        """Forward, never compiled: compiled graphs cannot be differentiated twice."""
        with self.compute.autocast():
            return self.module(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate into `.grad`; the workers meet only after the last one."""
        loss.backward()
        if last and world_size() > 1:
            average_gradients(self.parameters)

    def step(self, number: int) -> Tensor:
        """One optimiser step at this step number's learning rate."""
        with span(OPTIMIZER):
            set_schedule(self.optimizer, *schedule(self.optim, number, self.steps))
            norm = clip_gradients(self.parameters, self.optim.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def full_state(self) -> dict[str, Tensor]:
        """Every worker has the whole."""
        return copied_state(self.module)

    def average(self, ema: Ema) -> Average:
        """Of whole parameters."""
        return Average(self.module, ema)

    def optimizer_state(self) -> OptimizerState:
        """State by name."""
        return read_state(self.module, self.optimizer)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """State by name."""
        write_state(self.module, self.optimizer, state)


def _lengths_vary(inputs: Iterable[Tensor]) -> None:
    """Tell the compiler that tokens (B, L) come in many shapes: else each would be compiled anew."""
    for x in inputs:
        if x.ndim == 2 and not x.is_floating_point():
            torch._dynamo.maybe_mark_dynamic(x, 0)
            torch._dynamo.maybe_mark_dynamic(x, 1)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Mean of each gradient over the workers, in one flat all-reduce.

    A parameter that this worker's losses have not reached counts as zeros; one that no worker's have keeps no gradient,
    and the optimiser leaves it alone. How many have not reached each travels with the gradients.
    """
    parameters = list(parameters)
    missing = [p.grad is None for p in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    with span(COMMUNICATION):
        counts = torch.tensor(missing, dtype=gradients[0].dtype, device=gradients[0].device)
        flat = torch.cat([*(g.flatten() for g in gradients), counts])
        torch.distributed.all_reduce(flat)
        flat /= world_size()
        *means, unreached = flat.split([*(g.numel() for g in gradients), len(parameters)])
        for p, gradient, mean in zip(parameters, gradients, means, strict=True):
            p.grad = gradient.copy_(mean.view_as(gradient))
    if any(missing):  # else not asked for: a GPU would have to be waited for
        for p, share in zip(parameters, unreached.tolist(), strict=True):
            p.grad = None if share == 1 else p.grad


def copied_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state_dict, copied to the CPU on rank 0; {} on the others."""
    state = module.state_dict() if rank() == 0 else {}
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def read_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """A torch optimiser's state by parameter name, copied to the CPU on rank 0; {} on the others."""
    return {
        name: {key: value.detach().cpu().clone() for key, value in optimizer.state[p].items() if value is not None}
        for name, p in module.named_parameters()
        if p in optimizer.state and rank() == 0
    }


def write_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """The inverse of `read_state`."""
    for name, p in module.named_parameters():
        if name in state:
            optimizer.state[p] = {
                key: counter(optimizer, value, p) if key == "step" else torch.empty_like(p).copy_(value)
                for key, value in state[name].items()
            }


def counter(optimizer: torch.optim.Optimizer, step: Tensor, parameter: Tensor) -> Tensor:
    """Adam's own copy of its step, which it keeps beside the parameter when fused and else on the CPU."""
    return step.detach().to(parameter.device if optimizer.defaults.get("fused") else "cpu", copy=True)


def build_engine(name: str, network: Network, steps: int, compute: Compute) -> Engine:
    """The engine that `compute` names for a trained network of that name."""
    if compute.resolved_engine() == "torch":
        return TorchEngine(network, steps, compute)
    from raymed.train.engines.deepspeed import DeepSpeedEngine

    if compute.compile:
        warnings.warn("compute.compile has no effect with the DeepSpeed engine", stacklevel=2)
    return DeepSpeedEngine(name, network, steps, compute)
