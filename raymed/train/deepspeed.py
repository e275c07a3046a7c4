"""The DeepSpeed engine: ZeRO stages 0 to 2 behind the same few verbs as plain torch.

What DeepSpeed 0.19 needs and does not say: the network in training must be called through its engine; accumulation is
exact with our own boundary and no scaling by it; stage 0 knows no gradient norm; optimiser state does not exist before
the first step, so it cannot be restored without one.
"""

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from raymed.config import UserError
from raymed.distributed import world_size
from raymed.tasks.task import Network, Optim
from raymed.train.compute import Compute
from raymed.train.engines import OptimizerState, read_state, write_state
from raymed.train.optim import build_optimizer, schedule, set_schedule, total_norm


class DeepSpeedEngine:
    """One network under DeepSpeed, with an optimiser of ours inside."""

    def __init__(self, network: Network, steps: int, compute: Compute):
        if network.optim is None:
            raise UserError("an engine needs a network with an optimiser")
        self.module = network.module
        self.optim: Optim = network.optim
        self.steps = steps
        self.stage = compute.zero_stage
        self.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload] # DeepSpeed reads the weights as flat bytes
        self.engine: Any = _initialize(network, build_optimizer(network.module, network.optim), compute)
        if self.stage == 0:  # above, the weights are views of flat buffers and must stay so
            compute.prepare(self.module)
        self.base_optimizer = self.engine.optimizer.optimizer if self.stage else self.engine.optimizer

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward through the engine, whose hooks the backward pass needs."""
        return self.engine(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate; the workers' gradients are averaged after the last one."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, number: int) -> Tensor:
        """One optimiser step at this step number's learning rate."""
        set_schedule(self.engine.optimizer, *schedule(self.optim, number, self.steps))
        if self.stage == 0:  # get_global_grad_norm() is None there, and step() clears the gradients
            norm = total_norm(p.grad for p in self.module.parameters() if p.grad is not None)
            self.engine.step()
            return norm
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def optimizer_state(self) -> OptimizerState:
        """Whole state by name, gathered from the shards."""
        if self.stage == 0:
            return read_state(self.module, self.base_optimizer)
        from deepspeed.utils import safe_get_full_optimizer_state

        keys, counters = self._shard_keys()
        return {
            name: {key: safe_get_full_optimizer_state(p, key).cpu().clone() for key in keys}  # type: ignore[union-attr]
            | {key: value.cpu().clone() for key, value in counters.items()}
            for name, p in self._trained()
        }

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Create the state by a step that moves nothing, then write every shard of it."""
        if not state:
            return
        if self.stage == 0:
            write_state(self.module, self.base_optimizer, state)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        self._still_step()
        keys, _ = self._shard_keys()
        for name, p in self._trained():
            for key in keys:
                safe_set_full_optimizer_state(p, state[name][key].to(p.device), key)
        done = next(iter(state.values())).get("step")
        for shard in self.base_optimizer.state.values():
            if done is not None:
                shard["step"] = done.clone()

    def _still_step(self) -> None:
        """Zero gradients at learning rate zero: state appears, weights stay bit for bit."""
        self.backward(torch.stack([(p * 0).sum() for _, p in self._trained()]).sum(), last=True)
        set_schedule(self.engine.optimizer, 0.0, self.optim.momentum)
        self.engine.step()

    def _trained(self):
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _shard_keys(self) -> tuple[list[str], dict[str, Tensor]]:
        """Names of the per-element state, and the scalar state (Adam's step), of this optimiser.

        Links the state to its parameters: DeepSpeed does so once, when only the first group has stepped.
        """
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        shard = next(iter(self.base_optimizer.state.values()), {})
        sharded = [key for key, value in shard.items() if torch.is_tensor(value) and value.ndim > 0]
        return sharded, {key: torch.as_tensor(value) for key, value in shard.items() if key not in sharded}


def _initialize(network: Network, optimizer: torch.optim.Optimizer, compute: Compute) -> Any:
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)  # its call of torch
    os.environ.setdefault("LOCAL_RANK", "0")  # launchers set it; DeepSpeed refuses to start without
    if compute.resolved_device().type == "cpu":  # the shared-memory all-reduce would be compiled with g++ for a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only multiplies it; our batches are counted by the sampler
        "train_batch_size": world_size(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": (network.optim.clip or 0.0) if network.optim else 0.0,
        "zero_optimization": {"stage": compute.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": compute.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(
        model=network.module, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine
