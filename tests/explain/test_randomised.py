"""A copy that has forgotten everything, drawn from a seed, while the original and torch's generator stay."""

import pytest
import torch
from torch import nn

from raymed.explain.gradcam import grad_cam
from raymed.explain.randomised import randomised
from raymed.models.encoder import EncoderConfig, build_encoder
from raymed.models.head import LinearHead

IMAGES = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))


class Positioned(nn.Module):
    """A layer with a parameter that nothing resets."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(3 + 0.1 * torch.arange(100.0))
        self.linear = nn.Linear(4, 2)

    def forward(self, images):
        return images


def network():
    torch.manual_seed(5)
    encoder = build_encoder(EncoderConfig(), 1)
    learned = nn.Sequential(encoder, LinearHead(encoder.num_features))
    for layer in learned.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return learned.eval()


def test_every_weight_is_another_and_the_original_stays():
    learned = network()
    before = {name: tensor.clone() for name, tensor in learned.state_dict().items()}
    generator = torch.get_rng_state()
    drawn = randomised(learned, IMAGES)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[name], tensor) for name, tensor in learned.state_dict().items())
    for name, tensor in drawn.state_dict().items():
        assert tensor.data_ptr() != learned.state_dict()[name].data_ptr()
        if name.endswith(("conv1.weight", "conv2.weight", "linear.weight", "running_mean", "running_var")):
            assert not torch.equal(tensor, before[name]), name
    assert not drawn.training and type(drawn[0]) is type(learned[0])


def test_the_seed_decides():
    first, again, other = (list(randomised(network(), IMAGES, seed).parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_parameters_that_no_layer_resets_are_drawn_alike():
    module = Positioned()
    drawn = randomised(nn.Sequential(module), IMAGES)[0].position
    assert drawn.mean().item() == pytest.approx(module.position.mean().item(), abs=1.5)
    assert drawn.std().item() == pytest.approx(module.position.std().item(), rel=0.3)
    assert torch.corrcoef(torch.stack([drawn, module.position]))[0, 1].abs() < 0.4


def test_maps_of_random_weights_are_maps_too():
    """Neither empty nor the same for every image, or the check would say nothing."""
    for seed in range(5):
        maps = grad_cam(*randomised(network(), IMAGES, seed), IMAGES)
        assert (maps.amax((1, 2)) == 1).all()
        assert (maps - maps[:1]).abs().amax((1, 2))[1:].min() > 0.1


def test_statistics_are_those_of_the_images():
    drawn = randomised(network(), IMAGES)
    norm = drawn[0].net.stem[1]
    seen = drawn[0].net.stem[0](IMAGES)
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)))
    assert norm.momentum == network()[0].net.stem[1].momentum
