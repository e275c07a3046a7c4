"""One image from one file: PNG, JPEG, TIFF, DICOM or NIfTI -> (H, W) or (H, W, 3), uint8 or uint16.

The format is told by the file's content, not by its name. 16 bits stay 16 bits. Whatever is wrong with a file comes out
as one `ImageProblem` that says why in plain words.
"""

import hashlib
import io
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from raymed.config import UserError
from raymed.data.formats import ImageProblem, Window, kind_of, open_images
from raymed.data.locations import Location, near
from raymed.storage import exists


class Source(Protocol):
    """Where one image lies."""

    @property
    def path(self) -> Location:
        """The file that it lies in."""
        ...

    def identity(self) -> tuple[str | int | None, ...]:
        """Which image of which file, as JSON values."""
        ...

    def at(self, path: Path) -> "Source":
        """The same image in a copy of its file."""
        ...

    def read(self, window: Window | None = None) -> np.ndarray:
        """The pixels, as `read` gives them."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """An image in a file of its own, or one frame of a file."""

    path: Location
    frame: int | None = None
    blank: tuple[tuple[float, float, float, float], ...] = ()
    """Boxes (x0, y0, x1, y1 in pixels) that are painted black: names that are burned into the picture."""

    def identity(self) -> tuple[str | int | None, ...]:
        """Path, frame and, where there are some, the blank boxes."""
        boxes = (";".join(" ".join(f"{x:g}" for x in box) for box in self.blank),) if self.blank else ()
        return str(self.path), self.frame, *boxes

    def at(self, path: Path) -> "ImageFile":
        """The same image in a copy of its file."""
        return replace(self, path=path)

    def read(self, window: Window | None = None) -> np.ndarray:
        """The pixels. Raises ImageProblem; another UserError where a bucket cannot be read."""
        pixels = read(self.near(), self.frame, window)
        return check_varies(blanked(pixels, self.blank)) if self.blank else pixels

    def near(self) -> Path:
        """The file on this machine. Raises ImageProblem for an object that is not there; another UserError where its
        bucket cannot be read."""
        try:
            return near(self.path)
        except UserError as error:
            if exists(self.path):
                raise
            raise ImageProblem(f"no image at {self.path}") from error


def blanked(pixels: np.ndarray, boxes: Sequence[tuple[float, float, float, float]]) -> np.ndarray:
    """A copy of (H, W) or (H, W, 3) pixels in which every pixel that a box (x0, y0, x1, y1) touches is 0."""
    found = pixels.copy()
    for x0, y0, x1, y1 in boxes:
        found[max(0, math.floor(y0)) : math.ceil(y1), max(0, math.floor(x0)) : math.ceil(x1)] = 0
    return found


def read(source: str | Path | bytes | BinaryIO, frame: int | None = None, window: Window | None = None) -> np.ndarray:
    """Decode one image.

    Args:
        source: a PNG, JPEG, TIFF (or whatever else Pillow knows), DICOM or NIfTI file: its path, its content, or the
            file itself, open for reading.
        frame: number, from 1, of the frame of a multi-frame DICOM object or TIFF, or of the slice of a NIfTI volume
            along its third axis. Needed where the file holds several.
        window: (center, width) for DICOM and NIfTI, in the units of the rescaled values (HU for CT). None: the window
            the DICOM file states, else its smallest to its largest value.

    Returns:
        (H, W) or, in colour, (H, W, 3); uint8 or uint16. EXIF orientation is applied. MONOCHROME1 is inverted, so that
        what attenuates is bright. NIfTI is scaled to uint16; its first axis becomes the columns, as stored.

    Raises:
        ImageProblem: missing, empty, truncated, not an image, NaN, one value everywhere, no such frame, no pixels, a
            transfer syntax that cannot be decoded.
    """
    return check_varies(_decoded(source, frame, window))


def read_mask(path: str | Path, frame: int | None = None) -> np.ndarray:
    """Decode a mask: (H, W) bool, True where the value is not the lowest possible one (of several labels, any).

    Formats and `frame` as of `read`; a PNG holds one picture, whatever the frame of its image. Raises ImageProblem as
    `read` does, but one value everywhere is fine; a JPEG is none, since its values are not those that were drawn.
    """
    with _opened(path) as file:
        kind = file.read(4)
    if kind.startswith(b"\xff\xd8"):
        raise ImageProblem("a JPEG blurs the borders of a mask: store it as PNG")
    pixels = _decoded(path, None if kind == b"\x89PNG" else frame, None)
    return pixels.reshape(*pixels.shape[:2], -1).max(axis=2) > 0


def _decoded(source: str | Path | bytes | BinaryIO, frame: int | None, window: Window | None) -> np.ndarray:
    with _opened(source) as file:
        try:
            images = open_images(file, kind_of(file) or _kind_by_name(source))
            return images.pixels(_check_frame(frame, images.num_frames, images.part), window)
        except ImageProblem:
            raise
        except Exception as error:  # decoders raise anything at all on damaged files
            raise ImageProblem(_reason(error)) from error


def _opened(source: str | Path | bytes | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """The file, which is closed afterwards if it was opened here. Raises ImageProblem where there is none."""
    if not isinstance(source, str | Path | bytes):
        return nullcontext(source)
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    else:
        file = _opened_path(Path(source))
    if file.seek(0, os.SEEK_END) == 0:
        file.close()
        raise ImageProblem("the file is empty (0 bytes)")
    file.seek(0)
    return file


def _opened_path(path: Path) -> BinaryIO:
    """Raises OSError for what is there and cannot be read now."""
    if path.is_dir():
        raise ImageProblem("is a folder")
    if not path.is_file():
        raise ImageProblem("there is no such file")
    try:
        return path.open("rb")
    except FileNotFoundError:  # a share that has just gone away
        raise ImageProblem("there is no such file") from None


def _kind_by_name(source: object) -> str:
    """For content that does not say what it is."""
    name = str(source).lower() if isinstance(source, str | Path) else ""
    if name.endswith((".dcm", ".dicom", ".ima")):
        return "DICOM"
    return "NIfTI" if name.endswith((".nii", ".nii.gz")) else ""


def check_varies(pixels: np.ndarray) -> np.ndarray:
    """Return the pixels. Raises ImageProblem when all of them have one value."""
    if pixels.min() == pixels.max():
        raise ImageProblem(f"all pixels have one value ({pixels.flat[0]})")
    return pixels


def content_hash(pixels: np.ndarray) -> str:
    """sha256 of shape, dtype and values: equal for exact duplicates, whatever file format they came in."""
    header = f"{pixels.dtype.name} {pixels.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    cut_short = ("truncated", "less than expected", "expected", "end-of-stream", "end of file", "not enough", "broken")
    if isinstance(error, EOFError) or any(word in text.lower() for word in cut_short):
        return f"truncated or damaged: {text}"
    return f"cannot be decoded: {text}"


def _check_frame(frame: int | None, num_frames: int, what: str) -> int:
    """Position, from 0, of the frame to read."""
    if frame is None and num_frames > 1:
        raise ImageProblem(f"holds {num_frames} {what}s: name one, from 1, in a column (--data.frame COLUMN)")
    if frame is not None and not 1 <= frame <= num_frames:
        raise ImageProblem(f"has no {what} {frame}: it holds {num_frames}")
    return (frame or 1) - 1
