"""From the images that somebody asks about to the tensor that a network takes, as in training.

Whatever is wrong with an image is said with its place in the request, from 0.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raymed.config import UserError
from raymed.data.preprocess import Preprocess
from raymed.data.readers import read


def read_content(content: bytes, place: int, window: tuple[float, float] | None = None) -> np.ndarray:
    """Decode the content of an image file: PNG, JPEG, TIFF, DICOM or NIfTI, as `raymed.data.readers.read` does.

    Raises UserError that names the place of an image that cannot be used.
    """
    try:
        return read(content, window=window)
    except UserError as error:
        raise UserError(f"image {place}: {error}") from None


def unit_image(preprocess: Preprocess, images: Sequence[np.ndarray], first: int = 0) -> Tensor:
    """Decoded images, each (H, W) or (H, W, 3) uint8 or uint16 of any size -> (B, C, size, size) float32 in [0, 1].

    Raises UserError for an image that is no such array, is empty, or has one value everywhere; places count from
    `first`.
    """
    arrays = [preprocess.to_array(check_image(image, first + i)) for i, image in enumerate(images)]
    return torch.cat([to_unit(torch.from_numpy(array.transpose(2, 0, 1)[None].copy())) for array in arrays])


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 or uint16 -> float32 in [0, 1], as `Batch.unit_image` makes it."""
    return pixels.to(torch.float32) / torch.iinfo(pixels.dtype).max


def check_image(image: np.ndarray, place: int) -> np.ndarray:
    """The image. Raises UserError, with its place, for what `unit_image` does not take."""
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    if shape is None or len(shape) not in (2, 3) or shape[2:] not in ((), (3,)) or dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"image {place}: (H, W) or (H, W, 3) uint8 or uint16 is expected, got {shape} {dtype}; "
            "read files with raymed.data.readers.read"
        )
    if image.size == 0 or image.min() == image.max():
        raise UserError(f"image {place}: {'is empty' if image.size == 0 else 'all pixels have one value'}")
    return image
