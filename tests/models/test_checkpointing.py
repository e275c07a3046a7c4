"""Activation checkpointing: the same gradients and statistics from far fewer saved activations."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from raymed.distributed import leave_group
from raymed.models.checkpointing import checkpoint_activations
from raymed.models.encoder import Encoder, EncoderConfig, build_encoder
from raymed.models.norm import GlobalBatchNorm2d, use_global_batchnorm
from raymed.models.resnet import Block, ResNetSmall


def timm_network(**options) -> nn.Module:
    import timm

    return timm.create_model("mobilenetv3_small_050", num_classes=0, in_chans=1, **options)


def steps(net: nn.Module, images: Tensor, double: bool = False) -> dict[str, Tensor]:
    """Gradients of two forward and backward passes, and every buffer after them; random layers seeded."""
    torch.manual_seed(3)
    for part in images.chunk(2):
        part = part.clone().requires_grad_()
        output = net(part)
        loss = (output * torch.linspace(-1, 1, output.shape[-1])).square().sum()
        if double:
            (slope,) = torch.autograd.grad(output.sum(), part, create_graph=True)
            loss = loss + slope.square().sum()
        loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return gradients | dict(net.named_buffers())


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and any(name.startswith("gradient") for name in found)
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm()
        assert error <= 1e-6 * value.double().norm() + 1e-12, f"{name} differs by {error:.1e}"


def random_scales(net: nn.Module) -> nn.Module:
    """Blocks start as their shortcut; here they do something."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


NETWORKS = {
    "built in": lambda: build_encoder(EncoderConfig(), 1),
    "plain batch norm": lambda: ResNetSmallFeatures(),
    "timm with random depth and dropout": lambda: Encoder(
        use_global_batchnorm(timm_network(drop_path_rate=0.5, drop_rate=0.3))
    ),
    "timm as it is": lambda: timm_network(),
}


class ResNetSmallFeatures(nn.Module):
    """The network as a child of another, with a normalisation of cumulative statistics in it."""

    def __init__(self):
        super().__init__()
        self.net = ResNetSmall()
        self.net.stem[1].momentum = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_head(self.net.forward_features(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_and_statistics_are_those_without_it(name):
    torch.manual_seed(0)
    plain = random_scales(NETWORKS[name]()).train()
    net = copy.deepcopy(plain)
    assert checkpoint_activations(net)
    repeated = [0]
    first = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    first.register_forward_hook(lambda *_: repeated.__setitem__(0, repeated[0] + 1))
    images = torch.randn(8, 1, 64, 64)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    check_same(steps(net, images), steps(plain, images))
    assert all(not torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert list(net.state_dict()) == list(plain.state_dict())
    if not name.startswith("timm"):  # whose stem is left out
        assert repeated == [4]  # twice in each of the two passes: it does compute again


def test_twice_differentiated():
    """R1, through a network whose blocks are computed again."""
    plain = random_scales(ResNetSmallFeatures()).train()
    net = copy.deepcopy(plain)
    checkpoint_activations(net)
    images = torch.randn(8, 1, 16, 16)
    check_same(steps(net, images, double=True), steps(plain, images, double=True))


def saved_bytes(net: nn.Module, images: Tensor) -> int:
    """Bytes of activations alive between the forward and the backward pass: what autograd saves, and the inputs of
    checkpointed blocks, which no hook sees; parameters left out, every storage once."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: alive.append(keep(inputs[0])))
        for module in net.modules()
        if isinstance(module, Block)
    ]
    with saved_tensors_hooks(lambda t: alive.append(t) or keep(t), lambda t: t):
        output = net(images)
    for handle in handles:
        handle.remove()
    output.sum().backward()
    return sum(kept.values())


def test_half_of_the_activations_or_more_are_not_kept():
    plain = build_encoder(EncoderConfig(), 1).train()
    net = copy.deepcopy(plain)
    checkpoint_activations(net)
    images = torch.randn(8, 1, 64, 64)
    whole, part = saved_bytes(plain, images), saved_bytes(net, images)
    assert whole > 20 * images.nbytes  # the measure sees them
    assert part <= whole / 2, (part, whole)


def test_what_cannot_do_it_says_so():
    class Refusing(nn.Linear):
        def set_grad_checkpointing(self, enable: bool = True):
            assert not enable, "gradient checkpointing not supported"

    assert not checkpoint_activations(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert not checkpoint_activations(nn.Sequential(Refusing(2, 2)))
    assert checkpoint_activations(nn.ModuleList([Refusing(2, 2), ResNetSmall()]))


def test_transformers_by_their_own_switch():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8,
        num_channels=1, hidden_dropout_prob=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = transformers.ViTModel(config).train()
    net = copy.deepcopy(plain)
    assert checkpoint_activations(net)
    images = torch.randn(4, 1, 16, 16)
    check_same(*(steps(Pooled(n), images) for n in (net, plain)))


class Pooled(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).last_hidden_state.mean(1)


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    net, images = global_case()
    checkpoint_activations(net)
    own = torch.cat([part.chunk(world)[rank] for part in images.chunk(2)])
    torch.save(steps(net, own), f"{folder}/{rank}.pt")
    leave_group()


def global_case() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = random_scales(build_encoder(EncoderConfig(), 1)).train()
    assert any(isinstance(module, GlobalBatchNorm2d) for module in net.modules())
    return net, torch.randn(8, 1, 16, 16) * torch.linspace(1, 3, 8)[:, None, None, None]


def test_statistics_of_all_workers_in_what_is_computed_again(tmp_path):
    """The collective inside the repetition: two processes with half a batch each are one with all of it."""
    net, images = global_case()
    expected = steps(net, images)
    torch.multiprocessing.spawn(worker, (2, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in expected.items():
        found = one[name] + two[name] if name.startswith("gradient") else one[name]
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5 * value.abs().max().item(), msg=name)
        assert name.startswith("gradient") or torch.equal(one[name], two[name])
