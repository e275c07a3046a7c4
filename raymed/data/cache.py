"""Decode once: all images as one memory-mapped array, kept for every later run and trial.

    decoded-KEY.npy   (N, size, size, C) uint8 or uint16
    decoded-KEY.json  per image: height, width and sha256 of its decoded pixels, or why there are none

KEY is a hash of where the images lie, the sizes and times of their files (of objects in a bucket: sizes and ETags), and
the preprocessing. Objects are fetched when they are to be decoded, many at once, and not before. Both files are written
to temporary names and renamed, the JSON last, so several processes may do the same work at once.
"""

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from raymed.config import UserError, to_dict
from raymed.data.locations import Location, Version, fetch, versions
from raymed.data.preprocess import Preprocess
from raymed.data.readers import ImageProblem, Source, Window, content_hash
from raymed.storage import write_atomic

_FORMAT = 2  # counts up when the same sources and preprocessing give other files
_QUIET = 1000  # images that are read without a progress bar
_BLOCK = 1000  # images that are fetched before they are read: the read cache has room for so many
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
        UserError: no image can be read; images differ in size and preprocess.size is None; the disk is full; a bucket,
            or a file that is there, cannot be read.
    """
    cache_dir = Path(cache_dir)
    found = versions(source.path for source in sources)
    key = _key(sources, found, preprocess)
    pixels, record = (cache_dir / f"decoded-{key}{ending}" for ending in (".npy", ".json"))
    if not (record.is_file() and pixels.is_file()):
        cache_dir.mkdir(parents=True, exist_ok=True)
        said = _decode_to(pixels, _Reader(sources, found, preprocess.window), preprocess)
        if said["problems"] and versions(source.path for source in sources) != found:
            raise UserError(
                "images changed or went away while they were read: check the share or the network; then start the same "
                "command again"
            )
        write_atomic(record, json.dumps(said))
    said = json.loads(record.read_text())
    problems = {int(i): reason for i, reason in said["problems"].items()}
    return Decoded(pixels, tuple(said["hashes"]), tuple(map(tuple, said["shapes"])), problems, said["size"])


def on_threads(
    one: Callable[[int], T], num: int, what: str, prepare: Callable[[range], None] = lambda block: None
) -> list[T]:
    """[one(0), ..., one(num - 1)], several at once, with a progress bar called `what` where there are many.

    prepare: called with a block of these numbers before they have their turn.
    """
    from rich.progress import track

    def results(pool: ThreadPoolExecutor) -> Iterator[T]:
        for start in range(0, num, _BLOCK):
            block = range(start, min(start + _BLOCK, num))
            prepare(block)
            yield from pool.map(one, block)

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        return list(track(results(pool), what, num, transient=True, disable=num < _QUIET))


class _Reader:
    """Reads the images of a set by their number.

    found: what `versions` says of their files.
    """

    def __init__(self, sources: Sequence[Source], found: Mapping[Location, Version], window: Window | None):
        self._sources, self._found, self._window = sources, found, window
        self._copies: dict[Location, Path] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def fetch(self, block: range) -> None:
        """Bring what these images lie in to this machine, where it is in a bucket."""
        paths = (self._sources[i].path for i in block)
        self._copies = fetch(path for path in paths if self._found[path][0] is not None)

    def __call__(self, i: int) -> np.ndarray:
        """The pixels of image i. Raises ImageProblem; UserError where nobody has permitted to read it, which is no
        property of the image that a cache may keep."""
        try:
            return self._read(i)
        except PermissionError as error:
            raise UserError(
                f"{error.filename} may not be read by this user: permit it (chmod), then start the same command again"
            ) from None

    def _read(self, i: int) -> np.ndarray:
        source, path = self._sources[i], self._sources[i].path
        if isinstance(path, str) and self._found[path][0] is None:
            raise ImageProblem(f"no image at {path}")
        copy = self._copies.get(path)
        try:
            return (source.at(copy) if copy else source).read(self._window)
        except ImageProblem:
            if copy is None or copy.exists():
                raise
        # Other processes have evicted it since: the read cache is small.
        return source.at(fetch([path])[path]).read(self._window)


def _key(sources: Sequence[Source], found: Mapping[Location, Version], preprocess: Preprocess) -> str:
    geometry = {name: to_dict(preprocess)[name] for name in ("size", "fit", "channels", "window")}
    described = json.dumps([_FORMAT, geometry, [(*source.identity(), *found[source.path]) for source in sources]])
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def _decode_to(path: Path, read: _Reader, preprocess: Preprocess) -> dict[str, Any]:
    first = _first_readable(read)
    size = preprocess.size or first.shape[0]
    shape = (len(read), size, size, preprocess.channels)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        images = _fill(temporary, shape, first.bits, read, preprocess)
        if any(image.bits > first.bits for image in images):
            images = _fill(temporary, shape, 16, read, preprocess)
        if preprocess.size is None:
            _check_one_size([image.shape for image in images if image.hash])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    problems = {i: image.problem for i, image in enumerate(images) if image.problem}
    hashes, shapes = [image.hash for image in images], [image.shape for image in images]
    return {"hashes": hashes, "shapes": shapes, "problems": problems, "size": size}


def _first_readable(read: _Reader) -> _Image:
    reasons = []
    for i in range(len(read)):
        try:
            pixels = read(i)
        except ImageProblem as problem:
            reasons.append(str(problem))
            continue
        return _describe(pixels)
    raise UserError(
        f"not one of {len(read)} images can be read; the first: {reasons[0]}. "
        "Image paths are relative to the manifest's folder, or to --data.root"
    )


def _describe(pixels: np.ndarray) -> _Image:
    return _Image(content_hash(pixels), None, pixels.shape[:2], 8 * pixels.itemsize)


def _fill(
    path: Path, shape: tuple[int, int, int, int], bits: int, read: _Reader, preprocess: Preprocess
) -> list[_Image]:
    """Write the array and say what each image is. Images deeper than `bits` are left out, for another pass."""
    _check_disk(path.parent, math.prod(shape) * bits // 8)
    out = np.lib.format.open_memmap(path, "w+", np.uint8 if bits == 8 else np.uint16, shape)

    def one(i: int) -> _Image:
        try:
            pixels = read(i)
        except ImageProblem as problem:
            return _Image(None, str(problem))
        image = _describe(pixels)
        if image.bits <= bits and (preprocess.size or image.shape == shape[1:3]):
            out[i] = preprocess.to_array(pixels).astype(out.dtype) * (257 if image.bits < bits else 1)
        return image

    images = on_threads(one, len(read), "Decoding", read.fetch)
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
