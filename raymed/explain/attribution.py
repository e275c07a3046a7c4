"""Which pixels a score rests on, by any network: integrated gradients and occlusion, and the deletion test of a map.

    steps = occlusion(score, image)          nothing has been computed yet
    heat_map = result(steps)                 all of it, here and now

All of them compare the image with the same without a part, and to take a pixel away is to give it the image's mean (of
its channel), as RISE's deletion does: black may be news to a network, and of a blurred part much is still to be seen.
They take the image as the network's first layer does, normalised: of a raw image that is normalised by its own mean and
deviation, every pixel would change with the one that is taken away.

Each is a generator of `Steps`, none of which takes more than one batch, so that somebody who shares a device with
others can let them in between, or stop.

M. Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017 (integrated gradients); M. D. Zeiler and
R. Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 (occlusion); V. Petsiuk et al., "RISE",
BMVC 2018 (deletion); W. Samek et al., "Evaluating the Visualization of What a Deep Neural Network Has Learned", IEEE
TNNLS 2017 (regions in place of pixels).
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work in steps, which ends with a T."""
Score = Callable[[Tensor], Tensor]
"""Images (B, C, H, W), normalised -> (B,), each of its own image alone."""

NODES = 32
"""Of integrated gradients: so many gradients. Their sum is off by less than 1 % of its parts, with ReLU too."""
PARTS = 7
"""An occluding square is 1/7 as wide as the image, and moves by half of that: at most `SQUARES` places."""
SQUARES = (2 * PARTS - 1) ** 2
TILES = 14
"""The deletion test cuts an image into 14 x 14 tiles, fewer where it is smaller."""
ORDERS = 8
"""Random orders that the deletion test compares with."""
_PIXELS = 2**18  # of a batch: five images of 224 pixels


def result(steps: Steps[T]) -> T:
    """What work in steps ends with, done at once."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def integrated_gradients(score: Score, image: Tensor, nodes: int = NODES) -> Steps[Tensor]:
    """What each pixel adds to the score of an image, compared with an image of its mean.

    (x - x') times the mean gradient on the straight line from x' to x, by Gauss-Legendre quadrature, summed over
    channels. The sum over all pixels is score(x) - score(x'), up to the quadrature's error.

    Args:
        score: has gradients. image: (C, H, W).

    Returns:
        (H, W) float32.
    """
    baseline = mean_image(image)
    places, weights = (torch.from_numpy(found).to(image) / 2 for found in np.polynomial.legendre.leggauss(nodes))
    gradient = torch.zeros_like(image)
    for part in _parts(nodes, image):
        yield
        gradient += _weighted_gradient(score, image, baseline, 0.5 + places[part], weights[part])
    return ((image - baseline) * gradient).sum(0).float()


def occlusion(score: Score, image: Tensor) -> Steps[Tensor]:
    """How much the score of an image falls where a square of it is taken away: at each pixel the mean over the squares
    that hold it.

    Args:
        image: (C, H, W).

    Returns:
        (H, W) float32.
    """
    height, width = image.shape[1:]
    side = -(-max(height, width) // PARTS)
    squares = [
        np.s_[top : top + side, left : left + side] for top in _starts(height, side) for left in _starts(width, side)
    ]
    total, count, fill = torch.zeros(height, width), torch.zeros(height, width), mean_image(image)
    whole = _scores(score, image[None])[0]
    for part in _parts(len(squares), image):
        yield
        taken = torch.zeros(part.stop - part.start, height, width, dtype=torch.bool, device=image.device)
        for mask, square in zip(taken, squares[part], strict=True):
            mask[square] = True
        falls = whole - _scores(score, torch.where(taken[:, None], fill, image))
        for fall, square in zip(falls, squares[part], strict=True):
            total[square] += fall
            count[square] += 1
    return total / count


@dataclass(frozen=True)
class Deletion:
    """How a probability falls as an image is taken away tile by tile."""

    taken: list[float]
    """Fractions of the tiles, from 0 to 1."""
    informed_curve: list[float]
    """Probabilities, the highest tiles of the map being taken first."""
    random_curve: list[float]
    """In random order, the mean of several."""

    @property
    def informed(self) -> float:
        """Area under the curve."""
        return float(np.trapezoid(self.informed_curve, self.taken))

    @property
    def random(self) -> float:
        """Area under the curve."""
        return float(np.trapezoid(self.random_curve, self.taken))

    @property
    def difference(self) -> float:
        """random - informed: above 0 where the map shows what the probability rests on, 0 for one that knows nothing.

        The area alone also says how well a network stands the loss of any part, which networks differ in.
        """
        return self.random - self.informed


def deletion(probability: Score, image: Tensor, heat_map: Tensor, seed: int = 0) -> Steps[Deletion]:
    """Take an image away tile by tile, by the map and at random.

    Both take whole tiles, of which a map's mean decides: single pixels at random would be noise in every place, which
    disturbs a network by itself, and not what a map's connected parts are to be compared with. Tiles that are equally
    high come at random.

    Args:
        probability: of the class that the map explains. image: (C, H, W). heat_map: (H, W), on the CPU. seed: of the
            random orders.
    """
    tiles = _tiles(*image.shape[1:])
    num, random = int(tiles.max()) + 1, np.random.default_rng(seed)
    summed = np.bincount(tiles.ravel(), heat_map.numpy().ravel())
    orders = [np.lexsort((random.permutation(num), -summed / np.bincount(tiles.ravel())))]
    orders += [random.permutation(num) for _ in range(ORDERS)]
    taken = np.unique(np.linspace(0, num, TILES + 1).round().astype(int))
    curves = np.empty((len(orders), len(taken)))
    for curve, order in zip(curves, orders, strict=True):
        rank = torch.from_numpy(np.argsort(order)[tiles]).to(image.device)
        for part in _parts(len(taken), image):
            yield
            curve[part] = _scores(probability, _without(image, rank, taken[part])).double().numpy()
    return Deletion((taken / num).tolist(), curves[0].tolist(), curves[1:].mean(axis=0).tolist())


def smooth(values: Tensor) -> Tensor:
    """(H, W) -> (H, W): the mean over the 3 x 3 pixels around each of a map of 64 pixels, 7 x 7 of one of 224. Single
    pixels can hardly be seen."""
    side = 2 * (min(values.shape) // 64) + 1
    return F.avg_pool2d(values[None], side, 1, side // 2, count_include_pad=False)[0]


def mean_image(image: Tensor) -> Tensor:
    """(C, H, W) -> (C, H, W), every pixel of each channel its mean."""
    return image.mean((1, 2), keepdim=True).expand_as(image)


@torch.inference_mode()
def _scores(score: Score, images: Tensor) -> Tensor:
    return score(images).float().cpu()


def _weighted_gradient(score: Score, image: Tensor, baseline: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Of a few points on the line from the baseline, summed."""
    with torch.inference_mode(False), torch.enable_grad():
        points = torch.lerp(baseline, image, places[:, None, None, None]).requires_grad_()
        (gradients,) = torch.autograd.grad(score(points).sum(), points)
    return torch.tensordot(weights, gradients, 1)


def _without(image: Tensor, rank: Tensor, taken: np.ndarray) -> Tensor:
    """(B, C, H, W): the image without its first tiles, for each of the B numbers of them."""
    first = torch.from_numpy(taken).to(image.device)[:, None, None, None]
    return torch.where(rank < first, mean_image(image), image)


def _parts(num: int, image: Tensor) -> Iterator[slice]:
    """0 to num in batches that a small device can hold."""
    most = max(1, min(32, _PIXELS // image[0].numel()))
    return (slice(start, min(num, start + most)) for start in range(0, num, most))


def _starts(length: int, side: int) -> list[int]:
    """Of squares that move by half their side and cover all."""
    last = max(0, length - side)
    return [*range(0, last, -(-side // 2)), last]


def _tiles(height: int, width: int) -> np.ndarray:
    """(H, W) int64: number, from 0, of the tile of each pixel."""
    rows, columns = (np.arange(length) * min(TILES, length) // length for length in (height, width))
    return rows[:, None] * (columns[-1] + 1) + columns
