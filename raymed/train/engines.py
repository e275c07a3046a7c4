"""An engine moves one network: forward, backward, step, and its optimiser's state by parameter name.

`TorchEngine` is here; `raymed.train.deepspeed` has the other. Both average gradients over the workers, clip their
global norm, and keep fp32 weights; with precision "bf16" the forward pass runs under autocast.
"""

import warnings
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from raymed.config import UserError
from raymed.distributed import world_size
from raymed.tasks.task import Network, Optim
from raymed.train.compute import Compute
from raymed.train.optim import build_optimizer, schedule, set_schedule, total_norm

OptimizerState = dict[str, dict[str, Tensor]]  # parameter name -> {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}


class Engine(Protocol):
    """What the loop asks of an engine."""

    module: nn.Module

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward pass in training."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient; with `last`, the one before `step`."""

    def step(self, number: int) -> Tensor:
        """Clip, move the weights, clear the gradient. Returns the gradient's norm before clipping."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """Whole (unsharded) state by parameter name, on the CPU. Collective."""
        ...

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Continue from such a state, whichever engine, stage or number of workers it came from. Collective; the
        module's weights have been loaded before."""


class TorchEngine:
    """Plain torch. With several workers the gradient is averaged by one all-reduce a step."""

    def __init__(self, network: Network, steps: int, compute: Compute):
        if network.optim is None:
            raise UserError("an engine needs a network with an optimiser")
        self.module = network.module
        self.optim: Optim = network.optim
        self.steps = steps
        self.compute = compute
        self.optimizer = build_optimizer(self.module, self.optim)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.forward = torch.compile(self.module) if compute.compile else self.module

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward, compiled and under autocast where asked."""
        with self.compute.autocast():
            return self.forward(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate into `.grad`; the workers meet only after the last one."""
        loss.backward()
        if last and world_size() > 1:
            average_gradients(self.parameters)

    def step(self, number: int) -> Tensor:
        """One optimiser step at this step number's learning rate."""
        set_schedule(self.optimizer, *schedule(self.optim, number, self.steps))
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = total_norm(gradients)
        if self.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.optim.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def optimizer_state(self) -> OptimizerState:
        """State by name."""
        return read_state(self.module, self.optimizer)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """State by name."""
        write_state(self.module, self.optimizer, state)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Mean of each gradient over the workers, in one flat all-reduce."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def read_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """A torch optimiser's state by parameter name, on the CPU."""
    return {
        name: {key: value.detach().cpu().clone() for key, value in optimizer.state[p].items() if value is not None}
        for name, p in module.named_parameters()
        if p in optimizer.state
    }


def write_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """The inverse of `read_state`. Adam keeps `step` on the CPU, everything else beside its parameter."""
    for name, p in module.named_parameters():
        if name in state:
            optimizer.state[p] = {
                key: value.clone() if key == "step" else torch.empty_like(p).copy_(value)
                for key, value in state[name].items()
            }


def build_engine(network: Network, steps: int, compute: Compute) -> Engine:
    """The engine that `compute` names for a trained network."""
    if compute.resolved_engine() == "torch":
        return TorchEngine(network, steps, compute)
    from raymed.train.deepspeed import DeepSpeedEngine

    if compute.compile:
        warnings.warn("compute.compile has no effect with the DeepSpeed engine", stacklevel=2)
    return DeepSpeedEngine(network, steps, compute)
