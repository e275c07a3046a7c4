"""Box alignment and concept count against planted truth, counts by hand, and numpy's quantile."""

import numpy as np
import pytest
import torch
from torch import nn

from raymed.config import UserError
from raymed.explain.inside import box_alignment, concept_count, look_inside

SIZE = 32


class Detector(nn.Module):
    """Two units: one sees what is bright, the other what is dark."""

    def maps(self, x):
        return torch.cat([x, -x], 1).relu()

    def pool(self, maps):
        return maps.mean((2, 3))


class Layered(nn.Module):
    """Layers of several kinds, as a backbone has."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, 2, 1)
        self.norm = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList([nn.Conv2d(3, 5, 3, 2, 1)])
        self.flat = nn.Flatten()

    def maps(self, x):
        return self.blocks[0](self.act(self.norm(self.stem(x))))

    def pool(self, maps):
        return self.flat(maps).unflatten(1, (5, -1)).mean(2)


def bright(features):
    return features[:, 0]


def dark(features):
    return features[:, 1]


def rectangle(top, left, height, width):
    inside = np.zeros((SIZE, SIZE), bool)
    inside[top : top + height, left : left + width] = True
    return inside


@pytest.fixture
def planted():
    """Six images (6, 1, 32, 32) of -1 with a rectangle of 1, and the rectangles."""
    regions = [rectangle(2 * i, 3 * i, 6 + i, 8) for i in range(6)]
    return torch.from_numpy(np.where(np.stack(regions), 1.0, -1.0)[:, None]).float(), regions


def test_a_network_that_sees_the_finding(planted):
    images, regions = planted
    found = look_inside(Detector(), bright, images, regions)
    assert found["energy_inside"].tolist() == found["hit"].tolist() == [1.0] * 6
    assert found["area"].tolist() == [region.mean() for region in regions]
    assert {name: (len(v), v.dtype.kind) for name, v in found.items()} == {
        "energy_inside": (6, "f"), "hit": (6, "f"), "area": (6, "f"), "concepts": (6, "i")
    }  # fmt: skip


def test_a_network_that_sees_everything_else(planted):
    images, regions = planted
    found = look_inside(Detector(), dark, images, regions)
    assert found["energy_inside"].tolist() == found["hit"].tolist() == [0.0] * 6


def test_a_network_that_sees_nothing_is_at_chance(planted):
    images, regions = planted
    found = look_inside(Detector(), lambda features: -features[:, 0], images, regions)
    assert found["energy_inside"].tolist() == found["hit"].tolist() == found["area"].tolist()


def test_energy_and_hit_by_hand():
    cam = np.zeros((3, 2, 4))
    cam[0, 0] = [4, 3, 2, 1]  # the peak inside, 7 of 10
    cam[1, 1] = [1, 1, 6, 0]  # the peak outside, 2 of 8
    cam[2, :, 1:3] = 2  # four equal peaks, two of them inside
    inside = np.zeros((3, 2, 4), bool)
    inside[:, :, :2] = True
    found = box_alignment(cam, inside)
    assert found["energy_inside"].tolist() == [0.7, 0.25, 0.5]
    assert found["hit"].tolist() == [1, 0, 0.5] and found["area"].tolist() == [0.5] * 3


def test_random_maps_are_at_chance():
    rng = np.random.default_rng(0)
    cam = rng.random((400, 24, 24))
    inside = np.zeros((400, 24, 24), bool)
    for i in range(400):
        top, left, height, width = rng.integers(1, 12, 4)
        inside[i, top : top + height, left : left + width] = True
    found = box_alignment(cam, inside)
    assert np.abs(found["energy_inside"] - found["area"]).max() < 0.03
    assert abs(found["hit"].mean() - found["area"].mean()) < 0.03


def test_places_are_counted_by_hand():
    """Three units over two images; responses of 1 on 0, so that any quantile up to the zeros' share finds them."""
    maps = torch.zeros(2, 3, SIZE, SIZE)
    maps[0, 0, 4:6, 4:6] = maps[0, 0, 10, 10] = 1  # two places
    maps[0, 0, 6, 6] = 1  # touches the first by a corner
    maps[0, 0, 25, 25] = 1  # outside
    maps[0, 1, 8:20, 8] = 1  # half of it inside: one place
    maps[1, 1, 0, 0] = maps[1, 1, 0, 31] = maps[1, 1, 15, 15] = 1  # one of three inside
    maps[1, 2] = 5  # alive in one image only: above the quantile of both everywhere
    inside = np.stack([rectangle(0, 0, 16, 16), rectangle(10, 10, 6, 6)])
    assert concept_count(maps, inside, quantile=0.5).tolist() == [3, 2]
    assert concept_count(maps[:, :2], inside, quantile=0.5).tolist() == [3, 1]


def test_neighbouring_images_are_kept_apart():
    maps = torch.zeros(4, 1, SIZE, SIZE)
    maps[1:3, 0, 5:8, 5:8] = 1
    assert concept_count(maps, np.stack([rectangle(0, 0, 16, 16)] * 4), 0.9).tolist() == [0, 1, 1, 0]


def test_dead_units_count_nothing():
    """Not one in every image, as they would at ">= quantile"."""
    regions = np.stack([rectangle(0, 0, 20, 20)] * 3)
    assert concept_count(torch.zeros(3, 7, 8, 8), regions).tolist() == [0, 0, 0]
    rare = torch.zeros(3, 1, SIZE, SIZE)
    rare[0, 0, 3, 3] = 1  # 1 of 3072 pixels: the quantile is 0
    assert concept_count(rare, regions).tolist() == [1, 0, 0]


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.96, 0.99, 0.999])
def test_threshold_is_numpys_quantile_over_all_images(quantile):
    """Counted another way: one image and unit at a time, above np.quantile of all enlarged maps of the unit."""
    from scipy.ndimage import label

    torch.manual_seed(0)
    maps = torch.randn(5, 4, 6, 5)
    inside = np.stack([rectangle(i, 2 * i, 17, 13) for i in range(5)])
    large = nn.functional.interpolate(maps, (SIZE, SIZE), mode="bilinear", align_corners=False).numpy()
    expected = [0] * 5
    for unit in range(4):
        threshold = np.quantile(large[:, unit].astype(np.float64), quantile)
        for i in range(5):
            expected[i] += label((large[i, unit] > threshold) & inside[i], np.ones((3, 3)))[1]
    assert concept_count(maps, inside, quantile).tolist() == expected
    assert sum(expected) > 0


def test_batches_and_their_order_change_nothing():
    """Exactly: not one count differs, however the images are cut and ordered; by each batch's own quantile, they do."""
    torch.manual_seed(1)
    images = torch.randn(30, 1, SIZE, SIZE).cumsum(2) * torch.linspace(0.1, 2, 30)[:, None, None, None]
    regions = [rectangle(i % 10, i % 7, 14, 18) for i in range(30)]
    whole = look_inside(Detector(), bright, images, regions, quantile=0.9)
    for size, seed in ((1, 0), (7, 1), (30, 2)):
        order = np.random.default_rng(seed).permutation(30)
        batches = iter(images[order].split(size))
        found = look_inside(Detector(), bright, batches, [regions[i] for i in order], quantile=0.9)
        for name, values in found.items():
            np.testing.assert_array_equal(values, whole[name][order])
    maps = Detector().maps(images)
    parts = [concept_count(maps[i : i + 5], np.stack(regions[i : i + 5]), 0.9) for i in range(0, 30, 5)]
    assert (np.concatenate(parts) != whole["concepts"]).sum() > 10


def test_more_units_at_the_finding_count_more():
    """A network with eight units that see the finding, and one with eight that see anything: equal but for where."""
    torch.manual_seed(0)
    regions = [rectangle(4 + i, 6, 8, 8) for i in range(10)]
    noise = torch.rand(10, 8, SIZE, SIZE)
    at_finding = noise + torch.from_numpy(np.stack(regions))[:, None]
    elsewhere = noise + torch.from_numpy(np.stack(regions)[:, :, ::-1].copy())[:, None]
    here, there = (concept_count(maps, np.stack(regions)).mean() for maps in (at_finding, elsewhere))
    assert there == 0 and here > 20


def test_a_named_layer():
    torch.manual_seed(0)
    network, images = Layered().eval(), torch.randn(9, 1, SIZE, SIZE)
    regions = [rectangle(3, 3, 20, 20)] * 9
    counts = {
        layer: look_inside(network, bright, images, regions, layer, 0.9)["concepts"]
        for layer in (None, "blocks.0", "norm")
    }
    np.testing.assert_array_equal(counts[None], counts["blocks.0"])
    with torch.no_grad():
        before_relu = network.norm(network.stem(images))
    np.testing.assert_array_equal(counts["norm"], concept_count(before_relu, np.stack(regions), 0.9))
    assert all(not module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        ("block.0", "the encoder has no layer 'block.0'; did you mean 'blocks.0'?"),
        ("flat", "layer 'flat' has no activation maps"),
        ("blocks", "layer 'blocks' is never called itself"),
    ],
)
def test_layers_that_cannot_be_counted_in(layer, text):
    network = Layered()
    with pytest.raises(UserError, match=text.replace("?", r"\?")):
        look_inside(network, bright, torch.randn(2, 1, SIZE, SIZE), [rectangle(0, 0, 9, 9)] * 2, layer)
    assert all(not module._forward_hooks for module in network.modules())


def test_tokens_have_no_maps_to_look_into():
    class Tokens(nn.Module):
        def maps(self, x):
            return x.flatten(2).transpose(1, 2)

        def pool(self, maps):
            return maps.mean(1)

    with pytest.raises(UserError, match=r"no feature maps to look into: its last output is \(2, 1024, 1\)"):
        look_inside(Tokens(), bright, torch.zeros(2, 1, SIZE, SIZE), [rectangle(0, 0, 9, 9)] * 2)


def test_regions_that_do_not_fit(planted):
    images, regions = planted
    with pytest.raises(ValueError, match=r"regions are \(5, 32, 32\), images \(6, 32, 32\)"):
        look_inside(Detector(), bright, images, regions[:5])
    with pytest.raises(UserError, match="quantile must be >= 0 and < 1, got 1"):
        look_inside(Detector(), bright, images, regions, quantile=1.0)


def test_the_encoder_is_left_as_it_was_and_runs_in_eval_mode():
    network, images = Layered(), torch.randn(8, 1, SIZE, SIZE)
    regions = [rectangle(2, 2, 12, 12)] * 8
    state = {name: value.clone() for name, value in network.state_dict().items()}
    together = look_inside(network, bright, images, regions, quantile=0.8)
    assert network.training and all(module.training for module in network.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    alone = look_inside(network.eval(), bright, images, regions, quantile=0.8)
    np.testing.assert_array_equal(together["concepts"], alone["concepts"])
    assert all(parameter.grad is None for parameter in network.parameters())


def test_built_in_network_and_a_mean_over_patients():
    from raymed.metrics.bootstrap import bootstrap_ci, mean_statistic
    from raymed.models.encoder import EncoderConfig, build_encoder
    from raymed.models.head import LinearHead

    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(), in_channels=1)
    head = LinearHead(encoder.num_features)
    regions = [rectangle(8, 8, 16, 16)] * 12
    found = look_inside(encoder, head, torch.rand(12, 1, SIZE, SIZE), regions)
    assert (found["area"] == 0.25).all() and found["concepts"].sum() > 0
    statistic = mean_statistic("energy_inside", found["energy_inside"])
    figure = bootstrap_ci([statistic], [np.arange(12) // 2], n_boot=200)["energy_inside"]
    assert figure["mean"] == pytest.approx(found["energy_inside"].mean()) and figure["num_patients"] == 6
    assert figure["ci_low"] < figure["mean"] < figure["ci_high"]
