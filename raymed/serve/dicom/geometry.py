"""A map on the grid of the network's input, brought back to the image that the input was made of."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from raymed.data.preprocess import Preprocess


def to_source(values: np.ndarray, preprocess: "Preprocess", height: int, width: int) -> np.ndarray:
    """The inverse of `Preprocess.to_array`, bilinear.

    Args:
        values: (size, size) float in [0, 1], of what `to_array` made of an image.
        height, width: of that image.

    Returns:
        (height, width) float32 in [0, 1]; 0 in what the network has not seen (`fit` = crop).
    """
    seen, (top, left, bottom, right) = _seen(values.astype(np.float32), preprocess, height, width)
    out = np.zeros((height, width), np.float32)
    out[top:bottom, left:right] = _resize(seen, bottom - top, right - left)
    return out


def _seen(
    values: np.ndarray, preprocess: "Preprocess", height: int, width: int
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The part of the map without borders, and the part of the image (top, left, bottom, right) that it shows."""
    whole = (0, 0, height, width)
    if (height, width) == values.shape or preprocess.fit == "stretch":
        return values, whole
    if preprocess.fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return values, (top, left, top + side, left + side)
    size = len(values)
    scale = size / max(height, width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    return values[top : top + inner[0], left : left + inner[1]], whole


def _resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    resized = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized).clip(0, 1)
