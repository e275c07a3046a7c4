"""The peer with several processes: plain_training.py under torch's DistributedDataParallel.

Every process sees its part of each batch; the process group is there already. Imports nothing else of this project.
"""

from pathlib import Path

import torch.distributed as dist
from bench_peers.plain_training import PlainTraining
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class PlainDDP(PlainTraining):
    """One training by all processes of the group."""

    def __init__(self, folder: Path, steps: int, device: str = "cpu"):
        super().__init__(folder, steps, device)
        self.order = self.order.tensor_split(dist.get_world_size(), dim=1)[dist.get_rank()]
        self.forward = DistributedDataParallel(self.model)

    def read(self, losses: Tensor) -> list[float]:
        """Means over the processes."""
        dist.all_reduce(losses)
        return (losses / dist.get_world_size()).tolist()

    def whole(self) -> list[Tensor]:
        """The weights."""
        return [p.detach() for p in self.parameters]
