"""The peer under DeepSpeed, at one ZeRO stage: plain_training.py with `deepspeed.initialize` as its manual has it.

Every process sees its part of each batch; the process group is there already. Imports nothing else of this project.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_peers.plain_training import PlainTraining
from torch import Tensor


class PlainDeepSpeed(PlainTraining):
    """One training by all processes of the group."""

    def __init__(self, folder: Path, steps: int, stage: int, device: str = "cpu"):
        super().__init__(folder, steps, device)
        self.order = self.order.tensor_split(dist.get_world_size(), dim=1)[dist.get_rank()]
        self.stage = stage
        self.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload] # it reads flat bytes
        self.engine: Any = _initialize(self.model, self.optimizer, stage, self.clip, device)
        if stage == 0:  # above, weights are views of flat buffers
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward = self.engine
        if stage == 3:
            self.weights = [p.ds_tensor for p in self.parameters]  # type: ignore[attr-defined] # this process's part
        else:
            self.weights = [p.detach() for p in self.parameters]
        self.ema = [weight.detach().clone() for weight in self.weights]

    def read(self, losses: Tensor) -> list[float]:
        """Means over the processes."""
        dist.all_reduce(losses)
        return (losses / dist.get_world_size()).tolist()

    def step(self) -> Tensor:
        loss = self.loss()
        self.engine.backward(loss)
        self.engine.step()
        self.schedule.step()
        self.average()
        self.done += 1
        return loss.detach()

    def whole(self) -> list[Tensor]:
        """The weights, gathered."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(self.parameters, enabled=self.stage == 3):
            return [p.detach().clone() for p in self.parameters]


def _initialize(model: torch.nn.Module, optimizer: torch.optim.Optimizer, stage: int, clip: float, device: str) -> Any:
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device == "cpu":  # an operator that would be compiled for a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    zero["reduce_bucket_size"] = sum(p.numel() for p in model.parameters())
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": dist.get_world_size(),
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine
