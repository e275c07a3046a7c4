"""ZeRO stage 3: parameters that lie in equal flat pieces on the workers, the last ones padded.

DeepSpeed gathers a layer's parameters in hooks around its forward and backward pass and lets them go again. Between,
`p.data` is empty, `p.ds_tensor` is this worker's piece, `p.ds_shape` and `p.ds_numel` say what the whole is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raymed.distributed import all_gather, rank
from raymed.tasks.task import Ema
from raymed.train.engines.ema import Average


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state_dict with whole tensors on rank 0, gathered one by one; {} on the others. Collective."""
    state = {}
    for name, value in module.state_dict(keep_vars=True).items():
        whole = gather(value) if is_sharded(value) else value.detach()
        if rank() == 0:
            state[name] = whole.cpu().clone(memory_format=torch.contiguous_format)
    return state


def is_sharded(value: Tensor) -> bool:
    """Whether DeepSpeed keeps this tensor in pieces."""
    return hasattr(value, "ds_tensor")


def gather(parameter: Any) -> Tensor:
    """The whole of a parameter. Collective."""
    return all_gather(parameter.ds_tensor)[: parameter.ds_numel].view(parameter.ds_shape)


def piece(whole: Tensor, parameter: Any) -> Tensor:
    """This worker's flat, padded piece of a tensor with the shape of the whole parameter, beside the parameter's."""
    held = parameter.ds_tensor
    found = whole.flatten()[rank() * held.numel() : (rank() + 1) * held.numel()]
    return torch.nn.functional.pad(found, (0, held.numel() - found.numel())).to(held)


def forget(module: nn.Module) -> None:
    """Drop what DeepSpeed 0.19 keeps of a network for good: in a list, and in a cache of which layers to let go."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [kept for kept in stack if kept is not module]
    cached: Any = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release  # type: ignore[attr-defined]
    for cell in cached.__closure__:
        cell.cell_contents.cache_clear()


class ShardedAverage(Average):
    """The average of the pieces that lie here."""

    def __init__(self, module: nn.Module, ema: Ema, let_go: Callable[[], None]):
        """
        Args:
            let_go: drops whatever parameters are whole at the moment, so that the next forward pass gathers them anew.
        """
        super().__init__(module, ema)
        self.whole = dict(module.named_parameters())
        self.let_go = let_go

    def _write(self, values: dict[str, Tensor]) -> None:
        self.let_go()
        super()._write(values)

    def _held(self, parameter: Any) -> Tensor:
        return parameter.ds_tensor

    def _share(self, name: str, whole: Tensor) -> Tensor:
        return piece(whole, self.whole[name])
