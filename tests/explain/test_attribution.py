"""Integrated gradients and occlusion against other ways to compute them, and the deletion test on scores whose answer
is known."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from raymed.explain import attribution
from raymed.explain.attribution import SQUARES, deletion, integrated_gradients, mean_image, occlusion, result, smooth
from raymed.models.encoder import EncoderConfig, build_encoder
from raymed.models.head import LinearHead


@pytest.fixture(scope="module")
def rough():
    """Convolutions, ReLU, batch norm with statistics of its own and max pooling: a gradient full of jumps; frozen."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(2, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 1))
    for _ in range(3):
        network(torch.randn(8, 2, 20, 28))
    return network.eval().requires_grad_(False)


@pytest.fixture
def image():
    torch.manual_seed(1)
    return nn.functional.interpolate(torch.randn(1, 2, 5, 7), (20, 28), mode="bilinear")[0] + 0.5


def of(network):
    return lambda images: network(images)[:, 0]


def gap(network, image):
    """How far the sum of integrated gradients is from what it must be, and the parts that it is the sum of."""
    score = of(network)
    with torch.no_grad():
        wanted = (score(image[None]) - score(mean_image(image)[None])).item()
    found = result(integrated_gradients(score, image))
    return abs(found.sum().item() - wanted), abs(wanted), found.abs().sum().item()


def test_integrated_gradients_add_up(rough, image):
    off, wanted, _ = gap(rough, image)
    assert off < 0.01 * wanted


@pytest.mark.parametrize("backbone", ["resnet_small", "resnet18"])
def test_integrated_gradients_add_up_on_encoders_in_use(backbone):
    """Their heads being random, what is added nearly cancels out in some images: the parts are the measure."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(backbone=backbone), 1).eval()
    network = nn.Sequential(encoder, nn.Linear(encoder.num_features, 1))
    for image in nn.functional.interpolate(torch.randn(3, 1, 8, 8), (64, 64), mode="bilinear"):
        off, _, parts = gap(network, image)
        assert off < 0.01 * parts


def test_integrated_gradients_equal_captums(rough, image):
    from captum.attr import IntegratedGradients

    baseline = mean_image(image)[None]
    expected = IntegratedGradients(of(rough)).attribute(image[None], baseline, n_steps=24, method="gausslegendre")
    found = result(integrated_gradients(of(rough), image, nodes=24))
    torch.testing.assert_close(found, expected[0].sum(0).detach(), rtol=1e-4, atol=1e-6)


def test_integrated_gradients_of_a_linear_score_are_exact(image):
    weight = torch.randn_like(image)
    found = result(integrated_gradients(lambda images: (images * weight).sum((1, 2, 3)), image))
    torch.testing.assert_close(found, (weight * (image - mean_image(image))).sum(0), rtol=1e-5, atol=1e-5)


def test_integrated_gradients_leave_no_gradient_and_do_not_mind_inference_mode(rough, image):
    network = nn.Sequential(rough, nn.Identity()).requires_grad_(True)
    free = result(integrated_gradients(of(network), image))
    assert all(parameter.grad is None for parameter in network.parameters()) and not free.requires_grad
    network.requires_grad_(False)
    with torch.inference_mode():
        found = result(integrated_gradients(of(network), image.clone()))
    torch.testing.assert_close(found, free)


def test_occlusion_equals_a_loop(rough, image):
    """One square at a time: 4 pixels wide (28 / 7), by 2 pixels."""
    score = of(rough)
    total, count = torch.zeros(20, 28), torch.zeros(20, 28)
    for top in range(0, 17, 2):
        for left in range(0, 25, 2):
            without = image.clone()
            for channel in range(2):
                without[channel, top : top + 4, left : left + 4] = image[channel].mean()
            fall = (score(image[None]) - score(without[None])).item()
            total[top : top + 4, left : left + 4] += fall
            count[top : top + 4, left : left + 4] += 1
    torch.testing.assert_close(result(occlusion(score, image)), total / count, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (9, 30), *((size, size) for size in (15, 16, 17, 28, 63, 97, 224))])
def test_occlusion_reaches_every_pixel_in_bounded_time(shape):
    """A score that sees one pixel falls only where squares hold it; so with each corner."""
    seen = []

    def score(images):
        seen.append(len(images))
        return images[:, 0, 0, 0] + images[:, 0, -1, -1]

    image = torch.rand(1, *shape)
    image[0, 0, 0] = image[0, -1, -1] = 2
    heat_map = result(occlusion(score, image))
    assert heat_map.isfinite().all() and heat_map[0, 0] > 0 and heat_map[-1, -1] > 0
    assert heat_map[shape[0] // 2, shape[1] // 2].abs() < 1e-6
    assert sum(seen) <= SQUARES + 1


@pytest.mark.parametrize("method", [integrated_gradients, occlusion])
def test_batches_make_no_difference_and_are_small(method, rough, image, monkeypatch):
    whole = result(method(of(rough), image))
    monkeypatch.setattr(attribution, "_PIXELS", 3 * image[0].numel())
    sizes = []

    def score(images):
        sizes.append(len(images))
        return of(rough)(images)

    steps = method(score, image)
    assert sizes == [], "nothing is computed before somebody wants it"
    torch.testing.assert_close(result(steps), whole, rtol=1e-4, atol=1e-5)
    assert max(sizes) == 3


BRIGHT = np.s_[8:24, 40:56]


@pytest.fixture
def square():
    image = torch.rand(1, 64, 64) * 0.2
    image[0][BRIGHT] = 1
    return image


def brightness(images):
    """Of a network that looks for bright pixels."""
    return torch.sigmoid(10 * (images > 0.8).float().mean((1, 2, 3)) / 0.0625 - 5)


def test_deletion_equals_a_loop(square):
    """Tile by tile: 64 pixels are cut at ceil(64 i / 14)."""
    heat_map = torch.rand(64, 64)
    edges = np.ceil(np.arange(15) * 64 / 14).astype(int)
    parts = [slice(*pair) for pair in itertools.pairwise(edges)]
    tiles = list(itertools.product(parts, parts))
    tiles.sort(key=lambda tile: -heat_map[tile].mean().item())
    left, curve = square.clone(), []
    for place, tile in enumerate([*tiles, None]):
        if place % 14 == 0:
            curve.append(brightness(left[None]).item())
        if tile is not None:
            left[0][tile] = square.mean()
    found = result(deletion(brightness, square, heat_map))
    assert found.taken == pytest.approx(np.linspace(0, 1, 15))
    assert found.informed_curve == pytest.approx(curve, abs=1e-5)
    assert found.informed == pytest.approx(np.trapezoid(curve, dx=1 / 14), abs=1e-5)


def test_deletion_finds_what_a_score_rests_on(square):
    knows, mistaken = torch.zeros(64, 64), torch.ones(64, 64)
    knows[BRIGHT], mistaken[BRIGHT] = 1, 0
    found = result(deletion(brightness, square, knows))
    assert found.informed_curve[0] == found.random_curve[0] == pytest.approx(brightness(square[None]).item())
    assert found.informed_curve[-1] == found.random_curve[-1] < 0.01
    assert found.difference == found.random - found.informed > 0.3
    assert result(deletion(brightness, square, mistaken)).difference < -0.3


@pytest.mark.parametrize("coarseness", [1, 16])
def test_maps_that_know_nothing_score_nothing_on_average(coarseness, square):
    """Noise of single pixels, and noise in blotches as large as what heat maps show."""
    differences = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(1, 1, 64 // coarseness, 64 // coarseness, generator=generator)
        heat_map = nn.functional.interpolate(noise, (64, 64), mode="nearest")[0, 0]
        differences.append(result(deletion(brightness, square, heat_map, seed)).difference)
    error = np.std(differences) / np.sqrt(len(differences))
    assert abs(np.mean(differences)) < 3 * error < 0.12


def test_an_empty_map_is_a_random_order(square):
    """Not the order of the rows, in which a square at the top would come first."""
    differences = [result(deletion(brightness, square, torch.zeros(64, 64), seed)).difference for seed in range(40)]
    assert abs(np.mean(differences)) < 3 * np.std(differences) / np.sqrt(40)


def test_deletion_repeats_by_its_seed(square):
    first, again, other = (result(deletion(brightness, square, torch.rand(64, 64), seed)) for seed in (3, 3, 4))
    assert first.random_curve == again.random_curve != other.random_curve


def test_smaller_images_than_tiles(square):
    found = result(deletion(brightness, square[:, 10:18, 36:46], torch.rand(8, 10)))
    assert found.taken[0] == 0 and found.taken[-1] == 1 and len(found.taken) == 15


def test_smoothing_spreads_a_pixel_and_keeps_what_is_even():
    peak = torch.zeros(64, 64)
    peak[20, 30] = 9
    spread = smooth(peak)
    assert spread[19:22, 29:32].eq(1).all() and spread.sum() == 9
    assert smooth(torch.ones(224, 224)).eq(1).all()


def test_classifier_head_and_encoder_together():
    """What a server explains: (B, C, H, W) -> (B,)."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(), 1).eval()
    head = LinearHead(encoder.num_features)
    image = torch.rand(1, 32, 32)
    for method in (integrated_gradients, occlusion):
        assert result(method(lambda images: head(encoder(images)), image)).shape == (32, 32)
