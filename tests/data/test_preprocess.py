"""Geometry, grey values and normalisation of the network's input."""

import json

import numpy as np
import pytest
import torch

from raymed.config import UserError, from_dict, to_dict
from raymed.data.preprocess import Preprocess

WIDE = np.full((20, 40), 200, np.uint8)


def test_native_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 12), np.uint16)
    np.testing.assert_array_equal(Preprocess().to_array(pixels), pixels[..., None], strict=True)


def test_letterbox_keeps_proportions_between_black_borders():
    out = Preprocess(size=20).to_array(WIDE)
    assert out.shape == (20, 20, 1) and out.dtype == np.uint8
    assert (out[5:15] == 200).all() and (out[:5] == 0).all() and (out[15:] == 0).all()
    tall = Preprocess(size=20).to_array(WIDE.T)
    np.testing.assert_array_equal(tall[..., 0], out[..., 0].T)


def test_crop_takes_the_middle():
    pixels = np.zeros((20, 40), np.uint8)
    pixels[:, 10:30] = 200
    assert (Preprocess(size=20, fit="crop").to_array(pixels) == 200).all()


def test_stretch_fills_the_square():
    pixels = np.repeat(np.array([[0, 200]], np.uint8), 10, axis=0).repeat(20, axis=1)
    out = Preprocess(size=10, fit="stretch").to_array(pixels)[..., 0]
    assert (out[:, :4] == 0).all() and (out[:, 6:] == 200).all()


def test_shrinking_is_antialiased_and_keeps_16_bits():
    stripes = np.tile(np.array([0, 60000], np.uint16), (64, 32))
    out = Preprocess(size=8).to_array(stripes)
    assert out.dtype == np.uint16
    assert np.abs(out.astype(int) - 30000).max() < 2500


def test_enlarging_does_not_overflow():
    corner = np.zeros((8, 8), np.uint8)
    corner[:4] = 255
    out = Preprocess(size=21).to_array(corner)
    assert out[0].min() == 255 and out[-1].max() == 0


def test_channels():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 100
    assert (Preprocess(size=8, channels=1).to_array(red) == 30).all()  # 0.299 * 100
    np.testing.assert_array_equal(Preprocess(size=8, channels=3).to_array(red), red)
    np.testing.assert_array_equal(Preprocess(size=8, channels=1).to_array(red[..., [0, 0, 0]]), red[..., :1])
    assert Preprocess(size=20, channels=3).to_array(WIDE).shape == (20, 20, 3)


@pytest.mark.parametrize("fit", ["letterbox", "crop", "stretch"])
@pytest.mark.parametrize("size", [16, 37, 120])
@pytest.mark.parametrize("shape", [(64, 64), (40, 93), (71, 30)])
def test_a_region_goes_where_its_pixels_go(fit, size, shape):
    """Drawn as an image, the region is resampled with antialiasing: the two agree but for the pixels at its border."""
    preprocess = Preprocess(size=size, fit=fit)
    y, x = np.mgrid[: shape[0], : shape[1]]
    mask = np.hypot((y - 0.55 * shape[0]) / shape[0], (x - 0.4 * shape[1]) / shape[1]) < 0.3
    region = preprocess.to_region(mask)
    image = preprocess.to_array(np.where(mask, 255, 0).astype(np.uint8))[..., 0].astype(float)
    assert region.shape == (size, size) and region.dtype == bool
    assert region[image > 250].all() and not region[image < 5].any()
    assert abs(region.sum() - image.sum() / 255) < 0.05 * region.sum() + 4
    centres = [np.array([(w * axis).sum() / w.sum() for axis in np.mgrid[:size, :size]]) for w in (region, image)]
    assert np.abs(centres[0] - centres[1]).max() < 0.35


def test_a_region_by_hand():
    mask = np.zeros((20, 40), bool)
    mask[4:8, 30:40] = True
    box = np.zeros((20, 20), bool)
    box[5 + 2 : 5 + 4, 15:20] = True
    np.testing.assert_array_equal(Preprocess(size=20).to_region(mask), box)
    np.testing.assert_array_equal(Preprocess(size=20, fit="stretch").to_region(mask), mask[:, ::2])
    assert not Preprocess(size=20, fit="crop").to_region(mask).any()  # lies in what is cropped away
    np.testing.assert_array_equal(Preprocess().to_region(mask), mask)
    larger = Preprocess(size=40, fit="stretch").to_region(mask)
    np.testing.assert_array_equal(larger, mask.repeat(2, axis=0))


def test_normalise_each_image():
    contrast = torch.tensor([0.1, 0.5, 1, 1])[:, None, None, None]
    image = contrast * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = Preprocess(channels=3, normalisation="image").normalise(image)
    torch.testing.assert_close(out.mean((1, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((1, 2, 3), correction=0), torch.ones(4), atol=1e-3, rtol=0)
    assert Preprocess(normalisation="image").normalise(torch.full((1, 1, 8, 8), 0.3)).abs().max() < 0.01


def test_normalise_by_the_data_set():
    image = torch.full((2, 3, 4, 4), 0.5)
    out = Preprocess(channels=3, normalisation="dataset", mean=(0.5, 0.25, 0.0), std=(1.0, 0.5, 0.25)).normalise(image)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0.0, 0.5, 2.0]))
    assert Preprocess(normalisation="none").normalise(image) is image
    with pytest.raises(UserError, match="needs preprocess.mean"):
        Preprocess(normalisation="dataset").normalise(image)


def test_travels_as_json():
    preprocess = Preprocess(size=64, fit="crop", window=(40.0, 400.0), normalisation="dataset", mean=(0.5,), std=(0.2,))
    assert from_dict(Preprocess, json.loads(json.dumps(to_dict(preprocess)))) == preprocess


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 4}, "preprocess.size must be >= 8, got 4"),
        ({"fit": "leterbox"}, "did you mean 'letterbox'"),
        ({"normalisation": "images"}, "did you mean 'image'"),
        ({"channels": 2}, "preprocess.channels must be 1 or 3, got 2"),
        ({"window": (40.0, 0.0)}, "width must be > 0"),
        ({"mean": (0.1, 0.2, 0.3)}, "preprocess.mean must have 1 numbers, got 3"),
        ({"std": (0.0,)}, "preprocess.std must be > 0"),
    ],
)
def test_bad_fields_fail_at_once(fields, message):
    with pytest.raises(UserError, match=message):
        Preprocess(**fields)
