"""Grad-CAM on encoders whose answer is known, against hooks on a real network, and what it must leave alone."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raymed.config import UserError
from raymed.explain import grad_cam, laterality_hit_rate


class Mirror(nn.Module):
    """Two feature maps: the image's own pixels, and the same mirrored."""

    def maps(self, x):
        return torch.cat([x, x.flip(-1)], 1)

    def pool(self, maps):
        return maps.mean((2, 3))


class Small(nn.Module):
    """Convolution, batch norm and dropout: everything that differs between train and eval mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, 2, 1))
        self.drop = nn.Dropout(0.5)

    def maps(self, x):
        return self.conv(x)

    def pool(self, maps):
        return self.drop(maps.flatten(2).logsumexp(-1))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, features):
        return self.layers(features)[:, 0]


@pytest.fixture
def network():
    torch.manual_seed(0)
    encoder, head = Small(), Head()
    for _ in range(3):
        encoder.maps(torch.randn(8, 1, 16, 16))  # running statistics other than 0 and 1
    return encoder, head


def left_half(height=4, width=6):
    image = torch.zeros(1, 1, height, width)
    image[..., : width // 2] = 1
    return image


def test_positive_weight_shows_the_channel():
    cam = grad_cam(Mirror(), lambda f: 3 * f[:, 0], left_half())
    assert torch.equal(cam, left_half()[:, 0])


def test_mirrored_channel_shows_the_other_half():
    cam = grad_cam(Mirror(), lambda f: 3 * f[:, 1], left_half())
    assert torch.equal(cam, left_half().flip(-1)[:, 0])


def test_negative_weight_shows_nothing():
    assert torch.equal(grad_cam(Mirror(), lambda f: -3 * f[:, 0], left_half()), torch.zeros(1, 4, 6))


def test_constant_map_gives_zeros():
    """Both halves equally: 1 everywhere before scaling."""
    assert torch.equal(grad_cam(Mirror(), lambda f: f.sum(1), left_half()), torch.zeros(1, 4, 6))


def test_channels_are_weighted_before_the_relu():
    """2 A_0 - A_1 is 2 on the left and -1 on the right: ReLU, then scale. 2 A_0 + A_1 is 2 and 1: the 1 becomes 0."""
    cam = grad_cam(Mirror(), lambda f: 2 * f[:, 0] - f[:, 1], left_half())
    assert torch.equal(cam, left_half()[:, 0])
    cam = grad_cam(Mirror(), lambda f: 2 * f[:, 0] + f[:, 1], left_half())
    assert torch.equal(cam, left_half()[:, 0])


def test_weights_are_the_gradient_at_this_image():
    """y = f_0^2 / 2 - f_1 with f the means of the maps: the weights are f_0 and -1, over h w."""
    image = torch.tensor([[[[4.0, 0.0]]], [[[1.0, 0.0]]]])  # f_0 = f_1 = 2 and 0.5
    cam = grad_cam(Mirror(), lambda f: f[:, 0] ** 2 / 2 - f[:, 1], image)
    # Weighted sums: 2 * (4, 0) - (0, 4) = (8, -4); 0.5 * (1, 0) - (0, 1) = (0.5, -1): both left only.
    assert torch.equal(cam, torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]))
    cam = grad_cam(Mirror(), lambda f: (f[:, 0] - 1) ** 2 / 2, image)
    # Weights f_0 - 1 are 1 and -0.5: what the second image shows lowers its logit.
    assert torch.equal(cam, torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]]))


def test_equals_hooks_on_the_whole_network(network):
    """The other way to compute it: full forward and backward with hooks, one image at a time, in double precision."""
    encoder, head = (part.double() for part in network)
    images = torch.randn(3, 1, 20, 28, dtype=torch.float64)
    cam = grad_cam(encoder, head, images)
    encoder.eval()
    for image, found in zip(images, cam, strict=True):
        kept = {}
        hook = encoder.conv[3].register_forward_hook(lambda _, __, out, kept=kept: kept.update(maps=out))
        logit = head(encoder.pool(encoder.maps(image[None])))
        hook.remove()
        kept["maps"].retain_grad()
        logit.backward()
        maps, grad = kept["maps"][0], kept["maps"].grad[0]
        expected = torch.einsum("k,khw->hw", grad.mean((1, 2)), maps).clamp(min=0)
        expected = F.interpolate(expected[None, None].float(), (20, 28), mode="bilinear", align_corners=False)[0, 0]
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-6)
        assert found.min() == 0 and found.max() == 1


def test_frozen_network_gives_the_same_map(network):
    encoder, head = network
    images = torch.randn(4, 1, 16, 16)
    free = grad_cam(encoder, head, images)
    for part in network:
        part.requires_grad_(False)
    assert torch.equal(grad_cam(encoder, head, images), free)
    with torch.no_grad():
        assert torch.equal(grad_cam(encoder, head, images), free)
    with torch.inference_mode():
        assert torch.equal(grad_cam(encoder, head, images.clone()), free)
    assert free.max() == 1 and not free.requires_grad


def test_an_image_does_not_change_the_map_of_another(network):
    images = torch.randn(5, 1, 16, 16)
    together = grad_cam(*network, images)
    alone = torch.cat([grad_cam(*network, image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_leaves_everything_as_it_was(network):
    encoder, head = network
    encoder.train()
    encoder.conv[1].eval()  # a mixed state, as of a frozen batch norm
    head.eval()
    (head(encoder.pool(encoder.maps(torch.randn(2, 1, 16, 16)))).sum()).backward()
    modules = [*encoder.modules(), *head.modules()]
    parameters = [*encoder.parameters(), *head.parameters()]
    modes = [module.training for module in modules]
    grads = [parameter.grad.clone() for parameter in parameters]
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    grad_cam(encoder, head, torch.randn(4, 1, 16, 16))
    assert [module.training for module in modules] == modes
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(parameters, grads, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())


def test_no_parameter_receives_a_gradient(network):
    grad_cam(*network, torch.randn(2, 1, 16, 16))
    assert all(parameter.grad is None for part in network for parameter in part.parameters())


def test_modes_come_back_after_an_error(network):
    encoder, _ = network

    def broken(features):
        raise RuntimeError("broken head")

    with pytest.raises(RuntimeError, match="broken head"):
        grad_cam(encoder, broken, torch.randn(1, 1, 16, 16))
    assert all(module.training for module in encoder.modules())


def test_random_weights_change_the_map(network):
    """A map that does not depend on the weights would explain the image, not the model."""
    images = torch.randn(8, 1, 32, 32)
    before = grad_cam(*network, images)
    torch.manual_seed(7)
    for module in [*network[0].modules(), *network[1].modules()]:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    after = grad_cam(*network, images)
    assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1].abs() < 0.5


def test_built_in_encoder():
    from raymed.models.encoder import EncoderConfig, build_encoder
    from raymed.models.head import LinearHead

    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(), in_channels=1).requires_grad_(False)
    cam = grad_cam(encoder, LinearHead(encoder.num_features), torch.rand(4, 1, 64, 64))
    assert cam.shape == (4, 64, 64) and cam.min() == 0 and cam.max() == 1


def hits(*values):
    """One map a value: 1 left, 0 right, 0.5 as much on both sides."""
    cam = torch.zeros(len(values), 2, 5)
    cam[:, :, 0] = torch.tensor(values, dtype=torch.float32)[:, None]
    cam[:, :, 4] = 1 - cam[:, :, 0]
    return cam


def test_hit_rate_counts_hits_misses_and_ties():
    result = laterality_hit_rate(hits(1, 1, 0, 0, 0.5), ["left", "right", "right", "left", "left"])
    assert result["hit_rate"] == pytest.approx(0.5) and result["n"] == 5
    result = laterality_hit_rate(hits(1, 0, 0, 0.5), ["left", "right", "right", "right"])
    assert result["hit_rate"] == pytest.approx(3.5 / 4)
    assert laterality_hit_rate(torch.zeros(3, 4, 4), ["left", "right", "left"])["hit_rate"] == 0.5


def test_hit_rate_judges_mass_not_the_peak():
    cam = torch.zeros(1, 4, 4)
    cam[0, 0, 0] = 1
    cam[0, :, 3] = 0.5
    assert laterality_hit_rate(cam, ["right"])["hit_rate"] == 1.0


def test_middle_column_belongs_to_neither_half():
    cam = torch.zeros(1, 1, 5)
    cam[0, 0, 2], cam[0, 0, 4] = 9, 1
    assert laterality_hit_rate(cam, ["right"])["hit_rate"] == 1.0


def test_images_without_a_side_are_left_out():
    result = laterality_hit_rate(hits(1, 0, 1), ["left", "none", "none"])
    assert result["hit_rate"] == 1.0 and result["n"] == 1
    nothing = laterality_hit_rate(hits(1), ["none"])
    assert nothing["n"] == 0 and math.isnan(nothing["hit_rate"]) and all(map(math.isnan, nothing["ci"]))


@pytest.mark.parametrize(("hit", "n"), [(8, 10), (30, 30), (0, 7), (118, 240)])
def test_interval_is_wilsons(hit, n):
    from scipy.stats import binomtest

    result = laterality_hit_rate(hits(*[1] * hit, *[0] * (n - hit)), ["left"] * n)
    expected = binomtest(hit, n).proportion_ci(method="wilson")
    assert result["ci"] == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_unknown_side():
    with pytest.raises(UserError, match="did you mean 'left'"):
        laterality_hit_rate(hits(1), ["Left"])
