"""From an `Optim` to a torch optimiser; learning rate and momentum as pure functions of the step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from raymed.tasks.task import Network, Optim

_START, _END = 25.0, 1e4  # one-cycle: first lr is peak / 25, the last that / 1e4 (Smith & Topin 2018; torch's defaults)
_LOW_MOMENTUM = 0.85
SCALE = "lr_scale"
"""Of a group: factor of the learning rate."""


def parameter_groups(network: Network) -> dict[tuple[float, bool], list[nn.Parameter]]:
    """(factor of the learning rate, whether it is decayed) -> parameters that require a gradient, in named order.

    Biases and norm scales (fewer than two axes) are not decayed; factors are those of `Network.lr_scales`.
    """
    trained = [(name, p) for name, p in network.module.named_parameters() if p.requires_grad]
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in sorted(trained, key=lambda named: named[1].ndim < 2):
        groups.setdefault((network.lr_scales.get(name, 1.0), p.ndim >= 2), []).append(p)
    return groups


def build_optimizer(network: Network) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum, over the network's `parameter_groups`."""
    assert network.optim is not None
    optim = network.optim
    groups = [
        {"params": parameters, "weight_decay": optim.weight_decay if decayed else 0.0, SCALE: scale}
        for (scale, decayed), parameters in parameter_groups(network).items()
    ]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.momentum > 0)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])  # one pass over memory
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.momentum, optim.beta2), eps=optim.eps, fused=fused)


def schedule(optim: Optim, step: int, steps: int) -> tuple[float, float]:
    """(learning rate, momentum) of step number `step` out of `steps`."""
    rising = optim.warmup * steps
    if optim.schedule == "one_cycle":
        return _one_cycle(optim, step, steps, rising)
    if step + 1 < rising:
        return optim.lr * (step + 1) / rising, optim.momentum
    if optim.schedule == "constant":
        return optim.lr, optim.momentum
    done = (step - rising) / max(1.0, steps - rising)
    return optim.lr * (1 + math.cos(math.pi * max(0.0, done))) / 2, optim.momentum


def _one_cycle(optim: Optim, step: int, steps: int, rising: float) -> tuple[float, float]:
    peak_at = max(0.0, rising - 1)
    low, first = min(_LOW_MOMENTUM, optim.momentum), optim.lr / _START
    if step <= peak_at:
        done = step / peak_at if peak_at else 1.0
        return _cosine(first, optim.lr, done), _cosine(optim.momentum, low, done)
    done = (step - peak_at) / (steps - 1 - peak_at)
    return _cosine(optim.lr, first / _END, done), _cosine(low, optim.momentum, done)


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Write this step's learning rate and momentum into every group (also of DeepSpeed's wrapped optimisers)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[SCALE]
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float | None) -> Tensor:
    """Scale all gradients down together where their norm is larger than that. Returns the norm before."""
    moved = [p for p in parameters if p.grad is not None]
    norm = total_norm(p.grad for p in moved if p.grad is not None)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(moved, largest, norm)
    return norm


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together."""
    return torch.nn.utils.get_total_norm(list(gradients))
