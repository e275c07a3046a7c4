"""Pixels of any size and depth -> what the network sees. The same object is used in training and by a served model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from raymed.config import UserError, check_choice, check_range

if TYPE_CHECKING:
    from torch import Tensor

_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True)
class Preprocess:
    """Geometry and grey values of the network's input."""

    size: int | None = None
    """Height and width in pixels; None = that of the images, which must then all be squares of one size."""
    fit: Literal["letterbox", "crop", "stretch"] = "letterbox"
    """How an image that is no square becomes one: black borders, its middle part, or changed proportions."""
    channels: Literal[1, 3] = 1
    """1 = grey, 3 = RGB."""
    window: tuple[float, float] | None = None
    """DICOM and NIfTI: (center, width) of the shown values; None = the file's own, else smallest to largest value."""
    normalisation: Literal["image", "dataset", "none"] = "dataset"
    """Mean 0 and standard deviation 1 for each image, for the training set as a whole, or values left in [0, 1]."""
    mean: tuple[float, ...] | None = None
    """Of each channel, values in [0, 1], for normalisation = dataset; None = measured on the training split."""
    std: tuple[float, ...] | None = None
    """Of each channel, like mean."""

    def __post_init__(self) -> None:
        if self.size is not None:
            check_range("preprocess.size", self.size, 8)
        check_choice("preprocess.fit", self.fit, ("letterbox", "crop", "stretch"))
        check_choice("preprocess.normalisation", self.normalisation, ("image", "dataset", "none"))
        if self.channels not in (1, 3):
            raise UserError(f"preprocess.channels must be 1 or 3, got {self.channels}")
        if self.window is not None:
            check_range("preprocess.window: width", self.window[1], 0, low_open=True)
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None and len(numbers) != self.channels:
                raise UserError(f"preprocess.{name} must have {self.channels} numbers, got {len(numbers)}")
        if self.std is not None:
            check_range("preprocess.std", min(self.std), 0, low_open=True)

    def to_array(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W) or (H, W, 3) uint8 or uint16 -> (size, size, channels) of the same dtype.

        Resampling is bilinear and antialiased.
        """
        planes = self._fit(_planes(pixels, self.channels), _resize)
        return np.repeat(planes, self.channels, axis=2) if planes.shape[2] < self.channels else planes

    def to_region(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) bool, a part of an image -> (size, size) bool, the same part of what `to_array` makes of that image.

        Nearest neighbour: a part smaller than a pixel of the result may vanish.
        """
        return self._fit(mask[..., None], _nearest)[..., 0]

    def _fit(self, planes: np.ndarray, resize: Callable[[np.ndarray, int, int], np.ndarray]) -> np.ndarray:
        """(H, W, C) -> (size, size, C) as `fit` says."""
        if self.size is None or planes.shape[:2] == (self.size, self.size):
            return planes
        if self.fit == "crop":
            planes = _square_middle(planes)
        height, width = planes.shape[:2]
        scale = self.size / max(height, width)
        target = (self.size, self.size)
        if self.fit == "letterbox":
            target = (max(1, round(height * scale)), max(1, round(width * scale)))
        resized = resize(planes, *target)
        top, left = (self.size - target[0]) // 2, (self.size - target[1]) // 2
        out = np.zeros((self.size, self.size, planes.shape[2]), planes.dtype)
        out[top : top + target[0], left : left + target[1]] = resized
        return out

    def normalise(self, image: "Tensor") -> "Tensor":
        """(B, C, H, W) float in [0, 1] -> the same shape and dtype, as `normalisation` says.

        Raises UserError when the training set's mean and std are needed and not there.
        """
        if self.normalisation == "none":
            return image
        if self.normalisation == "image":
            std, mean = image.flatten(1).std(1, correction=0), image.flatten(1).mean(1)
            return (image - mean[:, None, None, None]) / (std[:, None, None, None] + 1e-5)
        if self.mean is None or self.std is None:
            raise UserError("preprocess.normalisation = dataset needs preprocess.mean and preprocess.std")
        mean, std = (image.new_tensor(numbers)[:, None, None] for numbers in (self.mean, self.std))
        return (image - mean) / std


def _planes(pixels: np.ndarray, channels: int) -> np.ndarray:
    """(H, W) or (H, W, 3) -> (H, W, 1 or 3): those that differ. RGB becomes its luminance where one is wanted."""
    if pixels.ndim == 3 and channels == 1:
        return np.round(pixels @ _LUMINANCE).astype(pixels.dtype)[..., None]
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _square_middle(planes: np.ndarray) -> np.ndarray:
    height, width = planes.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return planes[top : top + side, left : left + side]


def _resize(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    def one(plane: np.ndarray) -> np.ndarray:
        image = Image.fromarray(plane).convert("F")  # without a copy of its own where the rows are contiguous
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))

    resized = np.stack([one(planes[..., c]) for c in range(planes.shape[2])], axis=2)
    return np.round(resized).clip(0, np.iinfo(planes.dtype).max).astype(planes.dtype)


def _nearest(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    def middles(old: int, new: int) -> np.ndarray:
        return ((np.arange(new) + 0.5) * old / new).astype(int)

    return planes[middles(planes.shape[0], height)[:, None], middles(planes.shape[1], width)]
