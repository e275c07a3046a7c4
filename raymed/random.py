"""Random numbers that belong to the sample, not to the worker.

Counter-based: a draw is a hash of (seed, step, sample index, purpose, element) and nothing else. There is no generator
and no state, so N workers with B/N samples draw what one worker draws with B, in whatever order, on any device.

The hash is the SplitMix64 finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) in
int64 arithmetic that wraps around, one round for the sample and one for the element. Not for cryptography.
"""

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the increment of SplitMix64, as a signed 64-bit integer
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64


def derive(seed: int, *parts: int | str) -> int:
    """A seed of its own for each use, in [0, 2**63): `torch.manual_seed(derive(seed, "init", network))`."""
    digest = hashlib.sha256(repr((int(seed), *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_layers(seed: int) -> None:
    """Seed torch's generators, those of GPUs where they are in use: what stochastic layers draw from.

    `torch.manual_seed` takes a tenth of a millisecond, nearly all of it to note where it was called, for devices that
    are not in use.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def uniform(seed: int, step: int, index: Tensor, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform draws in [0, 1), the same bits on every device.

    Args:
        seed: of the run.
        step: optimiser step (or epoch): draws of different steps are independent.
        index: (B,) int64, the samples' row numbers.
        purpose: what the draw is for; different names are independent.
        shape: of one sample's draw.

    Returns:
        (B, *shape) float32 on the device of `index`, multiples of 2**-24.
    """
    return (_shift(_bits(seed, step, index, purpose, shape), 40)).float() * 2.0**-24


def normal(seed: int, step: int, index: Tensor, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal draws (B, *shape) float32; arguments as for `uniform`.

    Box-Muller in float64, rounded to float32: log and cos differ between devices and vector widths in their last bit,
    which the rounding drops.
    """
    bits = _bits(seed, step, index, purpose, shape)
    radius = torch.sqrt(-2.0 * torch.log((_shift(bits, 32).double() + 0.5) * 2.0**-32))
    angle = (bits & 0xFFFFFFFF).double() * (2.0 * math.pi * 2.0**-32)
    return (radius * torch.cos(angle)).float()


def _bits(seed: int, step: int, index: Tensor, purpose: str, shape: tuple[int, ...]) -> Tensor:
    """64 random bits for each element: (B, *shape) int64."""
    sample = _mix(derive(seed, step, purpose) + _GOLDEN * index.long())
    element = torch.arange(1, math.prod(shape) + 1, device=index.device)
    return _mix(sample[:, None] + _GOLDEN * element).reshape(len(index), *shape)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift(x, 27)) * _MULTIPLY_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical right shift: torch's >> on int64 copies the sign bit."""
    return (x >> n) & ((1 << (64 - n)) - 1)
