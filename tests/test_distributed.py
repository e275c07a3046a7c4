"""Collectives and SupConLoss over 2 and 3 real gloo processes, against one process.

All checks of one world size share its processes, which write what they saw; the tests read it.
"""

import itertools
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from raymed import distributed
from raymed.config import UserError
from raymed.distributed import leave_group
from raymed.losses import SupConLoss

LOCAL = 4  # samples on a rank
LOSSES = {
    "supcon": (SupConLoss(temperature=0.2), True),
    "one": (SupConLoss(temperature=0.2, base_temperature=0.07, contrast="one"), True),
    "simclr": (SupConLoss(temperature=0.5), False),
}


def shard(x: torch.Tensor) -> torch.Tensor:
    """The rows of this rank; all of them without a group."""
    return x.chunk(distributed.world_size())[distributed.rank()]


def average_gradient(parameter: torch.Tensor) -> None:
    """What data-parallel training does after the backward pass."""
    if distributed.world_size() > 1:
        dist.all_reduce(parameter.grad)
        parameter.grad /= distributed.world_size()


def train_supcon(samples: int, loss: SupConLoss, labelled: bool) -> dict:
    """Three SGD steps of a linear encoder; the data of the ranks differ in scale, content and classes."""
    generator = torch.Generator().manual_seed(11)
    images = torch.randn(samples, 10, generator=generator) * torch.linspace(0.3, 3, samples)[:, None]
    labels = torch.arange(samples) // 3
    weight = torch.randn(10, 6, generator=generator).requires_grad_()
    record = {"losses": [], "grads": []}
    for _ in range(3):
        views = torch.stack([shard(images) @ weight, (shard(images) * 0.8 + 0.1).tanh() @ weight], dim=1)
        value = loss(F.normalize(views, dim=2), shard(labels) if labelled else None)
        value.backward()
        average_gradient(weight)
        record["losses"].append(value.item())
        record["grads"].append(weight.grad)
        weight = (weight - 0.1 * weight.grad).detach().requires_grad_()
    return record | {"weight": weight.detach()}


def collectives() -> dict:
    """Each collective's result, and the gradient that two unequal losses of the ranks send back."""
    rank = distributed.rank()
    x = (torch.arange(6.0).view(2, 3) + 10 * rank).requires_grad_()
    gathered = distributed.all_gather_with_grad(x)
    (gathered * gathered * (rank + 1)).sum().backward()
    y = torch.tensor([1.0 + rank, 2.0], requires_grad=True)
    total = distributed.all_reduce_sum_with_grad(y)
    (total * total * (rank + 1)).sum().backward()
    plain = distributed.all_gather(x.T)  # not contiguous
    z = (torch.arange(2.0 * rank).view(rank, 2) + 10 * rank).requires_grad_()  # none of rank 0
    counts = distributed.row_counts(z)
    ragged = distributed.all_gather_ragged(z, counts)
    (ragged * ragged * (rank + 1)).sum().backward()
    return {
        "world": (distributed.world_size(), rank),
        "gathered": gathered.detach(),
        "gathered_grad": x.grad,
        "total": total.detach(),
        "total_grad": y.grad,
        "plain": plain,
        "plain_requires_grad": plain.requires_grad,
        "counts": counts,
        "ragged": ragged.detach(),
        "ragged_grad": z.grad,
        "ragged_labels": distributed.all_gather_ragged(torch.arange(rank), counts),
        "labels": distributed.all_gather(torch.tensor([rank, 7])),
        "objects": distributed.all_gather_object({"rank": rank}),
    }


def agreements() -> list:
    """What each rank gets of what all do, of what only the last one cannot, and of what none of them can."""
    last = distributed.rank() == distributed.world_size() - 1

    def refuse(kind: type[Exception], mine: bool) -> str:
        if mine:
            raise kind(f"rank {distributed.rank()} has none")
        return f"rank {distributed.rank()}"

    seen = []
    for kind, mine in ((ValueError, False), (ValueError, last), (UserError, last), (UserError, True)):
        try:
            seen.append(distributed.agreed(partial(refuse, kind, mine)))
        except (ValueError, UserError) as error:
            seen.append((type(error).__name__, str(error)))
    return seen


def golden_supcon(arrays: dict) -> dict:
    """Loss and averaged encoder gradient of the published SupCon on this rank's rows."""
    x, y, labels = (shard(torch.as_tensor(arrays[name])) for name in ("X", "Y", "labels"))
    weight = torch.as_tensor(arrays["Wimg"]).clone().requires_grad_()
    views = torch.stack([x @ weight, (0.9 * x + 0.1 * y) @ weight], dim=1)
    value = SupConLoss(temperature=0.1, base_temperature=0.07)(F.normalize(views, dim=2), labels)
    value.backward()
    average_gradient(weight)
    return {"loss": value.item(), "grad": weight.grad}


def worker(rank: int, world: int, folder: str, arrays: dict) -> None:
    """One process: everything the tests want to know of this world size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    record = {name: train_supcon(LOCAL * world, *loss) for name, loss in LOSSES.items()}
    record |= {
        "agreements": agreements(),
        "collectives": collectives(),
        "golden": golden_supcon(arrays) if arrays else None,
    }
    with_group = gloo_threads()
    leave_group()
    torch.save(record | {"threads": (with_group, gloo_threads())}, f"{folder}/{rank}.pt")


def gloo_threads() -> int:
    """How many threads of this process carry out gloo's collectives."""
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo_runloop" in name for name in names)


@pytest.fixture(scope="module", params=[2, 3], ids=lambda world: f"{world} ranks")
def ranks(request, tmp_path_factory):
    """The records of all ranks, and the golden arrays of this world size ({} where absent)."""
    world = request.param
    try:
        arrays = request.getfixturevalue("golden")("distributed_contrastive")
        arrays = {name.removeprefix(f"W{world}_"): arrays[name] for name in arrays.files}
    except pytest.skip.Exception:
        arrays = {}
    folder = tmp_path_factory.mktemp(f"ranks{world}")
    torch.multiprocessing.spawn(worker, args=(world, str(folder), arrays), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)], arrays


@pytest.mark.skipif(sys.platform != "linux", reason="threads are read from /proc")
def test_a_destroyed_group_leaves_no_thread(ranks):
    """One that lets go of a tensor while Python shuts down would abort the process."""
    for record in ranks[0]:
        assert record["threads"][0] > 0 and record["threads"][1] == 0


def test_collectives(ranks):
    records = [record["collectives"] for record in ranks[0]]
    world = len(records)
    inputs = torch.cat([torch.arange(6.0).view(2, 3) + 10 * rank for rank in range(world)])
    total = torch.tensor([sum(range(1, world + 1)), 2.0 * world])
    weights = sum(range(1, world + 1))  # the ranks' losses count 1, 2, ... times
    ragged = [torch.arange(2.0 * rank).view(rank, 2) + 10 * rank for rank in range(world)]
    for rank, record in enumerate(records):
        assert record["world"] == (world, rank)
        assert torch.equal(record["gathered"], inputs)
        assert torch.equal(record["gathered_grad"], 2 * inputs[2 * rank : 2 * rank + 2] * weights)
        assert torch.equal(record["total"], total)
        assert torch.equal(record["total_grad"], 2 * total * weights)
        assert torch.equal(record["plain"], torch.cat([block.T for block in inputs.split(2)]))
        assert not record["plain_requires_grad"]
        assert record["counts"] == list(range(world)) and torch.equal(record["ragged"], torch.cat(ragged))
        assert torch.equal(record["ragged_grad"], 2 * ragged[rank] * weights)
        assert record["ragged_labels"].tolist() == list(itertools.chain(*(range(r) for r in range(world))))
        assert record["labels"].tolist() == list(itertools.chain(*([r, 7] for r in range(world))))
        assert record["objects"] == [{"rank": r} for r in range(world)]


def test_what_fails_on_one_rank_is_raised_on_all(ranks):
    records, last = [record["agreements"] for record in ranks[0]], len(ranks[0]) - 1
    for rank, (all_do, error, user_error, none_does) in enumerate(records):
        assert all_do == f"rank {rank}"
        words = f"rank {last} has none"
        elsewhere = [("UserError", f"{cause}{words} (on worker {last})") for cause in ("ValueError: ", "")]
        own = [("ValueError", words), ("UserError", words)]
        assert [error, user_error] == (own if rank == last else elsewhere)
        assert none_does == ("UserError", f"rank {rank} has none")
    assert distributed.agreed(lambda: 7) == 7  # alone


@pytest.mark.parametrize("name", LOSSES)
def test_supcon_equals_one_process(ranks, name):
    records = [record[name] for record in ranks[0]]
    single = train_supcon(LOCAL * len(records), *LOSSES[name])
    for record in records:
        np.testing.assert_allclose(record["losses"], single["losses"], rtol=1e-5)
        for grad, expected in zip(record["grads"], single["grads"], strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(record["weight"], single["weight"], rtol=1e-5, atol=1e-6)


def test_supcon_golden(ranks):
    records, arrays = ranks
    if not arrays:
        pytest.skip("no golden vectors of distributed_contrastive")
    for record in records:
        assert record["golden"]["loss"] == pytest.approx(arrays["supcon_single_loss"].item(), rel=1e-9)
        np.testing.assert_allclose(record["golden"]["grad"], arrays["supcon_single_g"], rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(record["golden"]["grad"], arrays["supcon_gather_g"], rtol=1e-9, atol=1e-14)


def test_without_a_group_everything_is_the_identity():
    x = torch.arange(3.0, requires_grad=True)
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.all_gather_with_grad(x) is x and distributed.all_reduce_sum_with_grad(x) is x
    assert distributed.row_counts(x) == [3] and distributed.all_gather_ragged(x, [3]) is x
    assert torch.equal(distributed.all_gather(x), x) and not distributed.all_gather(x).requires_grad
    assert distributed.all_gather_object("a") == ["a"]
