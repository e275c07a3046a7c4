"""Losses over pairs on 2 and 3 gloo processes, with different numbers of pairs on each, against one process: averaged
gradients of two linear encoders and of a learned scale, since Adam would hide a wrong factor."""

import multiprocessing
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raymed.distributed import leave_group
from raymed.losses import PAIR_LOSSES, InfoNCELoss
from raymed.losses import _pairs as pairs_module

COUNTS = {2: (5, 2), 3: (3, 1, 4)}
CASES = [[0, 9], [1, 1], [2, 8], [0, 0], [3, 7], [4, 4], [5, 8], [4, 6]]
"""Shared by pairs of one process and of different ones."""
ROWS = {"whole": (2**22, 64), "row by row": (0, 1)}
"""Similarities without recomputing, and anchors at a time otherwise."""


class Encoders(nn.Module):
    """Two linear encoders and what a loss may learn."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        image, text = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
        self.image, self.text = nn.Parameter(image), nn.Parameter(text)
        self.log_scale = nn.Parameter(torch.tensor(1.2, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def forward(self, x, y):
        return x @ self.image, y @ self.text, self.log_scale.exp(), self.bias


def train(name: str, mine: slice, num: int, with_cases: bool = True, ddp: bool = False) -> dict[str, torch.Tensor]:
    """Value, and gradients averaged over the processes."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, num, 6, generator=generator, dtype=torch.float64)[:, mine]
    cases = torch.tensor(CASES)[:num][mine] if with_cases else None
    encoders = Encoders()
    encoders.bias.requires_grad_(name == "siglip")
    model = DistributedDataParallel(encoders) if ddp else encoders
    image, text, scale, bias = model(x, y)
    value = PAIR_LOSSES[name]()(image, text, cases, scale, bias)
    value.backward()
    record = {"value": value.detach()}
    for key, weight in encoders.named_parameters():
        if weight.requires_grad:
            record[key] = weight.grad
            if dist.is_initialized() and not ddp:
                dist.all_reduce(weight.grad)
                weight.grad /= dist.get_world_size()
    return record


def worker(rank: int, world: int, folder: str, arrays: dict) -> None:
    """One process: all losses in all ways."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    counts = COUNTS[world]
    mine, num = slice(sum(counts[:rank]), sum(counts[: rank + 1])), sum(counts)
    record: dict = {}
    for name in PAIR_LOSSES:
        record[name, "DDP"] = train(name, mine, num, ddp=True)
        for how, (entries, rows) in ROWS.items():
            with mock.patch.multiple(pairs_module, _ENTRIES=entries, _ROWS=rows):
                record[name, how] = train(name, mine, num)
        record[name, "no cases"] = train(name, mine, num, with_cases=False)
    last = slice(0, num) if rank == 0 else slice(0, 0)
    record["none of one process"] = train("dhn_nce", last, num)
    if arrays:
        record["golden"] = golden_clip(arrays, rank, world)
    leave_group()
    torch.save(record, f"{folder}/{rank}.pt")


def golden_clip(arrays: dict, rank: int, world: int) -> dict[str, torch.Tensor]:
    """The published loss of one process, on the rows of this one."""
    weights = {key: torch.as_tensor(arrays[key]).clone().requires_grad_() for key in ("Wimg", "Wtxt")}
    x, y = (torch.as_tensor(arrays[f"W{world}_{key}"])[4 * rank : 4 * rank + 4] for key in ("X", "Y"))
    image, text = (F.normalize(inputs @ weight, dim=1) for inputs, weight in zip((x, y), weights.values(), strict=True))
    value = InfoNCELoss(temperature=0.1)(image, text)
    value.backward()
    for weight in weights.values():
        dist.all_reduce(weight.grad)
    return {"loss": value.detach(), "gimg": weights["Wimg"].grad / world, "gtxt": weights["Wtxt"].grad / world}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda world: f"{world} ranks")
def ranks(request, tmp_path_factory):
    """(records of all ranks, golden arrays or {})."""
    world = request.param
    try:
        arrays = dict(request.getfixturevalue("golden")("distributed_contrastive"))
    except pytest.skip.Exception:
        arrays = {}
    folder = tmp_path_factory.mktemp(f"pairs{world}")
    multiprocessing.set_forkserver_preload(["raymed.losses"])  # imported once for all
    inputs = (world, str(folder), arrays)
    torch.multiprocessing.start_processes(worker, inputs, nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)], arrays


@pytest.mark.parametrize("how", [*ROWS, "no cases", "DDP"])
@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_value_and_gradients_are_those_of_one_process(name, how, ranks):
    records, _ = ranks
    num = sum(COUNTS[len(records)])
    expected = train(name, slice(0, num), num, with_cases=how != "no cases")
    assert len(expected) == (5 if name == "siglip" else 4)
    for record in records:
        torch.testing.assert_close(record[name, how], expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(record[name, how]["value"], records[0][name, how]["value"])


def test_a_process_may_have_no_pairs(ranks):
    records, _ = ranks
    num = sum(COUNTS[len(records)])
    expected = train("dhn_nce", slice(0, num), num)
    for record in records:
        torch.testing.assert_close(record["none of one process"], expected, rtol=1e-10, atol=1e-12)


def test_golden_infonce(ranks):
    records, arrays = ranks
    if not arrays:
        pytest.skip("no golden vectors of distributed_contrastive")
    single = f"W{len(records)}_clip_single"
    for record in records:
        assert record["golden"]["loss"].item() == pytest.approx(arrays[f"{single}_loss"].item(), rel=1e-9)
        for key in ("gimg", "gtxt"):
            np.testing.assert_allclose(record["golden"][key], arrays[f"{single}_{key}"], rtol=1e-8, atol=1e-12)
