"""How the images of a data set look: brightness, contrast, size, and which of them are nearly the same picture.

    look -> extremes, odd_sizes, near_duplicates

Images are measured as the network receives them, before augmentation and normalisation; sizes are those before
preprocessing.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from raymed.data.dataset import DataSet
from raymed.random import derive

_BLOCK = 64  # images at a time
_OUTLYING = 3.5  # modified z-score: Iglewicz and Hoaglin, "How to detect and handle outliers", 1993
_HASH_SIDE, _DETAIL_SIDE = 32, 64
_HASH_DISTANCE, _SIMILARITY = 10, 0.8
_MOST_COMPARED = 20_000
_PAIRS = 2000  # compared in detail at a time


@dataclass(frozen=True)
class Look:
    """How N images look. Arrays have one entry an image.

    brightness, contrast: mean and standard deviation of the grey values in [0, 1], borders of the letterbox left out.
    heights, widths: of the image before preprocessing, in pixels. hashes: uint64, perceptual: images that look alike at
    large differ in few bits.
    """

    brightness: np.ndarray
    contrast: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    hashes: np.ndarray


@dataclass(frozen=True)
class Extreme:
    """The images at one end of a scale: indices and values, the most extreme first, and how many are outlying (modified
    z-score beyond 3.5)."""

    indices: np.ndarray
    values: np.ndarray
    num_outlying: int


@dataclass(frozen=True)
class Duplicates:
    """Pairs of images of different patients that are nearly the same picture, the most alike first.

    pairs: (M, 2) indices, the smaller first. similarity: (M,), 1 = the same but for brightness and contrast.
    num_compared: how many images were compared with each other.
    """

    pairs: np.ndarray
    similarity: np.ndarray
    num_compared: int


def look(data: DataSet) -> Look:
    """Read every image once and say how it looks."""
    heights, widths = _sizes(data)
    shown = _shown_part(data, heights, widths)
    means, squares, hashes = [], [], []
    for indices in _blocks(np.arange(len(data))):
        grey = _grey(data, indices)
        means.append(grey.mean((1, 2, 3)).double().numpy())
        squares.append((grey**2).mean((1, 2, 3)).double().numpy())
        hashes.append(_hash(grey))
    brightness, square = np.concatenate(means) / shown, np.concatenate(squares) / shown
    contrast = np.sqrt(np.maximum(square - brightness**2, 0))
    return Look(brightness, contrast, heights, widths, np.concatenate(hashes))


def extremes(found: Look, num: int = 8) -> dict[str, Extreme]:
    """The `num` images at each end: "darkest", "brightest", "lowest contrast"."""
    return {
        "darkest": _lowest(found.brightness, num),
        "brightest": _lowest(found.brightness, num, sign=-1),
        "lowest contrast": _lowest(found.contrast, num),
    }


def odd_sizes(found: Look) -> np.ndarray:
    """Indices of images unlike the others in size, the oddest first: an aspect ratio more than 1.25 times the median or
    less than 1 / 1.25 of it, or a side (root of the area) more than twice the median or less than half."""
    aspect, side = np.log(found.widths / found.heights), np.log(found.widths * found.heights) / 2
    odd = np.maximum(np.abs(aspect - np.median(aspect)) / np.log(1.25), np.abs(side - np.median(side)) / np.log(2))
    indices = np.flatnonzero(odd > 1 + 1e-9)  # a side of exactly twice the median is none
    return indices[np.argsort(-odd[indices], kind="stable")]


def near_duplicates(data: DataSet, found: Look) -> Duplicates:
    """Images of different patients (of different cases or images, where no patients are known) that are nearly the same
    picture.

    Candidates have perceptual hashes that differ in at most 10 of 63 bits (Zauner, "Implementation and benchmarking of
    perceptual image hash functions", 2010). A pair is kept when the fine detail of both (64 x 64 pixels less the mean
    of their 7 x 7 neighbours) correlates by 0.8 or more: radiographs of one kind are alike at large, and in detail only
    when they are one picture. Other brightness, contrast, size and compression are seen through; what was cropped,
    turned, mirrored or covered by large text is missed. Of more than 20,000 images so many are drawn.
    """
    owners = data.patients if data.has_patients or data.cases is None else data.cases
    chosen = np.arange(len(data))
    if len(chosen) > _MOST_COMPARED:
        random = np.random.default_rng(derive(0, "near duplicates"))
        chosen = np.sort(random.choice(chosen, _MOST_COMPARED, replace=False))
    pairs = _alike_at_large(found.hashes, owners, chosen)
    similarity = _similarity(data, pairs)
    kept = np.flatnonzero(similarity >= _SIMILARITY)
    kept = kept[np.argsort(-similarity[kept], kind="stable")]
    return Duplicates(pairs[kept], similarity[kept], len(chosen))


def _blocks(indices: np.ndarray, size: int = _BLOCK) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _grey(data: DataSet, indices: np.ndarray) -> torch.Tensor:
    """(B, 1, size, size) float32 in [0, 1]: the mean of the channels."""
    return data.batch(indices).unit_image().mean(1, keepdim=True)


def _sizes(data: DataSet) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths before preprocessing, as noted beside the decoded images."""
    noted = json.loads(data.pixels_path.with_suffix(".json").read_text())["shapes"]
    shapes = np.array([noted[position] for position in data.positions], np.int64)
    return shapes[:, 0], shapes[:, 1]


def _shown_part(data: DataSet, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(N,) the fraction of the network's input that is image and not border of the letterbox."""
    if data.preprocess.fit != "letterbox" or data.preprocess.size is None:
        return np.ones(len(heights))
    longer = np.maximum(heights, widths)
    size = data.preprocess.size
    parts = [np.maximum(1, np.round(sides * size / longer)) / size for sides in (heights, widths)]
    return parts[0] * parts[1]


def _lowest(values: np.ndarray, num: int, sign: int = 1) -> Extreme:
    """The smallest values; with sign -1 the largest."""
    signed = sign * values
    order = np.argsort(signed, kind="stable")[:num]
    below = np.median(signed) - signed
    spread = np.median(np.abs(below))
    return Extreme(order, values[order], int((0.6745 * below > _OUTLYING * spread + 1e-12).sum()))


def _hash(grey: torch.Tensor) -> np.ndarray:
    """(B, 1, H, W) -> (B,) uint64: of the 8 x 8 lowest frequencies but the mean, which lie above their median."""
    from scipy.fft import dctn

    small = F.adaptive_avg_pool2d(grey, _HASH_SIDE)[:, 0].numpy()
    low = np.asarray(dctn(small, axes=(1, 2), norm="ortho"))[:, :8, :8].reshape(len(small), 64)[:, 1:]
    bits = np.zeros((len(low), 64), bool)
    bits[:, 1:] = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _alike_at_large(hashes: np.ndarray, owners: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(M, 2) pairs of chosen images of two owners whose hashes are near each other."""
    mine, of = hashes[chosen], owners[chosen]
    found = []
    for rows in _blocks(np.arange(len(chosen)), 512):
        close = np.bitwise_count(mine[rows, None] ^ mine) <= _HASH_DISTANCE
        first, second = np.nonzero(close & (of[rows, None] != of))
        pairs = np.stack([rows[first], second], axis=1)
        found.append(pairs[pairs[:, 0] < pairs[:, 1]])
    return chosen[np.concatenate(found)]


def _similarity(data: DataSet, pairs: np.ndarray) -> np.ndarray:
    """(M,) correlation of the fine detail of both images of each pair."""
    if not len(pairs):
        return np.zeros(0)
    involved, position = np.unique(pairs, return_inverse=True)
    details = torch.cat([_detail(_grey(data, indices)) for indices in _blocks(involved)])
    first, second = torch.from_numpy(position.reshape(pairs.shape)).unbind(1)
    parts = zip(first.split(_PAIRS), second.split(_PAIRS), strict=True)
    return torch.cat([(details[a].float() * details[b].float()).sum(1) for a, b in parts]).double().numpy()


def _detail(grey: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) -> (B, 64 * 64) float16 of mean 0 and norm 1: what an image has beyond its local mean."""
    small = F.adaptive_avg_pool2d(grey, _DETAIL_SIDE)
    fine = (small - F.avg_pool2d(F.pad(small, (3, 3, 3, 3), mode="reflect"), 7, stride=1)).flatten(1)
    fine = fine - fine.mean(1, keepdim=True)
    return (fine / fine.norm(dim=1, keepdim=True).clamp_min(1e-6)).half()
