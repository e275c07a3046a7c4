"""Gradients averaged over two real processes that have not reached the same parameters."""

from pathlib import Path

import torch
import torch.distributed as dist

from raymed.distributed import leave_group
from raymed.train.engines.engine import average_gradients


def worker(rank: int, folder: Path) -> None:
    """One reaches the first two parameters, the other the second and third; nobody the last. Then neither any."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    parameters = [torch.ones(shape, requires_grad=True) for shape in ((2, 3), (4,), (), (5,))]
    used = parameters[rank : rank + 2]
    torch.stack([(p * (k + 1)).sum() for k, p in enumerate(used)]).sum().backward()
    average_gradients(parameters)
    seen = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    average_gradients(parameters)
    torch.save((seen, [p.grad for p in parameters]), folder / f"{rank}.pt")
    leave_group()


def test_what_one_worker_does_not_reach_counts_as_zeros(tmp_path):
    torch.multiprocessing.spawn(worker, args=(tmp_path,), nprocs=2)
    for rank in range(2):
        (first, second, third, last), none = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(first, torch.full((2, 3), 0.5))  # 1 of one, 0 of the other
        assert torch.equal(second, torch.full((4,), 1.5))  # 2 and 1
        assert third.shape == () and third == 1.0  # 0 and 2
        assert last is None and none == [None] * 4
