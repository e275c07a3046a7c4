"""Augmentation: what each strength does, and that a sample's pixels do not depend on its batch."""

from dataclasses import replace

import pytest
import torch

from raymed.config import UserError
from raymed.data.augment import Augment

ALL = Augment(sharpness=0.5, shear=0.1, aspect=0.1, noise=0.05, erase=0.5)
INDEX = torch.arange(100, 164)


@pytest.fixture(scope="module")
def image():
    return torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def ramp(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose pixels are their x and y, in pixels from the centre, scaled into [0, 1] by /100 + 0.5."""
    x = torch.arange(width).float() - (width - 1) / 2
    y = torch.arange(height).float() - (height - 1) / 2
    return (x / 100 + 0.5).expand(height, width).clone(), (y[:, None] / 100 + 0.5).expand(height, width).clone()


def displacement(augment: Augment, height: int = 40, width: int = 60, num: int = 200):
    """The affine map (num, 2, 3) from output to input pixel positions, measured at the centre of the image."""
    image = torch.stack(ramp(height, width))[None].expand(num, -1, -1, -1)
    moved = (augment(image, torch.arange(num), 0, 1) - 0.5) * 100
    r, c = height // 2, width // 2
    at, right, below = moved[:, :, r, c], moved[:, :, r, c + 1], moved[:, :, r + 1, c]
    linear = torch.stack([right - at, below - at], dim=2)
    return linear, at - linear @ torch.tensor([0.5, 0.5])


def test_pixels_do_not_depend_on_the_batch(image):
    whole = ALL(image, INDEX, 3, 7)
    halves = [ALL(image[part], INDEX[part], 3, 7) for part in (slice(0, 40), slice(40, 64))]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat(halves), whole)
    assert torch.equal(ALL(image[order], INDEX[order], 3, 7), whole[order])


def test_autocast_does_not_move_pixels(image):
    expected = ALL(image, INDEX, 3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ALL(image, INDEX, 3, 7), expected)


def test_views_steps_and_seeds_differ(image):
    draws = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    views = [ALL(image, INDEX, step, seed, view) for step, seed, view in draws]
    for first in range(4):
        for second in range(first):
            assert (views[first] - views[second]).abs().mean() > 0.05


def test_none_changes_nothing(image):
    assert torch.equal(Augment.none()(image, INDEX, 0, 0), image)


def test_shape_and_range(image):
    colour = image.expand(-1, 3, -1, -1)[:, :, :, :20]
    changed = replace(ALL, brightness=0.9)(colour, INDEX, 0, 0)
    assert changed.shape == colour.shape and changed.dtype == colour.dtype
    assert changed.min() >= 0 and changed.max() <= 1


def test_rotation_is_rigid_in_pixels_of_an_oblong_image():
    linear, shift = displacement(replace(Augment.none(), rotate=20.0))
    identity = torch.eye(2).expand(200, 2, 2)
    torch.testing.assert_close(linear @ linear.mT, identity, atol=2e-3, rtol=0)
    degrees = torch.rad2deg(torch.atan2(linear[:, 1, 0], linear[:, 0, 0]))
    assert 18 < degrees.max() < 20.1 and -20.1 < degrees.min() < -18 and abs(degrees.mean()) < 3
    torch.testing.assert_close(shift, torch.zeros_like(shift), atol=0.01, rtol=0)


def test_scale_translation_and_flip_stay_in_their_ranges():
    linear, shift = displacement(replace(Augment.none(), scale=0.25, translate=0.1, flip=0.5))
    factors = linear[:, 1, 1]
    assert 0.8 < factors.min() < 0.83 and 1.2 < factors.max() < 1.2501
    torch.testing.assert_close(linear[:, 0, 0].abs(), factors, atol=2e-3, rtol=0)
    assert 70 < (linear[:, 0, 0] < 0).sum() < 130
    assert 5.5 < shift[:, 0].abs().max() < 6.01 and 3.6 < shift[:, 1].abs().max() < 4.01


def test_certain_flip_is_the_mirror_image(image):
    torch.testing.assert_close(replace(Augment.none(), flip=1.0)(image, INDEX, 0, 0), image.flip(3), atol=1e-5, rtol=0)


def test_exposure():
    image = torch.linspace(0.2, 0.6, 784).reshape(1, 1, 28, 28).expand(300, -1, -1, -1)
    rows = torch.arange(300)
    brighter = replace(Augment.none(), brightness=0.1)(image, rows, 0, 0) - image
    torch.testing.assert_close(brighter, brighter[:, :, :1, :1].expand_as(brighter), atol=1e-6, rtol=0)
    assert 0.09 < brighter.max() < 0.1001 and -0.1001 < brighter.min() < -0.09
    spread = replace(Augment.none(), contrast=0.5)(image, rows, 0, 0).std((1, 2, 3)) / image.std((1, 2, 3))
    assert 1 / 1.501 < spread.min() < 0.69 and 1.45 < spread.max() < 1.501
    exponent = replace(Augment.none(), gamma=0.5)(image, rows, 0, 0)[:, 0, 0, 0].log() / image[0, 0, 0, 0].log()
    assert 1 / 1.501 < exponent.min() < 0.69 and 1.45 < exponent.max() < 1.501


def test_sharpness_changes_detail_and_not_the_mean(image):
    detail = 0.5 + 0.2 * (image - 0.5)
    changed = replace(Augment.none(), sharpness=1.0)(detail, INDEX, 0, 0)
    ratio = changed.std((1, 2, 3)) / detail.std((1, 2, 3))
    assert ratio.min() < 0.5 and ratio.max() > 1.7
    torch.testing.assert_close(changed.mean((1, 2, 3)), detail.mean((1, 2, 3)), atol=0.01, rtol=0)


def test_noise_has_the_stated_strength():
    grey = torch.full((64, 1, 28, 28), 0.5)
    sigma = replace(Augment.none(), noise=0.1)(grey, INDEX, 0, 0).std((1, 2, 3))
    assert 0.09 < sigma.max() < 0.105 and sigma.min() < 0.01


def test_erased_share_and_area():
    image = torch.zeros(400, 1, 50, 50)
    image[:, :, ::2] = 1.0
    erased = replace(Augment.none(), erase=0.5, erase_area=0.2)(image, torch.arange(400), 0, 0) == 0.5
    area = erased.float().mean((1, 2, 3))
    assert 160 < (area > 0).sum() < 230
    assert 0.15 < area.max() < 0.22


@pytest.mark.parametrize("field, value", [("rotate", -1), ("flip", 1.5), ("erase_area", 2), ("gamma", -0.1)])
def test_strengths_out_of_range_are_refused(field, value):
    with pytest.raises(UserError, match=field):
        Augment(**{field: value})
