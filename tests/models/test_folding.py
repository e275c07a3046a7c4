"""Folded networks answer as before, and what cannot be folded is left alone."""

import copy

import pytest
import torch
from torch import nn

from raymed.models.encoder import EncoderConfig, build_encoder
from raymed.models.folding import Pair, fold


def trained_looking(network: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics that are not those of a new normalisation."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return network.eval()


def folds(network: nn.Module, example: torch.Tensor) -> list[Pair]:
    return fold(network, lambda: torch.inference_mode()(network)(example))


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("backbone", ["resnet_small", "test_efficientnet", "test_resnet", "densenet121"])
def test_a_folded_encoder_gives_the_same_features_and_maps(backbone):
    torch.manual_seed(0)
    encoder = trained_looking(build_encoder(EncoderConfig(backbone=backbone), 1))
    folded = copy.deepcopy(encoder)
    before = norms(folded)
    pairs = folds(folded, torch.rand(1, 1, 64, 64))
    assert norms(folded) == before - len(pairs) < before
    images = torch.rand(3, 1, 64, 64)
    for part in ("__call__", "maps"):
        wanted, found = getattr(encoder, part)(images), getattr(folded, part)(images)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    folded(images).sum().backward()  # explanations need gradients


def test_every_normalisation_behind_a_convolution_goes_into_it():
    encoder = trained_looking(build_encoder(EncoderConfig(backbone="test_efficientnet"), 1))
    folds(encoder, torch.rand(1, 1, 32, 32))
    assert norms(encoder) == 0
    weights = [parameter for parameter in encoder.parameters() if parameter.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


class Skip(nn.Module):
    """The convolution's output is needed as it is, beside the normalised one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


def test_a_convolution_whose_output_is_used_twice_stays():
    network = trained_looking(Skip())
    image = torch.rand(2, 1, 8, 8)
    wanted = network(image)
    assert folds(network, image) == []
    assert isinstance(network.norm, nn.BatchNorm2d)
    torch.testing.assert_close(network(image), wanted)


def test_a_shared_normalisation_and_one_of_the_batch_stay():
    shared = nn.BatchNorm2d(4)
    own = nn.BatchNorm2d(4, track_running_stats=False)
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), shared, nn.Conv2d(4, 4, 3), shared, nn.Conv2d(4, 4, 3), own).eval()
    image = torch.rand(2, 1, 16, 16)
    assert folds(layers, image) == []
    layers.extend([nn.Conv2d(4, 2, 1), trained_looking(nn.BatchNorm2d(2))]).eval()
    assert folds(layers, image) == [Pair("6", "7")]
