"""Digital phantoms: drawn X-rays with a known truth, so that every job runs with no download.

`write_hsg` draws hysterosalpingograms (HSG). Contrast medium fills the uterine cavity through a balloon catheter and runs
into both tubes. It spills from the far (fimbrial) end of a patent tube; an occluded tube ends early or in a dilated sac
(hydrosalpinx), and nothing spills. Attenuating things are bright, as on a radiograph: bone, contrast medium.

    anatomy (patient) -> attenuation -> photons -> blur, noise, window -> uint8

The whole volume that spills has the same distribution in both classes (one large plume against two small ones), and
bowel gas, bowel contents, phleboliths and residual contrast lie anywhere, so that brightness says nothing.
"""

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator, default_rng

from raymed.config import UserError, check_choice, check_range

VIEWS = ("early", "late")
SIDES = ("left", "right")
SPILL_RADIUS = 0.12  # of the spill at its start, as a fraction of the image size

_VERSION = 1  # counts up when the same parameters give other images
_FILES = {"images", "manifest.csv", "phantoms.json"}


@dataclass(frozen=True)
class _Tube:
    """A tube from the cornu to its fimbrial end, in body coordinates (x to the image's right, y down, uterus at 0)."""

    path: np.ndarray  # (P, 2)
    radius: np.ndarray  # (P,)
    spill: np.ndarray  # (S, 3): x, y, radius of the soft balls that make up the plume; no rows where occluded
    end: np.ndarray  # (2,): where the plume starts, or would


@dataclass(frozen=True)
class _Anatomy:
    tubes: tuple[_Tube, _Tube]  # left, right
    cavity: dict[str, float]
    bones: dict[str, float]
    blobs: np.ndarray  # (N, 6): x, y, half axes a and b, angle, attenuation (negative: gas)
    texture: np.ndarray  # (T, T) cloud with mean 0 and standard deviation 1 over [-1.5, 1.5]^2


def hsg(
    patient: int, view: str = "early", side: str = "none", *, seed: int = 0, size: int = 96
) -> tuple[np.ndarray, dict[str, tuple[float, float]]]:
    """One image of one patient.

    Args:
        patient: number >= 0 of the patient; with `seed` it fixes the anatomy.
        view: "early" or "late". The same anatomy in another pose, exposure and noise; by the late view the uterus has
            begun to empty and the spill has spread.
        side: the occluded side, "left", "right" (halves of the IMAGE; the patient's right is on the image's left) or
            "none". Never both, so that the side of an occlusion is always one answer.

    Returns:
        image (size, size) uint8, and {"left": (x, y), "right": (x, y)}: the pixel where each tube's fimbrial end lies,
        that is where a plume starts if the tube is patent. The same points are returned for an occluded tube.
    """
    check_choice("view", view, VIEWS)
    check_choice("side", side, (*SIDES, "none"))
    check_range("size", size, 32)
    anatomy = _draw_anatomy(default_rng([seed, patient, 0]), side)
    rng = default_rng([seed, patient, 1 + VIEWS.index(view)])
    angle, scale, shift = rng.normal(0, 0.12), rng.uniform(1.0, 1.2), rng.uniform(-0.06, 0.06, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    pixels = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    body = (pixels - shift) @ turn / scale
    attenuation = _attenuation(anatomy, body, view, rng, pixel=2 / size).reshape(size, size)
    image = _expose(attenuation, pixels.reshape(size, size, 2), rng)
    ends = [(tube.end * scale) @ turn.T + shift for tube in anatomy.tubes]
    points = {name: (float((x + 1) * size / 2 - 0.5), float((y + 1) * size / 2 - 0.5)) for name, (x, y) in zip(SIDES, ends, strict=True)}
    return image, points


def write_hsg(
    folder: Path, num_patients: int = 240, seed: int = 0, size: int = 96, prevalence: float = 0.25
) -> Path:
    """Write a set of HSG phantoms; two images a patient. Returns the path of its manifest.csv.

    Columns: patient, case, view (early, late), label ("occluded" or "patent", the same for both images of a patient),
    side (of the occlusion, in image coordinates: left, right, none), image (path relative to the manifest), and
    left_x, left_y, right_x, right_y (pixel of each fimbrial end, see `hsg`). round(prevalence * num_patients) patients
    are occluded, on exactly one side, half of them left.

    The same arguments give the same bytes. A complete folder of the same arguments is kept as it is; one that is only
    half there is written again.

    Raises:
        UserError: an argument is out of range, or the folder holds something else.
    """
    check_range("num_patients", num_patients, 1)
    check_range("prevalence", prevalence, 0, 1)
    folder = Path(folder)
    parameters = {"version": _VERSION, "num_patients": num_patients, "seed": seed, "size": size, "prevalence": prevalence}
    if _is_complete(folder, parameters):
        return folder / "manifest.csv"
    _check_ours(folder, parameters)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _write(unfinished, parameters)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unfinished, folder)
    except OSError:
        # Another process may have put the same set in place first.
        if not _is_complete(folder, parameters):
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder / "manifest.csv"


def _write(folder: Path, parameters: dict) -> None:
    import pandas as pd
    from PIL import Image

    num_patients, seed, size = (parameters[name] for name in ("num_patients", "seed", "size"))
    (folder / "images").mkdir(parents=True)
    rows = []
    for patient, side in enumerate(_sides(num_patients, seed, parameters["prevalence"])):
        for view in VIEWS:
            image, ends = hsg(patient, view, side, seed=seed, size=size)
            name = f"images/P{patient:04d}_{view}.png"
            Image.fromarray(image).save(folder / name)
            points = {f"{s}_{axis}": round(value, 2) for s in SIDES for axis, value in zip("xy", ends[s], strict=True)}
            label = "patent" if side == "none" else "occluded"
            rows.append(
                {"patient": f"P{patient:04d}", "case": f"C{patient:04d}", "view": view, "label": label, "side": side}
                | {"image": name}
                | points
            )
    pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)
    (folder / "phantoms.json").write_text(json.dumps(parameters))


def _sides(num_patients: int, seed: int, prevalence: float) -> list[str]:
    num_occluded = round(prevalence * num_patients)
    sides = [SIDES[i % 2] for i in range(num_occluded)] + ["none"] * (num_patients - num_occluded)
    return [sides[i] for i in default_rng([seed, 2**32]).permutation(num_patients)]


def _is_complete(folder: Path, parameters: dict) -> bool:
    record = folder / "phantoms.json"
    if not record.is_file() or json.loads(record.read_text()) != parameters or not (folder / "manifest.csv").is_file():
        return False
    return len(list(folder.glob("images/*.png"))) == parameters["num_patients"] * len(VIEWS)


def _check_ours(folder: Path, parameters: dict) -> None:
    if not folder.exists():
        return
    record = folder / "phantoms.json"
    other = record.is_file() and json.loads(record.read_text()) != parameters
    if other or not folder.is_dir() or {entry.name for entry in folder.iterdir()} - _FILES:
        what = "phantoms of other parameters" if other else "other files"
        raise UserError(f"{folder} holds {what}; choose another folder, or delete it first")


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
    left_share = rng.uniform(0.36, 0.64)
    shares = {"none": (left_share, 1 - left_share), "left": (0.0, 0.75), "right": (0.75, 0.0)}[side]
    cornua = cavity["half_width"], cavity["top"] + cavity["fundus"] + 0.01
    tubes = tuple(
        _draw_tube(rng, sign, cornua, volume * share) for sign, share in zip((-1, 1), shares, strict=True)
    )
    return _Anatomy(tubes, cavity, bones, _draw_blobs(rng, [tube.end for tube in tubes]), texture)


def _draw_tube(rng: Generator, sign: int, cornua: tuple[float, float], volume: float) -> _Tube:
    """A winding tube; `volume` of what spills, 0 for an occluded one."""
    t = np.linspace(0, 1, 56)
    start = np.array(cornua)
    end = np.array([rng.uniform(0.48, 0.66), rng.uniform(-0.12, 0.3)])
    rise = start + [rng.uniform(0.1, 0.2), rng.uniform(-0.2, 0.05)]
    fall = end + [rng.uniform(-0.05, 0.15), rng.uniform(-0.4, -0.1)]
    weights = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
    path = weights @ np.stack([start, rise, fall, end])
    normal = np.gradient(path, axis=0)[:, ::-1] * [-1, 1]
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    winding = sum(
        rng.uniform(0.3, 1) * np.sin(2 * np.pi * (f * t + rng.uniform())) for f in (rng.uniform(1.5, 3), rng.uniform(3.5, 5.5))
    )
    path = path + normal * (winding * 0.035 * np.sin(np.pi * t))[:, None]
    radius = np.interp(t, [0, 0.45, 0.8, 1], [0.011, 0.012, rng.uniform(0.018, 0.03), rng.uniform(0.016, 0.026)])
    cut, sac, sac_start, has_sac = rng.uniform(0.25, 0.85), rng.uniform(0.065, 0.105), rng.uniform(0.35, 0.6), rng.random() < 0.6
    spill = _draw_spill(rng, end, max(volume, 1e-9))
    if volume == 0:
        spill = spill[:0]
        if has_sac:
            radius = radius + sac * np.sin(np.pi * np.clip((t - sac_start) / (1.08 - sac_start), 0, 1)) ** 0.8
        else:
            filled = t <= cut
            path, radius = path[filled], radius[filled] + 0.028 * np.clip(1 - (cut - t[filled]) / 0.12, 0, 1)
    mirror = np.array([sign, 1])
    return _Tube(path * mirror, radius, spill * [sign, 1, 1], end * mirror)


def _draw_spill(rng: Generator, end: np.ndarray, volume: float) -> np.ndarray:
    """A random walk of soft balls, down and towards the middle. Area ~ volume."""
    num_balls = 14
    heading = rng.uniform(0.1, 0.8) * np.pi + np.cumsum(rng.normal(0, 0.9, num_balls))
    steps = np.stack([np.cos(heading), np.sin(heading)], 1) * rng.uniform(0.04, 0.1, (num_balls, 1)) * np.sqrt(volume)
    steps[0] = 0
    radius = rng.uniform(0.025, 0.055, num_balls) * np.sqrt(volume)
    radius[0] = 0.055 * volume**0.25
    return np.column_stack([end + np.cumsum(steps, 0), radius])


def _draw_blobs(rng: Generator, ends: list[np.ndarray]) -> np.ndarray:
    """Bowel gas, bowel contents with old contrast, phleboliths; away from the fimbrial ends, whose truth is stated."""
    kinds = [(rng.integers(2, 7), (0.05, 0.14), (-0.3, -0.12)), (rng.integers(0, 4), (0.04, 0.11), (0.15, 0.45))]
    kinds.append((rng.integers(0, 4), (0.012, 0.02), (0.4, 0.9)))
    blobs = []
    for count, (small, large), (low, high) in kinds:
        for _ in range(count):
            x, y = rng.uniform(-0.95, 0.95, 2)
            a, b = rng.uniform(small, large, 2)
            if min(np.hypot(x - ex, y - ey) for ex, ey in ends) > 0.2 + max(a, b):
                blobs.append((x, y, a, b, rng.uniform(0, np.pi), rng.uniform(low, high)))
    return np.array(blobs).reshape(-1, 6)


def _cloud(rng: Generator, size: int = 64) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    octaves = [gaussian_filter(rng.normal(size=(size, size)), s, mode="wrap") * s**1.6 for s in (1, 2, 4, 8)]
    cloud = sum(octaves)
    return (cloud - cloud.mean()) / cloud.std()


def _attenuation(anatomy: _Anatomy, body: np.ndarray, view: str, rng: Generator, pixel: float) -> np.ndarray:
    """Line integrals of attenuation at points `body` (N, 2)."""
    from scipy.ndimage import map_coordinates

    x, y = body.T
    at = (np.stack([y, x]) + 1.5) / 3 * len(anatomy.texture)
    cloud, streaks = (map_coordinates(anatomy.texture, at * [[f], [g]], order=1, mode="grid-wrap") for f, g in ((1, 1), (3, 1.5)))
    late = view == "late"
    filling = rng.uniform(0.45, 0.9) if late else rng.uniform(0.8, 1.1)
    tissue = 1.2 - 0.25 * np.hypot(x, 0.8 * y) ** 2 + 0.06 * cloud
    contrast = filling * _cavity(anatomy.cavity, x, y, pixel)
    for tube in anatomy.tubes:
        contrast = np.maximum(contrast, filling * _strand(tube.path, tube.radius, body, pixel, gain=26))
    spread, amount = (rng.uniform(1.1, 1.35), rng.uniform(0.4, 0.65)) if late else (rng.uniform(0.8, 1.0), rng.uniform(0.5, 0.75))
    spill = sum(_plume(tube.spill, body, cloud, streaks, spread) for tube in anatomy.tubes)
    return tissue + _bones(anatomy.bones, x, y) + _blobs(anatomy.blobs, x, y) + contrast + amount * spill


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
    t = np.linspace(0, 1, 24)
    line = np.stack([p["catheter_bend"] * t**2, balloon_y + t * 1.2], 1)
    catheter = _strand(line, np.full(24, 0.014), np.stack([x, y], 1), pixel, gain=28)
    leak = p["leak"] * np.exp(-((x / 0.1) ** 2) - ((y - p["bottom"] - 0.25) / 0.1) ** 2)
    return np.maximum(cavity * (1 - 0.75 * balloon) + 0.2 * ring, catheter) + leak


def _strand(path: np.ndarray, radius: np.ndarray, body: np.ndarray, pixel: float, gain: float) -> np.ndarray:
    """A filled tube: attenuation grows with its thickness, which saturates at 1.1; no thinner than a pixel shows."""
    reach = radius**2 + (0.45 * pixel) ** 2
    squared = _squared_distance(body, path) / np.float32(reach)
    nearest = squared.argmin(1)
    thickness = np.minimum(gain * radius**2 / np.sqrt(reach), 1.1)
    return thickness[nearest] * np.exp(-(squared[np.arange(len(body)), nearest] ** 2))


def _plume(spill: np.ndarray, body: np.ndarray, cloud: np.ndarray, streaks: np.ndarray, spread: float) -> np.ndarray:
    """Free contrast medium between the bowel loops: streaky, with a ragged edge."""
    if not len(spill):
        return np.zeros(len(body))
    squared = _squared_distance(body, spill[:, :2]) / np.float32(2 * (spread * spill[:, 2]) ** 2)
    field = np.exp(-squared).sum(1)
    return _soft((field * (1 + 0.45 * cloud) - 0.55) * 1.6) * (0.65 + 0.5 * np.tanh(streaks)) * np.minimum(field / 0.3, 1)


def _squared_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, 2), (M, 2) -> (N, M) float32, the precision that speed asks for."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    return (a[:, :1] - b[:, 0]) ** 2 + (a[:, 1:] - b[:, 1]) ** 2


def _bones(p: dict[str, float], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sacrum (top middle), iliac wings (top corners), hips, pelvic brim and pubic rami (bottom)."""
    foramina = sum(np.exp(-(((np.abs(x) - 0.13) / 0.045) ** 2) - ((y - row) / 0.035) ** 2) for row in (-0.85, -0.62, -0.4))
    sacrum = p["sacrum"] * _soft((0.25 + 0.2 * (-0.6 - y) - np.abs(x)) / 0.1) * _soft((-0.3 - y) / 0.15) * (1 - 0.4 * foramina)
    wing = np.hypot((np.abs(x) - 1.15 * p["width"]) / 0.6, (y + 0.7) / 0.65)
    ilium = p["ilium"] * _soft((1 - wing) / 0.12)
    hip = 0.7 * p["ilium"] * _soft((0.27 - np.hypot(np.abs(x) - 1.02 * p["width"], y - 0.55)) / 0.05)
    rim = np.hypot(x / p["width"], (y - 0.02) / 0.95) - p["brim"]
    thickness = np.interp(y, [-0.2, 0.3, 0.8], [0.04, 0.06, 0.12])
    symphysis = 1 - np.exp(-((x / 0.025) ** 2))
    brim = p["pubis"] * _soft(rim / 0.03) * np.exp(-np.maximum(rim, 0) / thickness) * _soft((y + 0.1) / 0.3) * symphysis
    return sacrum + ilium + hip + brim


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

    photons = np.exp(rng.uniform(np.log(700), np.log(3000)))
    primary = photons * np.exp(-attenuation)
    scatter = rng.uniform(0.1, 0.3) * gaussian_filter(primary, len(attenuation) / 10)
    counts = gaussian_filter(primary, rng.uniform(0.4, 0.7)) + scatter
    # Poisson noise of large counts. Unlike rng.poisson, a last-digit difference between processors stays one.
    counts = np.maximum(counts + np.sqrt(counts) * rng.normal(size=counts.shape), 1)
    signal = -np.log(gaussian_filter(counts, 0.45) / photons)
    lines = rng.normal(0, 0.012, (len(signal), 1)) + rng.normal(0, 0.006, (1, len(signal)))
    drift = 0.12 * (pixels @ rng.normal(0, 1, 2))
    center, width = rng.normal(1.3, 0.12), rng.uniform(1.7, 2.6)
    shown = np.clip((signal + lines + drift - center) / width + 0.5, 0, 1) ** rng.uniform(0.8, 1.25)
    return np.round(255 * shown * _collimator(pixels, rng)).astype(np.uint8)


def _collimator(pixels: np.ndarray, rng: Generator) -> np.ndarray:
    """Open field: a tilted rectangle, or a disc (image intensifier)."""
    angle, opening = rng.normal(0, 0.04), rng.uniform(0.9, 1.1, 4)
    x = pixels[..., 0] * np.cos(angle) + pixels[..., 1] * np.sin(angle)
    y = pixels[..., 1] * np.cos(angle) - pixels[..., 0] * np.sin(angle)
    inside = np.minimum.reduce([opening[0] - x, opening[1] + x, opening[2] - y, opening[3] + y])
    if rng.random() < 0.3:
        inside = rng.uniform(0.98, 1.2) - np.hypot(x, y)
    return _soft(inside / 0.02)
