"""Batch normalisation over several processes equals one process with the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from raymed.distributed import leave_group
from raymed.models.norm import GlobalBatchNorm2d, GroupNorm2d, use_global_batchnorm, use_groupnorm

SIZES = {2: [5, 3], 3: [4, 1, 6]}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False)]
    net = nn.Sequential(*layers, nn.BatchNorm2d(4, momentum=None))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def batch(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose mean differs much from rank to rank, far from zero; and weights of the outputs in the loss."""
    generator = torch.Generator().manual_seed(1)
    offsets = torch.cat([torch.full((size,), 10.0 + 5.0 * r) for r, size in enumerate(SIZES[world])])
    images = torch.randn(sum(SIZES[world]), 3, 9, 8, generator=generator) + offsets[:, None, None, None]
    return images, torch.randn(len(images), 4, 5, 4, generator=generator)


def run(net: nn.Module, images: torch.Tensor, weights: torch.Tensor, steps: int = 2) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the summed loss in the last of two steps, and the buffers after it."""
    images = images.clone().requires_grad_()
    for _ in range(steps):
        net.zero_grad()
        images.grad = None
        output = net(images)
        (output * weights).sum().backward()
    gradients = {f"grad.{name}": p.grad for name, p in net.named_parameters()}
    return {"output": output.detach(), "images": images.grad, **gradients, **dict(net.named_buffers())}


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    start = sum(SIZES[world][:rank])
    part = slice(start, start + SIZES[world][rank])
    images, weights = batch(world)
    torch.save(run(use_global_batchnorm(network()), images[part], weights[part]), f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_equal_one(world, tmp_path):
    expected = run(network(), *batch(world))
    mp.spawn(worker, (world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name, value in expected.items():
        values = [result[name] for result in ranks]
        if name in ("output", "images"):
            actual = torch.cat(values)
        elif name.startswith("grad."):
            actual = torch.stack(values).sum(0)
        else:
            assert all(torch.equal(values[0], other) for other in values[1:]), f"{name} differs between ranks"
            actual = values[0]
        atol = 1e-5 * max(value.abs().max().item(), 1)
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_one_process_is_plain_batchnorm():
    plain, images = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    ours = use_global_batchnorm(copy.deepcopy(plain))
    for _ in range(3):
        assert torch.equal(ours(images), plain(images))
    assert torch.equal(ours.running_var, plain.running_var)
    assert torch.equal(ours.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet10t"])
def test_timm_networks_keep_their_outputs_and_keys(name):
    import timm

    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0, in_chans=1)
    images = torch.rand(2, 1, 64, 64)
    expected, keys = net.eval()(images), list(net.state_dict())
    converted = use_global_batchnorm(net)
    assert torch.equal(converted(images), expected) and list(converted.state_dict()) == keys
    norms = [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 10 and all(type(m) is GlobalBatchNorm2d for m in norms)


def test_groupnorm_takes_the_place_the_weights_and_the_activation():
    import timm

    net = timm.create_model("efficientnet_lite0", num_classes=0, in_chans=1)
    weight = net.bn1.weight
    converted = use_groupnorm(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    assert isinstance(converted.bn1, GroupNorm2d) and converted.bn1.weight is weight and converted.bn1.num_groups == 4
    one, two = torch.rand(1, 1, 64, 64), torch.rand(1, 1, 64, 64)
    together = converted(torch.cat([one, two]))
    torch.testing.assert_close(together[:1], converted(one), rtol=1e-4, atol=1e-5)
    assert converted.bn1(torch.randn(2, 32, 4, 4)).min() == 0  # ReLU6 follows
