"""A network with its architecture and none of what it learned, for the weight-randomisation check of heat maps.

A heat map that looks the same with random weights shows the picture and not what was learned.

J. Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018 (model parameter randomisation, all layers at once).
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomised(network: nn.Sequential, images: Tensor, seed: int = 0) -> nn.Sequential:
    """A copy of a network with random weights, in eval mode and on the same device; the network itself stays.

    Every layer that knows how it starts (`reset_parameters`) starts anew. Parameters that belong to no such layer, such
    as position embeddings, are drawn from a normal distribution with their own mean and standard deviation. Statistics
    of batch normalisation are then measured on `images`: with those of other weights, or none, activations die out and
    heat maps are empty. Weights are drawn on the CPU from `seed`, so that a device makes no difference; torch's own
    generator is left as it was.

    Args:
        images: (B, C, H, W), as the network takes them.
    """
    with torch.inference_mode(False), torch.no_grad():
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            drawn = copy.deepcopy(network).cpu()
            for layer in drawn.modules():
                _start_anew(layer)
        drawn = drawn.to(images.device).eval()
        _measure(drawn, images)
    return drawn


def _start_anew(layer: nn.Module) -> None:
    if callable(reset := getattr(layer, "reset_parameters", None)):
        reset()
        return
    for parameter in layer.parameters(recurse=False):
        parameter.copy_(parameter.mean() + parameter.std(correction=0) * torch.randn_like(parameter))


def _measure(network: nn.Module, images: Tensor) -> None:
    """Running statistics become those of these images."""
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    kept = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None  # the mean over all batches, here one
        layer.train()
    if layers:
        network(images)
    for layer, momentum in zip(layers, kept, strict=True):
        layer.momentum = momentum
        layer.eval()
