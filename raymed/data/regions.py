"""Regions of interest: where the finding lies in an image, as a mask image or as boxes.

All of them are read and checked once, when the data set is; afterwards each is read again when it is asked for.

  regions-KEY.json  per image: its size, its mask's file, its boxes; and what is wrong with them

KEY is a hash of the same, with the sizes and times (in a bucket: ETags) of the masks' files.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raymed.data.cache import on_threads
from raymed.data.locations import Location, Version, as_location, fetch, versions
from raymed.data.readers import ImageFile, ImageProblem, read_mask
from raymed.storage import write_atomic

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels from the top left corner of the image: column j reaches from j to j + 1."""
BOX_FORMAT = "'x0 y0 x1 y1' in pixels with x0 < x1 and y0 < y1, several separated by ';'"
_FORMAT = 1  # counts up when the file's meaning changes


@dataclass(frozen=True)
class Region:
    """Where the finding lies in one image of the given shape (height, width): the mask, or without one the boxes."""

    shape: tuple[int, ...]
    mask: ImageFile | None
    boxes: tuple[Box, ...]

    def read(self) -> np.ndarray | None:
        """(H, W) bool, or None where neither is stated. A pixel belongs to a box if its centre does.

        Raises ImageProblem: the mask cannot be read or has another size than the image, a box leaves the image.
        """
        if self.mask:
            return self._read_mask(self.mask)
        return self._fill_boxes() if self.boxes else None

    def _read_mask(self, mask: ImageFile) -> np.ndarray:
        try:
            pixels = read_mask(mask.near(), mask.frame)
        except ImageProblem as problem:
            raise ImageProblem(f"the mask {mask.path}: {problem}") from problem
        if pixels.shape != self.shape:
            sizes = "{} x {}, its image {} x {} (height x width)".format(*pixels.shape, *self.shape)
            raise ImageProblem(f"the mask {mask.path} has another size than its image: {sizes}")
        return pixels

    def _fill_boxes(self) -> np.ndarray:
        height, width = self.shape
        y, x = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
        inside = np.zeros(self.shape, bool)
        for x0, y0, x1, y1 in self.boxes:
            if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1:  # one pixel for those who round
                text = f"{x0:g} {y0:g} {x1:g} {y1:g}"
                raise ImageProblem(f"the box {text} leaves its image, which is {width} wide and {height} high")
            inside |= (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
        return inside

    def problem(self) -> str | None:
        """Why it cannot be read."""
        try:
            self.read()
        except ImageProblem as problem:
            return str(problem)


def parse_boxes(text: str) -> tuple[Box, ...] | None:
    """ "1 2 3 4; 5 6 7.5 8" -> its boxes, none of "", None where it is something else.

    Numbers that are all at most 1 are something else: fractions of the image, not pixels.
    """
    boxes = []
    for part in text.split(";") if text else ():
        try:
            x0, y0, x1, y1 = map(float, part.split())
        except ValueError:
            return None
        if not (x0 < x1 and y0 < y1 and max(x1, y1) > 1):
            return None
        boxes.append((x0, y0, x1, y1))
    return tuple(boxes)


def check_regions(regions: Sequence[Region], cache_dir: Path) -> tuple[Path, dict[int, str]]:
    """Read all regions once, or find that they were. Returns the file for `load_regions`, and i -> what is wrong."""
    found = versions(region.mask.path for region in regions if region.mask)
    path = cache_dir / f"regions-{_key(regions, found)}.json"
    if not path.is_file():

        def prepare(block: range) -> None:
            masks = (mask for i in block if (mask := regions[i].mask))
            fetch(mask.path for mask in masks if found[mask.path][0] is not None)

        why = on_threads(lambda i: regions[i].problem(), len(regions), "Reading masks", prepare)
        problems = {i: text for i, text in enumerate(why) if text}
        write_atomic(path, json.dumps({"regions": [_plain(region) for region in regions], "problems": problems}))
    return path, {int(i): text for i, text in json.loads(path.read_text())["problems"].items()}


def load_regions(path: Path) -> list[Region]:
    """What `check_regions` was given."""

    def region(shape: list[int], mask: str | None, frame: int | None, boxes: list[list[float]]) -> Region:
        file = ImageFile(as_location(mask), frame) if mask else None
        return Region(tuple(shape), file, tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in boxes))

    return [region(*plain) for plain in json.loads(path.read_text())["regions"]]


def _plain(region: Region) -> tuple:
    """As JSON values."""
    mask = (str(region.mask.path), region.mask.frame) if region.mask else (None, None)
    return region.shape, *mask, region.boxes


def _key(regions: Sequence[Region], found: Mapping[Location, Version]) -> str:
    files = [found[region.mask.path] if region.mask else None for region in regions]
    described = json.dumps([_FORMAT, [_plain(region) for region in regions], files])
    return hashlib.sha256(described.encode()).hexdigest()[:32]
