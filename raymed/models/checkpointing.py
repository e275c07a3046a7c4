"""Activation checkpointing: keep the inputs of a network's blocks, compute what lies inside again in the backward pass.

Networks do it themselves, by switches of their own (`_SWITCHES`); here those inside a module are found and set. Their
blocks run under `torch.utils.checkpoint` (Chen et al., "Training deep nets with sublinear memory cost", 2016), which
repeats the random numbers of dropout. What it does not take care of is done here: normalisation layers would move their
running statistics once more.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_SWITCHES = {
    "set_grad_checkpointing": True,  # timm, open_clip, ResNetSmall
    "activation_checkpointing_enable": {"use_reentrant": False},  # transformers
    "gradient_checkpointing_enable": {"use_reentrant": False},  # transformers, its name of old
}


def checkpoint_activations(module: nn.Module) -> bool:
    """Switch activation checkpointing on in every network inside a module that can do it; False: there is none.

    Outputs, gradients and running statistics stay the same. The first pass of a block and its repetition in the
    backward pass must find the module in the same mode, train or eval, and other state that a forward pass changes
    (the power iteration of spectral normalisation) is not held still.
    """
    if not _switch_on(module):
        return False
    for norm in module.modules():
        if isinstance(norm, _NormBase):
            norm.register_forward_pre_hook(_hold_still)
            norm.register_forward_hook(_let_go, always_call=True)
    return True


def _switch_on(module: nn.Module) -> bool:
    """The outermost switches are set; they reach what is below them."""
    for name, argument in _SWITCHES.items():
        if hasattr(module, name):
            with suppress(AssertionError, ValueError):  # how timm and transformers say that a network cannot
                getattr(module, name)(argument)
                return True
    return any([_switch_on(child) for child in module.children()])


def _hold_still(norm: Any, inputs: tuple[Tensor, ...]) -> None:
    """Before a forward pass inside a backward pass, which is a repetition: nothing is to be added to the statistics.

    They go on being passed to the kernel: a repetition has to save for the backward pass what the first pass saved.
    """
    if torch._C._current_graph_task_id() == -1:
        return
    seen = norm.num_batches_tracked
    norm.held_still = norm.momentum, seen
    norm.momentum = 0.0
    norm.num_batches_tracked = None if seen is None else seen.clone()


def _let_go(norm: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """After it, also where it ends early because everything needed is there."""
    if "held_still" in vars(norm):
        norm.momentum, norm.num_batches_tracked = vars(norm).pop("held_still")
