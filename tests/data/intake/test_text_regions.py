"""Text that was planted in drawn and in real radiographs is found; none is found where there is none."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from raymed.data.intake.text_regions import blank, text_boxes
from raymed.data.phantoms import hsg


def hangul_font(size):
    spec = importlib.util.find_spec("koreanize_matplotlib")
    if spec is None or spec.origin is None:
        pytest.skip("no Hangul font: pip install koreanize-matplotlib")
    return ImageFont.truetype(Path(spec.origin).parent / "fonts" / "NanumGothic.ttf", size)


def with_text(pixels, text, at, font, value=255):
    """The pixels (H, W) with text, and where its ink is (H, W) bool."""
    mask = Image.new("L", pixels.shape[::-1])
    ImageDraw.Draw(mask).multiline_text(at, text, 255, font)
    ink = np.asarray(mask) / 255
    return np.round(pixels * (1 - ink) + value * ink).astype(np.uint8), ink > 0.5


def inside(boxes, shape):
    covered = np.zeros(shape, bool)
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= shape[1] and 0 <= y0 < y1 <= shape[0]
        covered[y0:y1, x0:x1] = True
    return covered


def xray(number, size=160):
    return hsg(number, ("early", "late")[number % 2], ("none", "left", "right")[number % 3], seed=5, size=size)[0]


def test_a_name_in_a_corner_is_found_and_blanked():
    font = ImageFont.load_default(size=11)
    for number, at in enumerate([(2, 2), (60, 4), (3, 130), (60, 132), (40, 60), (2, 70)]):
        pixels, ink = with_text(xray(number), "KIM MINJI\n00012345 F 34", at, font)
        boxes = text_boxes(pixels)
        covered = inside(boxes, pixels.shape)
        y, x = np.nonzero(ink)
        around = (x.max() - x.min() + 9) * (y.max() - y.min() + 9)
        assert covered[ink].mean() > 0.97 and covered.sum() < 1.3 * around, number
        assert all(isinstance(edge, int) for box in boxes for edge in box)
        clean = blank(pixels, boxes)
        assert (clean[covered] == 0).all() and (clean[~covered] == pixels[~covered]).all()


def test_hangul_black_on_white_and_another_size():
    pixels, ink = with_text(xray(0, 320), "김민지 00012345", (10, 12), hangul_font(20))
    assert inside(text_boxes(pixels), pixels.shape)[ink].mean() > 0.97
    bright = 255 - xray(1, 320) // 2
    pixels, ink = with_text(bright, "HONG GILDONG 1988-03-01", (20, 280), ImageFont.load_default(size=18), value=0)
    assert inside(text_boxes(pixels), pixels.shape)[ink].mean() > 0.97


def test_a_large_picture_is_looked_at_in_parts_of_its_size_and_boxes_are_in_its_own_pixels():
    large = np.asarray(Image.fromarray(xray(2)).resize((2501, 2501), Image.Resampling.BICUBIC))
    pixels, ink = with_text(large, "KIM MINJI 00012345", (1700, 2400), ImageFont.load_default(size=64))
    (box,) = text_boxes(pixels)
    y, x = np.nonzero(ink)
    np.testing.assert_allclose(box, (x.min(), y.min(), x.max() + 1, y.max() + 1), atol=9)


def test_no_text_in_pictures_without():
    flagged = [number for number in range(40) if text_boxes(xray(number))]
    assert len(flagged) <= 1, flagged
    noise = np.random.default_rng(0).normal(120, 40, (256, 256)).clip(0, 255).astype(np.uint8)
    stripes = np.tile(np.repeat([0, 255], 8).astype(np.uint8), (128, 8))
    assert text_boxes(noise) == text_boxes(stripes) == text_boxes(np.full((64, 64), 7, np.uint8)) == []


def test_boxes_do_not_touch():
    font = ImageFont.load_default(size=12)
    pixels, _ = with_text(xray(3, 200), "KIM MINJI\n00012345\nHSG LATE", (4, 4), font)
    pixels, _ = with_text(pixels, "2023-04-12 10:15", (90, 180), font)
    boxes = text_boxes(pixels)
    assert len(boxes) >= 2 and boxes == sorted(boxes, key=lambda box: (box[1], box[0]))
    assert inside(boxes, pixels.shape).sum() == sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)


def test_real_images_without_and_with_a_planted_name(data_dir):
    files = sorted((data_dir / "brain_tumor_figshare" / "images").glob("*.*"))[:40]
    if not files:
        pytest.skip("no images of brain_tumor_figshare")
    rng, found, flagged = np.random.default_rng(0), [], []
    for file in files:
        pixels = np.asarray(Image.open(file).convert("L"))
        flagged.append(bool(text_boxes(pixels)))
        at = tuple(rng.integers(2, [110, 230]))
        planted, ink = with_text(pixels, "KIM MINJI 00012345", at, ImageFont.load_default(size=11))
        found.append(inside(text_boxes(planted), pixels.shape)[ink].mean() > 0.9)
    assert np.mean(flagged) <= 0.05 and np.mean(found) >= 0.9


LABELLED = {  # where breast ultrasound images of this set say "LEFT BREAST", "RT AXILLA" and so on, by eye
    **{"benign_1": (172, 376, 322, 390), "benign_3": (0, 271, 86, 285), "benign_34": (0, 279, 43, 293)},
    **{"malignant_10": (117, 337, 149, 349), "malignant_12": (125, 365, 216, 377), "malignant_13": (66, 95, 157, 103)},
}


def test_real_text_in_ultrasound_images(data_dir):
    folder = data_dir / "busi_seg" / "images"
    if not folder.is_dir():
        pytest.skip("no images of busi_seg")
    for name, (x0, y0, x1, y1) in LABELLED.items():
        pixels = np.asarray(Image.open(folder / f"{name}.jpg").convert("L"))
        assert inside(text_boxes(pixels), pixels.shape)[y0:y1, x0:x1].mean() > 0.95, name


def test_blank_keeps_type_and_colour_and_ignores_what_lies_outside():
    colour = np.full((4, 5, 3), 1000, np.uint16)
    blanked = blank(colour, [(-2, 1, 2, 9), (9, 9, 12, 12)])
    assert blanked.dtype == np.uint16 and (colour == 1000).all()
    expected = np.full((4, 5), 1000)
    expected[1:, :2] = 0
    np.testing.assert_array_equal(blanked, np.repeat(expected[..., None], 3, axis=2))
