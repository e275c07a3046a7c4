"""Where text is likely burned into a picture: names and numbers that an X-ray machine or a scanner wrote over it.

Written characters are thin strokes of one brightness with sharp edges, in lines. What is thin stands out of a white
top-hat transform (of the picture, and of its negative for black text); components of one height are joined along the
line; a line is kept if it has as many strokes a row, as sharp and as equally bright, as writing has.

    picture -> white top-hat -> components of one height -> lines -> strokes a row, sharpness, one ink -> boxes

A hint for a person who looks, not a guarantee: faint, blurred or slanted text and single characters are missed, and a
scale may look like text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[int, int, int, int]

_LARGEST = 1200  # rows from which on a picture is looked at in half its size, or less
_LOWEST, _HIGHEST, _STEP = 5, 1 / 8, 1.4  # heights of a line: pixels; part of the picture's height; one to the next
_CONTRAST = 36  # grey levels by which strokes stand out
_NOISE = 7.0  # the same, in standard deviations of the noise
_TALLEST = 1.9  # height of a line, in heights of its characters
_SHORTEST = 1.9  # length of a line, in heights
_COVERAGE = (0.12, 0.72)  # part of a line's box that is ink
_STROKES = 0.85  # strokes that a row of pixels crosses in a height of its length
_SHARP = 0.42  # step from one pixel to the next at an edge, of the ink's contrast
_ONE_INK = 0.2  # how far the brightness of a line's characters lies apart, of the ink's contrast


@dataclass(frozen=True)
class _Strokes:
    """What may be writing in a picture (H, W). contrast: (H, W) its top-hat. threshold: contrast from which on it is
    ink. labels: (H, W) components of ink, from 1. boxes: (C, 4) x0, y0, x1, y1 of each."""

    picture: np.ndarray
    contrast: np.ndarray
    threshold: float
    labels: np.ndarray
    boxes: np.ndarray


def text_boxes(pixels: np.ndarray) -> list[Box]:
    """Likely burned-in text.

    Args:
        pixels: (H, W) uint8.

    Returns:
        Boxes (x0, y0, x1, y1) in pixels, x1 and y1 just outside, each around a line or several that touch; none touches
        another; from top to bottom.
    """
    assert pixels.ndim == 2 and pixels.dtype == np.uint8, f"(H, W) uint8 expected, got {pixels.shape} {pixels.dtype}"
    factor = -(-pixels.shape[0] // _LARGEST)
    small = _shrunk(pixels, factor)
    lines = [line for picture in (small, 255 - small) for line in _lines(_strokes(picture))]
    last = np.array(pixels.shape[::-1])
    grown = [
        (*np.maximum((np.array(line[:2]) - 1) * factor, 0), *np.minimum((np.array(line[2:]) + 1) * factor, last))
        for line in lines
    ]
    return sorted(_joined(grown), key=lambda box: (box[1], box[0]))


def blank(pixels: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """A copy of the pixels (H, W) or (H, W, C), of any dtype, with 0 inside the boxes; what of a box lies outside the
    picture has no effect."""
    blanked = pixels.copy()
    for x0, y0, x1, y1 in boxes:
        blanked[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = 0
    return blanked


def _shrunk(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Means of blocks of factor x factor; the last ones are filled up with the edge of the picture."""
    if factor == 1:
        return pixels
    short = [-size % factor for size in pixels.shape]
    padded = np.pad(pixels, [(0, short[0]), (0, short[1])], mode="edge")
    height, width = (size // factor for size in padded.shape)
    return padded.reshape(height, factor, width, factor).mean((1, 3)).round().astype(np.uint8)


def _strokes(picture: np.ndarray) -> _Strokes:
    from scipy import ndimage

    reach = 2 * (picture.shape[0] // 80) + 3
    contrast = np.asarray(ndimage.white_tophat(picture, size=(reach, reach)))
    median = np.median(contrast)
    noise = 1.4826 * np.median(np.abs(contrast.astype(np.float32) - median))
    threshold = max(_CONTRAST, float(median + _NOISE * noise))
    labels = _components(contrast > threshold)
    boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]
    return _Strokes(picture, contrast, threshold, labels, np.array(boxes, dtype=int).reshape(-1, 4))


def _components(mask: np.ndarray) -> np.ndarray:
    """Connected components (corners count) of what is not 0, from 1; 0 elsewhere."""
    from scipy import ndimage

    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, np.ones((3,) * mask.ndim), output=labels)
    return labels


def _lines(strokes: _Strokes) -> Iterator[Box]:
    """Lines of text, the same one perhaps at several heights."""
    from scipy import ndimage

    heights = strokes.boxes[:, 3] - strokes.boxes[:, 1]
    height = float(_LOWEST)
    while height <= _HIGHEST * strokes.picture.shape[0]:
        fits = (heights >= height / 1.5) & (heights <= height * 1.5)
        ink = np.append(False, fits)[strokes.labels]
        joined = _components(ndimage.maximum_filter1d(ink.view(np.uint8), 2 * round(0.55 * height) + 1, axis=1))
        for number, part in enumerate(ndimage.find_objects(joined), start=1):
            line = _tight(ink[part] & (joined[part] == number), part)
            if _is_text(strokes, ink, line, height):
                yield _extended(strokes, line)
        height *= _STEP


def _tight(ink: np.ndarray, part: tuple[slice, slice]) -> Box:
    """The box around the ink of a part of the picture."""
    y, x = np.nonzero(ink)
    top, left = part[0].start, part[1].start
    return int(left + x.min()), int(top + y.min()), int(left + x.max()) + 1, int(top + y.max()) + 1


def _is_text(strokes: _Strokes, ink: np.ndarray, line: Box, height: float) -> bool:
    x0, y0, x1, y1 = line
    inside, contrast = ink[y0:y1, x0:x1], strokes.contrast[y0:y1, x0:x1].astype(np.float32)
    tall, length = inside.shape
    if tall > _TALLEST * height or length < _SHORTEST * tall:
        return False
    if not _COVERAGE[0] <= inside.mean() <= _COVERAGE[1]:
        return False
    level = float(np.percentile(contrast[inside], 90))
    values = np.where(inside, strokes.picture[y0:y1, x0:x1], 0)
    return (
        _strokes_a_height(inside) >= _STROKES
        and _sharpness(inside, contrast) >= _SHARP * level
        and _spread_of_ink(values) <= _ONE_INK * level
    )


def _strokes_a_height(inside: np.ndarray) -> float:
    """How many strokes a row of pixels crosses, on average, in a length equal to the height of the line."""
    tall, length = inside.shape
    begins = np.diff(np.pad(inside, ((0, 0), (1, 0))).astype(np.int8), axis=1) == 1
    return float(begins.sum(1).mean() * tall / length)


def _sharpness(inside: np.ndarray, contrast: np.ndarray) -> float:
    """The median step from one pixel of a row to the next where a stroke begins or ends."""
    edges = np.abs(np.diff(contrast, axis=1))[inside[:, 1:] ^ inside[:, :-1]]
    return float(np.median(edges)) if len(edges) else 0.0


def _spread_of_ink(values: np.ndarray) -> float:
    """How far the brightest values of the line's squares lie from their median: the upper quartile."""
    tall, length = values.shape
    starts = range(0, max(length - tall // 2, 1), tall)
    peaks = np.array([values[:, start : start + tall].max() for start in starts], dtype=np.float32)
    return float(np.percentile(np.abs(peaks - np.median(peaks)), 75))


def _extended(strokes: _Strokes, line: Box) -> Box:
    """The line with what stands beside it in the same rows, at most a height and a half away: characters that are
    fainter or touch something else."""
    from scipy import ndimage

    x0, y0, x1, y1 = line
    columns = strokes.contrast[y0:y1].max(axis=0) > strokes.threshold
    groups = _components(ndimage.maximum_filter1d(columns.view(np.uint8), 2 * round(0.75 * (y1 - y0)) + 1))
    own = np.flatnonzero(columns & np.isin(groups, groups[x0:x1][columns[x0:x1]]))
    return int(own[0]), y0, int(own[-1]) + 1, y1


def _joined(boxes: Sequence[Sequence[int]]) -> list[Box]:
    """Boxes that touch become one, until none do."""
    joined: list[Box] = []
    for box in boxes:
        while touching := [
            b for b in joined if b[0] <= box[2] and box[0] <= b[2] and b[1] <= box[3] and box[1] <= b[3]
        ]:
            joined = [b for b in joined if b not in touching]
            low, high = np.min([box, *touching], axis=0), np.max([box, *touching], axis=0)
            box = (*low[:2], *high[2:])
        joined.append((int(box[0]), int(box[1]), int(box[2]), int(box[3])))
    return joined


def _touch(a: Sequence[int], b: Sequence[int]) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
