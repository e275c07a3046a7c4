"""Facts of a captioned phantom as a grey picture.

    organ (patient) + lesions (image) -> pose -> blur, exposure, noise -> uint8

Four organs with outlines of their own: lungs, breasts back to back, brain in its skull, uterus with its tubes. Four
kinds of lesion, all brighter than what they lie in: a nodule is a disc, a mass a star, a cyst a ring with a dark
middle, a calcification a cluster of specks. Severity is contrast. The patient's right is on the left of the picture.

Points are in body coordinates: x to the right of the picture, y down, the picture from -1 to 1.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator, default_rng

from raymed.config import check_choice, check_range
from raymed.data.captioned_facts import VALUES, Facts, Lesion

_RADIUS = {"small": 0.115, "large": 0.19}
_CONTRAST = {"mild": 0.2, "severe": 0.5}
_GAP = 0.13  # between lesions: three pixels of 48
_INSIDE = 0.8  # how much of its radius a lesion keeps from its organ's edge


def draw(facts: Facts, *, patient: int = 0, image: int = 0, seed: int = 0, size: int = 48) -> np.ndarray:
    """One picture, (size, size) uint8.

    Args:
        patient: number >= 0; with `seed` it fixes proportions and texture of the organ.
        image: number >= 0 of the patient's image; it fixes pose, exposure and noise, and where on its side a lesion
            lies. The same image with other facts differs by them alone.
    """
    check_choice("organ", facts.organ, VALUES["organ"])
    check_range("size", size, 32)
    # From 1: numpy's seed sequences ignore trailing zeros.
    anatomy, pose, places = (default_rng([seed, patient, n]) for n in (1, 2 * image + 2, 2 * image + 3))
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    x, y = _body(anatomy, pose, *np.meshgrid(axis, axis))
    pixel = 2 / size
    light = _ORGANS[facts.organ](x, y, pixel) + 0.025 * _texture(anatomy, x, y)
    for lesion in facts.lesions:
        light = light + _draw_lesion(lesion, facts.organ, places, x, y, pixel)
    return _expose(light, pose)


def _body(anatomy: Generator, pose: Generator, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the body the pixels lie."""
    width, height = anatomy.uniform(0.94, 1.03, 2) * pose.uniform(0.96, 1.03)
    angle, (dx, dy) = pose.uniform(-0.1, 0.1), pose.uniform(-0.04, 0.04, 2)
    x, y = x - dx, y - dy
    return (x * np.cos(angle) + y * np.sin(angle)) / width, (y * np.cos(angle) - x * np.sin(angle)) / height


def _depth(organ: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far inside the organ's part on the right of the picture points lie, where lesions may be; < 0 outside."""
    if organ == "lung":
        return np.minimum(0.36 * (1 - np.hypot((x - 0.46) / 0.36, y / 0.85)), -_heart(x, y))
    if organ == "breast":
        return np.minimum(0.8 * (1 - np.hypot(x / 0.82, y / 0.8)), x - 0.06)
    if organ == "brain":
        return np.minimum(0.74 * (1 - np.hypot(x / 0.74, y / 0.88)), x - 0.15)
    flank = np.interp(y, [-0.68, 0.9], [0.82, 0.3]) - x
    return np.minimum.reduce([0.95 * flank, y + 0.68, 0.9 - y, x - 0.06])


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far inside the heart; it reaches into the patient's left lung."""
    return 0.2 * (1 - np.hypot((x - 0.06) / 0.22, (y - 0.5) / 0.28))


def _draw_chest(x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """Bright trunk with two dark lungs, spine, and the heart towards the patient's left."""
    torso = _soft((0.97 - (x**4 + (0.85 * y) ** 4) ** 0.25) / pixel)
    lungs = _soft(0.36 * (1.05 - np.hypot((np.abs(x) - 0.46) / 0.36, y / 0.85)) / pixel)
    heart = 0.3 * _soft(_heart(x, y) / pixel)
    ribs = 0.03 * np.cos(20 * (y + 0.3 * x**2)) * lungs
    spine = 0.12 * _soft((0.06 - np.abs(x)) / pixel)
    return 0.04 + torso * (0.44 - 0.3 * lungs + ribs + spine) + heart * lungs


def _draw_breasts(x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """Two half discs back to back, as mammograms are hung, with a nipple each."""
    outline = np.minimum(0.85 * (1 - np.hypot(x / 0.88, y / 0.85)), np.abs(x) - 0.03)
    nipple = 0.06 - np.hypot(np.abs(x) - 0.9, y)
    return 0.04 + 0.22 * _soft(np.maximum(outline, nipple) / pixel)


def _draw_brain(x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """Bright skull, grey brain with the falx in its middle and two dark ventricles."""
    skull, inside = (_soft(a * (1 - np.hypot(x / a, y / b)) / pixel) for a, b in ((0.9, 0.99), (0.78, 0.9)))
    falx = 0.15 * _soft((0.02 - np.abs(x)) / pixel) * _soft((np.abs(y) - 0.4) / 0.05)
    ventricles = 0.22 * _soft(0.06 * (1 - np.hypot((np.abs(x) - 0.08) / 0.06, (y + 0.02) / 0.26)) / pixel)
    return 0.04 + 0.8 * (skull - inside) + inside * (0.28 + falx - ventricles)


def _draw_uterus(x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """A grey wedge with a bright seam in its middle, and a tube from each upper corner."""
    inside = _soft((_depth("uterus", np.abs(x) + 0.09, y) + 0.12) / pixel)
    seam = 0.16 * _soft((0.02 - np.abs(x)) / pixel) * _soft((0.45 - np.abs(y - 0.1)) / 0.05)
    t = np.linspace(0, 1, 24)[:, None, None]
    path = 0.78 + 0.16 * t, -0.7 - 0.2 * np.sin(2.8 * t)
    distance = np.hypot(np.abs(x) - path[0], y - path[1]).min(0)
    tubes = _soft((0.035 - distance) / pixel)
    return 0.1 + 0.24 * np.maximum(inside, tubes) + seam * inside


_ORGANS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "lung": _draw_chest,
    "breast": _draw_breasts,
    "brain": _draw_brain,
    "uterus": _draw_uterus,
}


def _draw_lesion(lesion: Lesion, organ: str, rng: Generator, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """What a group of lesions adds to the light."""
    radius = _RADIUS[lesion.size]
    mirror = -1 if lesion.side == "right" else 1
    centers, angles = _centers(organ, int(lesion.count), radius, rng), rng.uniform(0, np.pi, int(lesion.count))
    drawn = [
        _LOOKS[lesion.finding](x - mirror * cx, y - cy, radius, angle, pixel)
        for (cx, cy), angle in zip(centers, angles, strict=True)
    ]
    return _CONTRAST[lesion.severity] * np.sum(drawn, 0)


def _centers(organ: str, num: int, radius: float, rng: Generator) -> np.ndarray:
    """(num, 2) points in the organ's part on the right of the picture, with room between the lesions."""
    x, y = (grid.ravel() for grid in np.meshgrid(np.linspace(0, 1, 41), np.linspace(-1, 1, 81)))
    inside = np.stack([x, y], 1)[_depth(organ, x, y) > _INSIDE * radius]
    tries = inside[rng.integers(len(inside), size=(1000, num))]
    first, second = np.triu_indices(num, 1)
    if not len(first):
        return tries[0]
    room = np.linalg.norm(tries[:, first] - tries[:, second], axis=-1).min(1)
    fits = np.flatnonzero(room >= 2 * radius + _GAP)
    return tries[fits[0] if len(fits) else room.argmax()]


def _disc(u: np.ndarray, v: np.ndarray, radius: float, angle: float, pixel: float) -> np.ndarray:
    return _soft((radius - np.hypot(u, v)) / pixel)


def _star(u: np.ndarray, v: np.ndarray, radius: float, angle: float, pixel: float) -> np.ndarray:
    """Spikes about a small core."""
    reach = radius * (0.45 + 0.85 * np.abs(np.cos(2 * (np.arctan2(v, u) - angle))) ** 3)
    return 1.1 * _soft((reach - np.hypot(u, v)) / pixel)


def _ring(u: np.ndarray, v: np.ndarray, radius: float, angle: float, pixel: float) -> np.ndarray:
    """A thin wall, and a middle that is darker than what is around."""
    distance = np.hypot(u, v)
    wall = np.exp(-(((distance - radius) / max(0.045, 0.7 * pixel)) ** 2))
    return 1.1 * wall - 0.35 * _soft((0.7 * radius - distance) / pixel)


def _specks(u: np.ndarray, v: np.ndarray, radius: float, angle: float, pixel: float) -> np.ndarray:
    """Four bright dots at the corners of a square, in a haze that shows which belong together."""
    corners = angle + np.arange(4)[:, None, None] * np.pi / 2
    distance = np.hypot(u - 0.8 * radius * np.cos(corners), v - 0.8 * radius * np.sin(corners))
    dots = np.exp(-((distance / max(0.04, 0.8 * pixel)) ** 2)).sum(0)
    return 1.1 * dots + 0.25 * _disc(u, v, 1.15 * radius, angle, pixel)


_LOOKS = {"nodule": _disc, "mass": _star, "cyst": _ring, "calcification": _specks}


def _texture(rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Smooth noise of mean 0 and standard deviation 1 that belongs to the body."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    cloud = gaussian_filter(rng.normal(size=(48, 48)), 1.2, mode="wrap")
    at = np.stack([y, x]) * 12
    return map_coordinates((cloud - cloud.mean()) / cloud.std(), at, order=1, mode="grid-wrap")


def _expose(light: np.ndarray, rng: Generator) -> np.ndarray:
    """Blur, exposure and noise."""
    from scipy.ndimage import gaussian_filter

    gain, shift, noise = rng.uniform([0.9, -0.03, 0.015], [1.1, 0.03, 0.03])
    light = gaussian_filter(light, 0.4 * len(light) / 48) * gain + shift
    # Noise is drawn last: another size is the same picture at another resolution.
    return np.round(255 * np.clip(light + noise * rng.normal(size=light.shape), 0, 1)).astype(np.uint8)


def _soft(signed: np.ndarray) -> np.ndarray:
    """0 well outside, 1 well inside, smooth at the border (signed = 0)."""
    return 0.5 + 0.5 * np.tanh(2 * signed)
