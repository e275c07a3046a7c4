"""Random changes of a batch of images, on the device that trains.

Every draw is a function of (seed, step, sample index, purpose): `raymed.random`. All geometry is one affine map and one
resampling. The defaults suit radiographs: small rotations and zooms, and strong changes of exposure, sharpness and
noise, without which a small network leans on fine texture.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raymed.config import check_range
from raymed.random import normal, uniform


@dataclass(frozen=True)
class Augment:
    """How strongly images are changed. 0 switches a change off.

    Called on float images (B, C, H, W) in [0, 1] with their row numbers (B,); returns the same shape, range and dtype.
    """

    rotate: float = 15.0
    """Largest rotation in degrees, drawn from [-rotate, rotate]."""
    scale: float = 0.2
    """Zoom drawn log-uniformly from [1 / (1 + scale), 1 + scale]."""
    aspect: float = 0.0
    """Stretch of width against height, drawn log-uniformly from [1 / (1 + aspect), 1 + aspect]."""
    shear: float = 0.0
    """Largest horizontal shear, as a fraction of the height."""
    translate: float = 0.1
    """Largest shift in each direction, as a fraction of the image's size."""
    flip: float = 0.5
    """Probability of a left-right mirror image."""
    brightness: float = 0.2
    """Largest amount added to all pixels."""
    contrast: float = 0.5
    """Factor about the image's mean, drawn log-uniformly from [1 / (1 + contrast), 1 + contrast]."""
    gamma: float = 0.7
    """Exponent of the pixel values, drawn log-uniformly from [1 / (1 + gamma), 1 + gamma]."""
    sharpness: float = 0.8
    """Largest weight of (image - blurred image) that is added (sharper) or subtracted (blurred, at 1 fully)."""
    noise: float = 0.05
    """Largest standard deviation of Gaussian noise; each image draws its own from [0, noise]."""
    erase: float = 0.0
    """Probability of one erased rectangle (Zhong et al., "Random erasing", 2020), filled with the image's mean."""
    erase_area: float = 0.2
    """Largest area of the erased rectangle, as a fraction of the image."""

    def __post_init__(self):
        for field in ("rotate", "scale", "aspect", "shear", "translate", "brightness", "contrast", "gamma", "noise"):
            check_range(field, getattr(self, field), 0)
        for field in ("flip", "sharpness", "erase", "erase_area"):
            check_range(field, getattr(self, field), 0, 1)

    @classmethod
    def none(cls) -> "Augment":
        """Images pass unchanged."""
        return cls(**dict.fromkeys(cls.__dataclass_fields__, 0.0))

    def __call__(self, image: Tensor, index: Tensor, step: int, seed: int, purpose: str = "view0") -> Tensor:
        """Change images (B, C, H, W) whose row numbers are `index`; `purpose` tells the views of one step apart."""
        with torch.autocast(image.device.type, enabled=False):  # half-precision coordinates are off by pixels
            return self._change(image, index, step, seed, purpose)

    def _change(self, image: Tensor, index: Tensor, step: int, seed: int, purpose: str) -> Tensor:
        def draw(name: str, *shape: int) -> Tensor:
            return uniform(seed, step, index, f"{purpose}/{name}", shape)

        if self.rotate or self.scale or self.aspect or self.shear or self.translate or self.flip:
            image = self._move(image, draw("geometry", 7).to(image.dtype))
        if self.sharpness:
            image = self._sharpen(image, draw("sharpness").to(image.dtype))
        if self.brightness or self.contrast or self.gamma:
            image = self._expose(image, draw("exposure", 3).to(image.dtype))
        if self.noise:
            sigma = self.noise * draw("noise")[:, None, None, None]
            image = image + (sigma * normal(seed, step, index, f"{purpose}/noise", image.shape[1:])).to(image.dtype)
        if self.erase:
            image = self._erase(image, draw("erase", 5))
        return image.clamp(0, 1)

    def _move(self, image: Tensor, u: Tensor) -> Tensor:
        """One resampling of the affine map output -> input, in units of half the image's height."""
        height, width = image.shape[-2:]
        angle, zoom, aspect, shear, dx, dy = (2 * u[:, :6] - 1).unbind(1)
        cos, sin = torch.cos(angle * math.radians(self.rotate)), torch.sin(angle * math.radians(self.rotate))
        x_scale = _log_uniform(zoom, self.scale) * _log_uniform(aspect, self.aspect)
        y_scale = _log_uniform(zoom, self.scale) / _log_uniform(aspect, self.aspect)
        mirror = torch.where(u[:, 6] < self.flip, -1.0, 1.0).to(image.dtype)
        ratio = width / height
        # Columns of rotation @ [[x_scale, shear], [0, y_scale]]; x is in units of half the width, hence the ratio.
        a, b = cos * x_scale, cos * shear * self.shear - sin * y_scale
        c, d = sin * x_scale, sin * shear * self.shear + cos * y_scale
        top = torch.stack([a * mirror, b / ratio, 2 * self.translate * dx], dim=1)
        bottom = torch.stack([c * mirror * ratio, d, 2 * self.translate * dy], dim=1)
        grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(image.shape), align_corners=False)
        return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)

    def _sharpen(self, image: Tensor, u: Tensor) -> Tensor:
        blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
        return image + self.sharpness * (2 * u - 1)[:, None, None, None] * (image - blurred)

    def _expose(self, image: Tensor, u: Tensor) -> Tensor:
        shift, factor, exponent = (2 * u - 1)[:, :, None, None, None].unbind(1)
        image = image.clamp(0, 1) ** _log_uniform(exponent, self.gamma)
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        return mean + (image - mean) * _log_uniform(factor, self.contrast) + shift * self.brightness

    def _erase(self, image: Tensor, u: Tensor) -> Tensor:
        """A rectangle of area up to erase_area and aspect 1/3 to 3, its centre anywhere in the image."""
        height, width = image.shape[-2:]
        side = torch.sqrt(u[:, 1] * self.erase_area)
        stretch = _log_uniform(2 * u[:, 2] - 1, 3**0.5 - 1)
        rows = (torch.arange(height, device=image.device) + 0.5) / height
        columns = (torch.arange(width, device=image.device) + 0.5) / width
        inside_rows = (rows - u[:, 3, None]).abs() < (side * stretch)[:, None] / 2
        inside_columns = (columns - u[:, 4, None]).abs() < (side / stretch)[:, None] / 2
        inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
        inside = inside & (u[:, 0] < self.erase)[:, None, None, None]
        return torch.where(inside, image.mean(dim=(1, 2, 3), keepdim=True), image)


def _log_uniform(u: Tensor, strength: float) -> Tensor:
    """u in [-1, 1] -> a factor in [1 / (1 + strength), 1 + strength]."""
    return torch.exp(u * math.log1p(strength))
