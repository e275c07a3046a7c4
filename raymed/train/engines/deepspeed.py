"""The DeepSpeed engine: ZeRO stages 0 to 3 behind the same few verbs as plain torch.

What DeepSpeed 0.19 needs and does not say:

- a backward pass replaces the gradient of the one before at stage 3, unless the network was called through its engine
  in between: `backward` here does what that call would have done (`clear_backward_seen_flag`);
- accumulation is exact with our own boundary and no scaling by it;
- the optimiser's state does not exist before the first step, and setting it by name misses Adam's step and fails at
  stage 3 where a parameter's size is no multiple of the workers: here it is made as it will be, then filled;
- `torch_autocast` averages the gradients of linear and convolutional layers in bf16 unless told that there are none;
- stage 3, and offloading, keep the gradient of a parameter that a step does not reach, and use it again;
- stage 0 says no gradient norm and cannot clip a parameter without axes (CLIP's logit_scale): we clip there; and no
  stage can broadcast one.
"""

import logging
import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raymed.config import UserError
from raymed.distributed import rank, world_size
from raymed.ledger import OPTIMIZER, span
from raymed.tasks.task import Ema, Network, Optim
from raymed.train.compute import Compute
from raymed.train.engines import zero3
from raymed.train.engines.ema import Average
from raymed.train.engines.engine import OptimizerState, copied_state, counter, read_state, write_state
from raymed.train.engines.optim import build_optimizer, clip_gradients, schedule, set_schedule

BUCKET = 50_000_000
"""Elements reduced at once at most; DeepSpeed would allocate ten times as many, whatever the network's size."""
KEPT_WHOLE = 100_000
"""Elements: smaller parameters stay whole between two steps at stage 3, since each gathering is a round of messages."""


class DeepSpeedEngine:
    """One network under DeepSpeed, with an optimiser of ours inside."""

    def __init__(self, name: str, network: Network, steps: int, compute: Compute):
        if network.optim is None:
            raise UserError("an engine needs a network with an optimiser")
        self.module = network.module
        self.optim: Optim = network.optim
        self.steps = steps
        self.compute = compute
        self.stage = compute.stage_of(name)
        self.offload = compute.offload and self.stage >= 2
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload] # DeepSpeed reads the weights as flat bytes
        self.engine: Any = _initialize(network, self._config())
        self.optimizer: Any = self.engine.optimizer
        if self.stage == 0:  # above, the weights are views of flat buffers and must stay so
            compute.prepare(self.module)
        self.base_optimizer: torch.optim.Optimizer = self.optimizer.optimizer if self.stage else self.optimizer
        weakref.finalize(self, _end, self.engine, self.module).atexit = False

    def _config(self) -> dict[str, Any]:
        elements = sum(p.numel() for p in self.trained.values())
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(BUCKET, elements),
        }
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = KEPT_WHOLE
        if self.offload:
            on_gpu = self.compute.resolved_device().type == "cuda"
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        bf16 = self.compute.precision == "bf16"
        return {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only multiplies it; our batches are counted by the sampler
            "train_batch_size": world_size(),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": (self.optim.clip or 0.0) if self.stage else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW does; DeepSpeed's would be compiled with g++
            "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "steps_per_print": 2**31,
        }

    def __call__(self, *inputs: Tensor) -> Any:
        """Forward through the engine, whose hooks the backward pass needs."""
        return self.engine(*inputs)

    def raw(self, *inputs: Tensor) -> Any:
        """Forward past those hooks, which cannot be differentiated twice. At stage 3 the layers still have theirs."""
        with self.compute.autocast():
            return self.module(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate; the workers' gradients are averaged after the last one."""
        self.engine.set_gradient_accumulation_boundary(last)
        if self.stage:
            self.optimizer.clear_backward_seen_flag()
        self.engine.backward(loss, scale_wrt_gas=False)
        if last and self.offload:  # else what the last micro-batch does not reach would be left out
            self.optimizer.finalize_gradient_accumulation_boundary()

    def step(self, number: int) -> Tensor:
        """One optimiser step at this step number's learning rate."""
        with span(OPTIMIZER):
            set_schedule(self.optimizer, *schedule(self.optim, number, self.steps))
            norm = clip_gradients(self.trained.values(), self.optim.clip) if self.stage == 0 else None
            self.engine.step()
            self._forget_gradients()
            return torch.as_tensor(self.engine.get_global_grad_norm()) if norm is None else norm

    def _forget_gradients(self) -> None:
        """Zero what DeepSpeed would use again for a parameter that the next step does not reach."""
        kept = [self.optimizer.grad_partitions_flat_buffer] if self.stage == 3 else []
        if self.offload:
            kept += [shard.grad for shard in self._shards() if shard.grad is not None]
        if self.offload and self.stage == 2:
            kept += self.optimizer.accumulated_grads_in_cpu.values()
        for gradient in kept:
            gradient.zero_()

    def full_state(self) -> dict[str, Tensor]:
        """Whole at stages 0 to 2, gathered parameter by parameter at stage 3."""
        return zero3.full_state(self.module) if self.stage == 3 else copied_state(self.module)

    def average(self, ema: Ema) -> Average:
        """Of whole parameters, at stage 3 of their pieces."""
        if self.stage == 3:
            return zero3.ShardedAverage(self.module, ema, self.optimizer.empty_partition_cache)
        return Average(self.module, ema)

    def optimizer_state(self) -> OptimizerState:
        """Whole state by name, gathered from the shards."""
        if self.stage == 0:
            return read_state(self.module, self.base_optimizer)
        from deepspeed.utils import safe_get_full_optimizer_state

        held = next(iter(self.base_optimizer.state.values()), {})
        self._link()
        state: OptimizerState = {}
        for name, p in self.trained.items():
            for key in sorted(held.keys() - {"step"}):
                whole = safe_get_full_optimizer_state(p, key)
                if rank() == 0:
                    state.setdefault(name, {})[key] = whole.cpu().clone()  # type: ignore[union-attr]
        for values in state.values() if "step" in held else ():
            values["step"] = held["step"].cpu().clone()
        return state

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Make every shard of the state as the first step would, then fill it."""
        if not state:
            return
        if self.stage == 0:
            write_state(self.module, self.base_optimizer, state)
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self._make_state(state)
        self._link()
        for name, p in self.trained.items():
            for key in state.get(name, {}).keys() - {"step"}:
                if self.stage == 3:
                    safe_set_local_optimizer_state(p, zero3.piece(state[name][key], p), key)
                else:
                    safe_set_full_optimizer_state(p, state[name][key], key)

    def _make_state(self, state: OptimizerState) -> None:
        """Zeros for every flat shard that the base optimiser moves, and Adam's step."""
        keys = {key for values in state.values() for key in values} - {"step"}
        steps = [values["step"] for values in state.values() if "step" in values]
        for shard in self._shards():
            made = {key: torch.zeros_like(shard, requires_grad=False) for key in keys}
            if steps:
                made["step"] = counter(self.base_optimizer, max(steps), shard)
            self.base_optimizer.state[shard] = made

    def _shards(self) -> list[Tensor]:
        """The flat tensors that the base optimiser moves, above stage 0."""
        optimizer = self.optimizer
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    def _link(self) -> None:
        """Stages 1 and 2 find a parameter's state by links, which DeepSpeed makes once, at the first step."""
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()


def _initialize(network: Network, config: dict[str, Any]) -> Any:
    module = network.module
    on_cpu = next(module.parameters()).device.type == "cpu"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it would take a GPU that it sees
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message=".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning
    )  # its calls of torch
    os.environ.setdefault("LOCAL_RANK", "0")  # launchers set it; DeepSpeed refuses to start without
    if on_cpu:  # the shared-memory all-reduce would be compiled with g++ for a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    optimizer = build_optimizer(network)
    with _scalars_broadcast():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def _end(engine: Any, module: nn.Module) -> None:
    """Free the memory of a network whose engine is gone: DeepSpeed's hooks would keep it until the process ends."""
    if torch.distributed.is_initialized():  # what holds the engine, an error on its way, may outlive the group
        engine.destroy()
    zero3.forget(module)


@contextmanager
def _scalars_broadcast() -> Iterator[None]:
    """Within: where DeepSpeed broadcasts parameters as bytes, one without axes has one meanwhile."""
    from deepspeed.runtime.engine import DeepSpeedEngine as Theirs
    from deepspeed.runtime.zero.partition_parameters import Init

    broadcast, shard = Theirs._broadcast_model, Init._zero_init_param

    def broadcast_all(engine: Any) -> None:
        scalars = [p for p in engine.module.parameters() if p.ndim == 0]
        for p in scalars:
            p.data = p.data.view(1)
        broadcast(engine)
        for p in scalars:
            p.data = p.data.view(())

    def shard_one(init: Any, parameter: Any) -> None:
        shape = parameter.shape
        parameter.data = parameter.data.view(shape or (1,))
        shard(init, parameter)
        parameter.ds_shape = shape

    Theirs._broadcast_model, Init._zero_init_param = broadcast_all, shard_one  # type: ignore[method-assign]
    try:
        yield
    finally:
        Theirs._broadcast_model, Init._zero_init_param = broadcast, shard  # type: ignore[method-assign]
