"""Digital phantoms: drawn X-rays with a known truth, so that every job runs with no download.

`write_hsg` draws hysterosalpingograms (HSG). Contrast medium fills the uterine cavity through a balloon catheter and
runs into both tubes. It spills from the far (fimbrial) end of a patent tube; an occluded tube ends early or in a
dilated sac (hydrosalpinx), and nothing spills. What attenuates is bright, as on a radiograph: bone, contrast medium.

    anatomy (patient) -> attenuation -> photons -> blur, noise, window -> uint8

Exposure and window are drawn at random, one large plume faces two small ones, and bowel gas, bowel contents with old
contrast and phleboliths lie anywhere: neither brightness nor a linear model on pixels tells the classes apart.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator, default_rng

from raymed.config import check_choice, check_range
from raymed.data.phantom_folder import drawn_once

VIEWS = ("early", "late")
SIDES = ("left", "right")

_VERSION = 2  # counts up when the same parameters give another set
_AROUND_TUBE, _AROUND_END = 0.08, 0.2  # how far the finding reaches, in body coordinates


@dataclass(frozen=True)
class _Tube:
    """A tube from the cornu to its fimbrial end, in body coordinates (x to the image's right, y down, uterus at 0)."""

    path: np.ndarray  # (P, 2)
    radius: np.ndarray  # (P,)
    spill: np.ndarray  # (S, 3): x, y, radius of the soft balls that make up the plume; no rows where occluded
    end: np.ndarray  # (2,): where the plume starts, or would
    blocked: np.ndarray  # (Q, 2): the course from the block, or the sac, to the fimbrial end; no rows where patent


@dataclass(frozen=True)
class _Anatomy:
    tubes: tuple[_Tube, _Tube]  # left, right
    cavity: dict[str, float]
    bones: dict[str, float]
    blobs: np.ndarray  # (N, 6): x, y, half axes a and b, angle, attenuation (negative: gas)
    texture: np.ndarray  # (T, T) cloud, mean 0 and standard deviation 1, tiles of 3 x 3


def hsg(
    patient: int, view: str = "early", side: str = "none", *, seed: int = 0, size: int = 96
) -> tuple[np.ndarray, dict[str, tuple[float, float]], tuple[float, ...] | None]:
    """One image of one patient.

    Args:
        patient: number >= 0 of the patient; with `seed` it fixes the anatomy.
        view: "early" or "late". The same anatomy in another pose, exposure and noise; by the late view the uterus has
            begun to empty and the spill has spread.
        side: the occluded side, "left", "right" (halves of the IMAGE; the patient's right is on the image's left) or
            "none". Never both, so that the side of an occlusion is always one answer.

    Returns:
        image (size, size) uint8, and {"left": (x, y), "right": (x, y)}: the pixel where each tube's fimbrial end lies,
        that is where a plume starts if the tube is patent. The same points are returned for an occluded tube. Last,
        the box (x0, y0, x1, y1) of the finding, in pixels from the top left corner of the image, or None: the tube from
        its block or sac to its fimbrial end, and the surroundings of that end, where nothing spills.
    """
    check_choice("view", view, VIEWS)
    check_choice("side", side, (*SIDES, "none"))
    check_range("size", size, 32)
    anatomy = _draw_anatomy(_rng(seed, patient, "anatomy"), side)
    rng = _rng(seed, patient, view)
    angle, scale, shift = rng.uniform(-0.25, 0.25), rng.uniform(1.0, 1.2), rng.uniform(-0.07, 0.07, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    pixels = np.stack(np.meshgrid(axis, axis), -1)
    body = ((pixels - shift) @ turn / scale).reshape(-1, 2)
    attenuation = _attenuation(anatomy, body, view, rng, pixel=2 / size).reshape(size, size)

    def in_image(points: np.ndarray) -> np.ndarray:
        return ((points * scale) @ turn.T + shift + 1) * size / 2

    ends = {s: in_image(tube.end) - 0.5 for s, tube in zip(SIDES, anatomy.tubes, strict=True)}
    box = None
    if side != "none":
        tube = anatomy.tubes[SIDES.index(side)]
        reach = np.append(np.full(len(tube.blocked), _AROUND_TUBE), _AROUND_END) * scale * size / 2
        box = _enclose(in_image(np.vstack([tube.blocked, tube.end])), reach[:, None], size)
    return _expose(attenuation, pixels, rng), {s: (float(x), float(y)) for s, (x, y) in ends.items()}, box


def _enclose(points: np.ndarray, reach: np.ndarray, size: int) -> tuple[float, ...]:
    """The box around discs at the points (Q, 2) with radii (Q, 1), within the image."""
    corners = np.concatenate([(points - reach).min(0), (points + reach).max(0)])
    return tuple(corners.clip(0, size).round(1).tolist())


def write_hsg(folder: Path, num_patients: int = 240, seed: int = 0, size: int = 96, prevalence: float = 0.25) -> Path:
    """Write a set of HSG phantoms; two images a patient. Returns the path of its manifest.csv.

    Columns: patient, case, view (early, late), label ("occluded" or "patent", the same for both images of a patient),
    side (of the occlusion, in image coordinates: left, right, none), image (path relative to the manifest), box (of the
    occlusion, empty where patent, see `hsg`), and left_x, left_y, right_x, right_y (pixel of each fimbrial end, see
    `hsg`). round(prevalence * num_patients) patients are occluded, on exactly one side, half of them left.

    The same arguments give the same bytes. A complete folder of the same arguments is kept as it is; one that is only
    half there, or was written by another version of this module, is written again.

    Raises:
        UserError: an argument is out of range, or the folder holds something else.
    """
    check_range("num_patients", num_patients, 1)
    check_range("prevalence", prevalence, 0, 1)
    check_range("seed", seed, 0)
    parameters = {"num_patients": num_patients, "seed": seed, "size": size, "prevalence": float(prevalence)}
    parameters |= {"version": _VERSION}
    num_images = num_patients * len(VIEWS)
    return drawn_once(folder, parameters, num_images, lambda unfinished: _write(unfinished, parameters))


def _rng(seed: int, patient: int, purpose: str) -> Generator:
    # From 1: numpy's seed sequences ignore trailing zeros.
    return default_rng([seed, patient, 1 + ("anatomy", *VIEWS, "sides").index(purpose)])


def _write(folder: Path, parameters: dict) -> None:
    import pandas as pd
    from PIL import Image

    num_patients, seed, size = (parameters[name] for name in ("num_patients", "seed", "size"))
    rows = []
    for patient, side in enumerate(_sides(num_patients, seed, parameters["prevalence"])):
        for view in VIEWS:
            image, ends, box = hsg(patient, view, side, seed=seed, size=size)
            name = f"images/P{patient:04d}_{view}.png"
            Image.fromarray(image).save(folder / name)
            label = "patent" if side == "none" else "occluded"
            row = {"patient": f"P{patient:04d}", "case": f"C{patient:04d}", "view": view, "label": label, "side": side}
            points = {f"{s}_{axis}": round(value, 2) for s in SIDES for axis, value in zip("xy", ends[s], strict=True)}
            rows.append(row | {"image": name, "box": " ".join(map(str, box or ()))} | points)
    pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)


def _sides(num_patients: int, seed: int, prevalence: float) -> list[str]:
    num_occluded = round(prevalence * num_patients)
    sides = [SIDES[i % 2] for i in range(num_occluded)] + ["none"] * (num_patients - num_occluded)
    return [sides[i] for i in _rng(seed, 0, "sides").permutation(num_patients)]


def _draw_anatomy(rng: Generator, side: str) -> _Anatomy:
    """Every number is drawn whatever the side, so that one patient with another side differs by the occlusion alone."""
    cavity = {
        "half_width": rng.uniform(0.15, 0.22),
        "top": rng.uniform(-0.22, -0.12),
        "bottom": rng.uniform(0.2, 0.3),
        "fundus": rng.uniform(-0.05, 0.06),
        "waist": rng.uniform(0.9, 1.7),
        "depth": rng.uniform(0.7, 1.1),
        "balloon": rng.uniform(0.03, 0.05),
        "catheter_bend": rng.uniform(-0.25, 0.25),
        "leak": rng.uniform(0, 0.5) * rng.integers(0, 2),
    }
    bones = {
        "width": rng.uniform(0.92, 1.1),
        "sacrum": rng.uniform(0.25, 0.6),
        "ilium": rng.uniform(0.2, 0.5),
        "pubis": rng.uniform(0.2, 0.5),
        "brim": rng.uniform(0.75, 0.9),
    }
    texture = _cloud(rng)
    volume = np.exp(rng.uniform(np.log(1.0), np.log(1.9)))
    share = rng.uniform(0.36, 0.64)
    # What cannot leave by one tube leaves by the other, three quarters of it.
    volumes = {"none": (volume * share, volume * (1 - share)), "left": (0, 0.75 * volume), "right": (0.75 * volume, 0)}
    cornu = np.array([cavity["half_width"], cavity["top"] + cavity["fundus"] + 0.01])
    left, right = (_draw_tube(rng, cornu, spilled) for spilled in volumes[side])
    mirror = [-1, 1]
    left = _Tube(left.path * mirror, left.radius, left.spill * [-1, 1, 1], left.end * mirror, left.blocked * mirror)
    return _Anatomy((left, right), cavity, bones, _draw_blobs(rng, (left.end, right.end)), texture)


def _draw_tube(rng: Generator, cornu: np.ndarray, volume: float) -> _Tube:
    """The tube on the right of the image; `volume` of what spills, 0 for an occluded one."""
    t = np.linspace(0, 1, 56)
    path = _draw_path(rng, t, cornu)
    radius = np.interp(t, [0, 0.45, 0.8, 1], [0.011, 0.012, rng.uniform(0.018, 0.03), rng.uniform(0.016, 0.026)])
    spill = _draw_spill(rng, path[-1], volume)
    cut, has_sac = rng.uniform(0.25, 0.85), rng.random() < 0.45
    sac, sac_start, tip = rng.uniform(0.05, 0.085), rng.uniform(0.35, 0.6), rng.uniform(0.032, 0.052)
    if volume > 0:
        return _Tube(path, radius, spill, path[-1], path[:0])
    if has_sac:  # blocked at its far end and dilated: hydrosalpinx
        radius = radius + sac * np.sin(np.pi * np.clip((t - sac_start) / (1.08 - sac_start), 0, 1)) ** 0.8
        return _Tube(path, radius, spill[:0], path[-1], path[t >= sac_start])
    filled = t <= cut  # blocked on the way, with a club-shaped tip
    club = tip * np.clip(1 - (cut - t[filled]) / 0.2, 0, 1) ** 0.7
    return _Tube(path[filled], radius[filled] + club, spill[:0], path[-1], path[~filled])


def _draw_path(rng: Generator, t: np.ndarray, cornu: np.ndarray) -> np.ndarray:
    """A Bezier curve from the cornu up, out and down to the ovary, winding most in the middle."""
    end = np.array([rng.uniform(0.48, 0.66), rng.uniform(-0.12, 0.3)])
    rise = cornu + [rng.uniform(0.1, 0.2), rng.uniform(-0.2, 0.05)]
    fall = end + [rng.uniform(-0.05, 0.15), rng.uniform(-0.4, -0.1)]
    bernstein = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
    path = bernstein @ np.stack([cornu, rise, fall, end])
    normal = np.gradient(path, axis=0)[:, ::-1] * [-1, 1]
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    turns, gain, phase = rng.uniform([1.5, 3.5], [3, 5.5]), rng.uniform(0.3, 1, 2), rng.uniform(0, 1, 2)
    winding = np.sin(2 * np.pi * (t[:, None] * turns + phase)) @ gain
    return path + normal * (0.035 * winding * np.sin(np.pi * t))[:, None]


def _draw_spill(rng: Generator, end: np.ndarray, volume: float) -> np.ndarray:
    """A random walk of soft balls, down and towards the middle; its area grows with the volume."""
    num_balls = 14
    heading = rng.uniform(0.1, 0.8) * np.pi + np.cumsum(rng.normal(0, 0.9, num_balls))
    steps = np.stack([np.cos(heading), np.sin(heading)], 1) * rng.uniform(0.04, 0.1, (num_balls, 1)) * np.sqrt(volume)
    steps[0] = 0
    radius = rng.uniform(0.025, 0.055, num_balls) * np.sqrt(volume)
    radius[0] = 0.055 * volume**0.25
    return np.column_stack([end + np.cumsum(steps, 0), radius])


def _draw_blobs(rng: Generator, ends: tuple[np.ndarray, ...]) -> np.ndarray:
    """Bowel gas, bowel contents with old contrast, phleboliths; away from the fimbrial ends, whose truth is stated."""
    gas, contents, phleboliths = rng.integers(2, 7), rng.integers(0, 4), rng.integers(0, 4)
    kinds = [(gas, 0.05, 0.14, -0.3, -0.12), (contents, 0.04, 0.11, 0.15, 0.45), (phleboliths, 0.012, 0.02, 0.4, 0.9)]
    limits = [(n, [-0.95, -0.95, a, a, 0, low], [0.95, 0.95, b, b, np.pi, high]) for n, a, b, low, high in kinds]
    blobs = np.concatenate([rng.uniform(low, high, (n, 6)) for n, low, high in limits])
    distance = np.linalg.norm(blobs[:, None, :2] - np.stack(ends), axis=-1).min(1)
    return blobs[distance > 0.2 + blobs[:, 2:4].max(1)]


def _cloud(rng: Generator, size: int = 64) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    octaves = [s**1.6 * gaussian_filter(rng.normal(size=(size, size)), s, mode="wrap") for s in (1, 2, 4, 8)]
    cloud = np.sum(octaves, 0)
    return (cloud - cloud.mean()) / cloud.std()


def _attenuation(anatomy: _Anatomy, body: np.ndarray, view: str, rng: Generator, pixel: float) -> np.ndarray:
    """Line integrals of attenuation at points `body` (N, 2)."""
    from scipy.ndimage import map_coordinates

    x, y = body.T
    at = np.stack([y, x]) / 3 * len(anatomy.texture)
    cloud = map_coordinates(anatomy.texture, at, order=1, mode="grid-wrap")
    streaks = map_coordinates(anatomy.texture, at * [[3], [1.5]], order=1, mode="grid-wrap")
    late = view == "late"
    filling = rng.uniform(0.45, 0.9) if late else rng.uniform(0.8, 1.1)
    spread, density = rng.uniform([1.1, 0.35], [1.35, 0.55]) if late else rng.uniform([0.8, 0.4], [1.0, 0.65])
    tissue = 1.2 - 0.25 * (x**2 + (0.8 * y) ** 2) + 0.06 * cloud
    contrast = _cavity(anatomy.cavity, x, y, pixel)
    spill = np.zeros_like(x)
    for tube in anatomy.tubes:
        contrast = np.maximum(contrast, _strand(tube.path, tube.radius, body, pixel, gain=26))
        spill += _plume(tube.spill, body, cloud, streaks, spread)
    return tissue + _bones(anatomy.bones, x, y) + _blobs(anatomy.blobs, x, y) + filling * contrast + density * spill


def _cavity(p: dict[str, float], x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """Uterine cavity (a triangle on its tip), cervical canal, catheter with its balloon, leak into the vagina."""
    depth = np.clip((y - p["top"]) / (p["bottom"] - p["top"]), 0, 1)
    half_width = 0.022 + (p["half_width"] - 0.022) * (1 - depth) ** p["waist"]
    roof = p["top"] + p["fundus"] * (x / p["half_width"]) ** 2
    inside = np.minimum(half_width - np.abs(x), np.minimum(y - roof, p["bottom"] + 0.12 - y))
    cavity = p["depth"] * _soft(inside / (0.7 * pixel + 0.02)) * (0.8 + 0.2 * depth)
    balloon_y = p["bottom"] - 0.02
    distance = np.hypot(x, y - balloon_y)
    balloon = _soft((p["balloon"] - distance) / pixel)
    ring = np.exp(-(((distance - p["balloon"]) / (0.7 * pixel)) ** 2))
    t = np.linspace(0, 1, 64)
    line = np.stack([p["catheter_bend"] * t**2, balloon_y + t * 1.2], 1)
    catheter = _strand(line, np.full(64, 0.014), np.stack([x, y], 1), pixel, gain=28)
    leak = p["leak"] * np.exp(-((x / 0.1) ** 2) - ((y - p["bottom"] - 0.25) / 0.1) ** 2)
    return np.maximum(cavity * (1 - 0.75 * balloon) + 0.2 * ring, catheter) + leak


def _strand(path: np.ndarray, radius: np.ndarray, body: np.ndarray, pixel: float, gain: float) -> np.ndarray:
    """A filled tube: attenuation grows with its thickness, which saturates at 1.4; no thinner than a pixel shows."""
    reach = radius**2 + (0.45 * pixel) ** 2
    squared = _squared_distance(body, path) / np.float32(reach)
    nearest = squared.argmin(1)
    thickness = np.minimum(gain * radius**2 / np.sqrt(reach), 1.4)
    return thickness[nearest] * np.exp(-(squared[np.arange(len(body)), nearest] ** 2))


def _plume(spill: np.ndarray, body: np.ndarray, cloud: np.ndarray, streaks: np.ndarray, spread: float) -> np.ndarray:
    """Free contrast medium between the bowel loops: streaky, with a ragged edge."""
    squared = _squared_distance(body, spill[:, :2]) / np.float32(2 * (spread * spill[:, 2]) ** 2)
    field = np.exp(-squared).sum(1)
    ragged = _soft((field * (1 + 0.45 * np.maximum(cloud, -1)) - 0.55) * 1.6) * np.minimum(field / 0.3, 1)
    return ragged * (0.7 + 0.4 * np.tanh(streaks))


def _squared_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, 2), (M, 2) -> (N, M) float32, the precision that speed asks for."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    return (a[:, :1] - b[:, 0]) ** 2 + (a[:, 1:] - b[:, 1]) ** 2


def _bones(p: dict[str, float], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sacrum (top middle), iliac wings (top corners), hips, pelvic brim and pubic rami (bottom)."""
    column = ((np.abs(x) - 0.13) / 0.045) ** 2
    foramina = sum(np.exp(-column - ((y - row) / 0.035) ** 2) for row in (-0.85, -0.62, -0.4))
    sacrum = _soft((0.25 + 0.2 * (-0.6 - y) - np.abs(x)) / 0.1) * _soft((-0.3 - y) / 0.15) * (1 - 0.4 * foramina)
    wing = np.hypot((np.abs(x) - 1.15 * p["width"]) / 0.6, (y + 0.7) / 0.65)
    ilium = p["ilium"] * _soft((1 - wing) / 0.12)
    hip = 0.7 * p["ilium"] * _soft((0.27 - np.hypot(np.abs(x) - 1.02 * p["width"], y - 0.55)) / 0.05)
    rim = np.hypot(x / p["width"], (y - 0.02) / 0.95) - p["brim"]
    thickness = np.interp(y, [-0.2, 0.3, 0.8], [0.04, 0.06, 0.12])
    symphysis = 1 - np.exp(-((x / 0.025) ** 2))
    brim = p["pubis"] * _soft(rim / 0.03) * np.exp(-np.maximum(rim, 0) / thickness) * _soft((y + 0.1) / 0.3) * symphysis
    return p["sacrum"] * sacrum + ilium + hip + brim


def _blobs(blobs: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    total = np.zeros_like(x)
    for cx, cy, a, b, angle, value in blobs:
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        total += value * np.exp(-(((u / a) ** 2 + (v / b) ** 2) ** 2))
    return total


def _soft(signed: np.ndarray) -> np.ndarray:
    """0 well outside, 1 well inside, smooth at the border (signed = 0)."""
    return 0.5 + 0.5 * np.tanh(2 * signed)


def _expose(attenuation: np.ndarray, pixels: np.ndarray, rng: Generator) -> np.ndarray:
    """Photons, detector blur, quantum and line noise, window, collimator: (size, size) uint8."""
    from scipy.ndimage import gaussian_filter

    photons, scatter = np.exp(rng.uniform(np.log(700), np.log(3000))), rng.uniform(0.1, 0.3)
    sharpness, drift = rng.uniform(0.4, 0.7), 0.12 * (pixels @ rng.normal(0, 1, 2))
    center, width, gamma = rng.normal(1.3, 0.12), rng.uniform(1.7, 2.6), rng.uniform(0.8, 1.25)
    field = _collimator(pixels, rng)
    # Noise is drawn last: another size is the same picture at another resolution.
    primary = photons * np.exp(-attenuation)
    counts = gaussian_filter(primary, sharpness) + scatter * gaussian_filter(primary, len(attenuation) / 10)
    # Poisson noise of large counts. Unlike rng.poisson, a last-digit difference between processors stays one.
    counts = np.maximum(counts + np.sqrt(counts) * rng.normal(size=counts.shape), 1)
    signal = -np.log(gaussian_filter(counts, 0.45) / photons)
    lines = rng.normal(0, 0.012, (len(signal), 1)) + rng.normal(0, 0.006, (1, len(signal)))
    shown = np.clip((signal + lines + drift - center) / width + 0.5, 0, 1) ** gamma
    return np.round(255 * shown * field).astype(np.uint8)


def _collimator(pixels: np.ndarray, rng: Generator) -> np.ndarray:
    """Open field: a tilted rectangle, or a disc (image intensifier)."""
    angle, opening = rng.normal(0, 0.04), rng.uniform(0.9, 1.1, 4)
    x = pixels[..., 0] * np.cos(angle) + pixels[..., 1] * np.sin(angle)
    y = pixels[..., 1] * np.cos(angle) - pixels[..., 0] * np.sin(angle)
    inside = np.minimum.reduce([opening[0] - x, opening[1] + x, opening[2] - y, opening[3] + y])
    if rng.random() < 0.3:
        inside = rng.uniform(0.98, 1.2) - np.hypot(x, y)
    return _soft(inside / 0.02)
