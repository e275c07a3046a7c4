"""Decode once: all images as one memory-mapped array, kept for every later run and trial.

    decoded-KEY.npy   (N, size, size, C) uint8 or uint16
    decoded-KEY.json  per image: height, width and sha256 of its decoded pixels, or why there are none

KEY is a hash of where the images lie, the sizes and times of their files, and the preprocessing. Both files are written
to temporary names and renamed, the JSON last, so several processes may do the same work at once.
"""

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from raymed.config import UserError, to_dict
from raymed.data.preprocess import Preprocess
from raymed.data.readers import ImageProblem, Source, content_hash
from raymed.storage import write_atomic

_FORMAT = 2  # counts up when the same sources and preprocessing give other files
_QUIET = 1000  # images that are read without a progress bar
T = TypeVar("T")


@dataclass(frozen=True)
class Decoded:
    """What is known of N images. path: the memory-mapped array; image i is its row i (zeros where unreadable).

    hashes: sha256 of the pixels as read, before preprocessing; None where unreadable. shapes: height and width as read,
    () where unreadable. problems: i -> why unreadable. size: height and width of the array's images.
    """

    path: Path
    hashes: tuple[str | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    problems: dict[int, str]
    size: int


@dataclass(frozen=True)
class _Image:
    """What one image turned out to be."""

    hash: str | None
    problem: str | None = None
    shape: tuple[int, ...] = ()
    bits: int = 8


def decode(sources: Sequence[Source], preprocess: Preprocess, cache_dir: Path) -> Decoded:
    """Decode and preprocess all images, or find them decoded.

    An image that cannot be read is no error here: it stands in `problems`. Grey values of 8 bits stay 8 bits; one
    image of 16 bits makes all of them 16 (8-bit values times 257).

    Raises:
        UserError: no image can be read; images differ in size and preprocess.size is None; the disk is full.
    """
    cache_dir = Path(cache_dir)
    pixels, record = (cache_dir / f"decoded-{_key(sources, preprocess)}{ending}" for ending in (".npy", ".json"))
    if not (record.is_file() and pixels.is_file()):
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps(_decode_to(pixels, sources, preprocess)))
    found = json.loads(record.read_text())
    problems = {int(i): reason for i, reason in found["problems"].items()}
    return Decoded(pixels, tuple(found["hashes"]), tuple(map(tuple, found["shapes"])), problems, found["size"])


def on_threads(one: Callable[[int], T], num: int, what: str) -> list[T]:
    """[one(0), ..., one(num - 1)], several at once, with a progress bar called `what` where there are many."""
    from rich.progress import track

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        return list(track(pool.map(one, range(num)), what, num, transient=True, disable=num < _QUIET))


def _key(sources: Sequence[Source], preprocess: Preprocess) -> str:
    geometry = {name: to_dict(preprocess)[name] for name in ("size", "fit", "channels", "window")}
    described = json.dumps([_FORMAT, geometry, [source.identity() for source in sources]])
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def _decode_to(path: Path, sources: Sequence[Source], preprocess: Preprocess) -> dict[str, Any]:
    first = _first_readable(sources, preprocess)
    size = preprocess.size or first.shape[0]
    shape = (len(sources), size, size, preprocess.channels)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        images = _fill(temporary, shape, first.bits, sources, preprocess)
        if any(image.bits > first.bits for image in images):
            images = _fill(temporary, shape, 16, sources, preprocess)
        if preprocess.size is None:
            _check_one_size([image.shape for image in images if image.hash])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    problems = {i: image.problem for i, image in enumerate(images) if image.problem}
    hashes, shapes = [image.hash for image in images], [image.shape for image in images]
    return {"hashes": hashes, "shapes": shapes, "problems": problems, "size": size}


def _first_readable(sources: Sequence[Source], preprocess: Preprocess) -> _Image:
    reasons = []
    for source in sources:
        try:
            pixels = source.read(preprocess.window)
        except ImageProblem as problem:
            reasons.append(str(problem))
            continue
        return _describe(pixels)
    raise UserError(
        f"not one of {len(sources)} images can be read; the first: {reasons[0]}. "
        "Image paths are relative to the manifest's folder, or to --data.root"
    )


def _describe(pixels: np.ndarray) -> _Image:
    return _Image(content_hash(pixels), None, pixels.shape[:2], 8 * pixels.itemsize)


def _fill(
    path: Path, shape: tuple[int, int, int, int], bits: int, sources: Sequence[Source], preprocess: Preprocess
) -> list[_Image]:
    """Write the array and say what each image is. Images deeper than `bits` are left out, for another pass."""
    _check_disk(path.parent, math.prod(shape) * bits // 8)
    out = np.lib.format.open_memmap(path, "w+", np.uint8 if bits == 8 else np.uint16, shape)

    def one(i: int) -> _Image:
        try:
            pixels = sources[i].read(preprocess.window)
        except ImageProblem as problem:
            return _Image(None, str(problem))
        image = _describe(pixels)
        if image.bits <= bits and (preprocess.size or image.shape == shape[1:3]):
            out[i] = preprocess.to_array(pixels).astype(out.dtype) * (257 if image.bits < bits else 1)
        return image

    images = on_threads(one, len(sources), "Decoding")
    out.flush()
    return images


def _check_disk(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        # A full disk under a memory map is no exception but a signal that ends the process.
        raise UserError(f"the decoded images need {num_bytes / 1e9:.1f} GB; {folder} has {free / 1e9:.1f} GB free")


def _check_one_size(shapes: Sequence[tuple[int, ...]]) -> None:
    different = sorted(set(shapes))
    if len(different) == 1 and different[0][0] == different[0][1]:
        return
    text = ", ".join(f"{height} x {width}" for height, width in different[:3]) + ", ..." * (len(different) > 3)
    raise UserError(
        f"data.preprocess.size is not stated, and the images are not all squares of one size (height x width: {text}); "
        "state the network's input, for example --data.preprocess.size 224"
    )
