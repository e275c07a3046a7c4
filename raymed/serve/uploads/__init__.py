"""From the bytes of a file to pixels, with every limit checked on the header before anything is decoded.

    kind, by content -> the kind's own checks (pictures, dicom, nifti) -> frames -> room for their pixels -> decoded

Everything happens in memory. What is wrong with a file is said by its place in the request: no name, no value and no
text of a decoder stands in a problem, since any of them may name a patient.
"""

import io
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raymed.data.formats import ImageProblem, Images, Window, kind_of, open_images
from raymed.data.readers import check_varies
from raymed.serve.config import Limits
from raymed.serve.handlers import Upload
from raymed.serve.problems import Problem, busy
from raymed.serve.uploads import dicom, nifti, pictures
from raymed.serve.uploads.room import Case

_BEFORE: dict[str, Callable[[bytes], None]] = {
    "PNG": pictures.check_png,
    "JPEG": pictures.check_jpeg,
    "TIFF": pictures.check_tiff,
    "DICOM": dicom.check_transfer_syntax,
}
"""What is checked before a library sees the file."""


@dataclass(frozen=True)
class File:
    """What a client sent. name: as it called it, which goes nowhere."""

    content: bytes
    name: str = ""


def decode(
    file: File,
    place: int,
    limits: Limits,
    window: Window | None,
    frames: Sequence[int] | None,
    case: Case | None = None,
) -> list[Upload]:
    """The images of a file, in their order.

    Args:
        place: of the file in the request, from 0.
        window: (center, width) for DICOM and NIfTI.
        frames: numbers, from 1, of those that count in a file that holds several; None = all.
        case: what the request's pixels are counted in, and its room, which has them until nobody does; None = not.

    Raises:
        Problem: 415 for anything but PNG, JPEG, TIFF, DICOM and NIfTI, 413 beyond a limit, 422 for what cannot be used,
            with the field files[place], or frames; 503 where there is no room now.
    """
    where = f"files[{place}]"
    try:
        return _decode(file.content, place, limits, window, frames, case)
    except Problem as problem:
        if problem.field is None and problem.status != 503:
            problem.detail, problem.field = f"{where}: {problem.detail}", where
        raise
    except ImageProblem as error:
        raise Problem(422, f"{where}: {error}", field=where) from None
    except MemoryError:
        raise busy("there is no memory left for this image; other requests go on", retry_after=5) from None
    except Exception:  # decoders raise anything at all on damaged files, with its values in the text
        raise Problem(422, f"{where}: damaged or cut short, it cannot be decoded", field=where) from None


def quiet() -> None:
    """Let nothing that a library finds odd about an image be printed or logged in this process: it may be a name."""
    import pydicom  # noqa: F401  it sets its own level

    for library in ("pydicom", "PIL", "nibabel"):
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
    for logger in ("pydicom", "PIL", "nibabel.global", "python_multipart"):
        logging.getLogger(logger).setLevel(logging.CRITICAL + 1)


def _decode(
    content: bytes,
    place: int,
    limits: Limits,
    window: Window | None,
    frames: Sequence[int] | None,
    case: Case | None,
) -> list[Upload]:
    images = _opened(content)
    chosen = _chosen(images, limits, frames)
    for number in chosen:
        _check_size(images.size(number - 1), limits)
    if case is not None:
        case.count(sum(math.prod(images.size(number - 1)) for number in chosen))
    found = [_pixels(images, number, window, case) for number in chosen]
    header = images.header() if isinstance(images, dicom.Object) else None
    several = images.num_frames > 1
    return [
        Upload(pixels, place, number if several else None, images.kind, header)
        for number, pixels in zip(chosen, found, strict=True)
    ]


def _opened(content: bytes) -> Images:
    """The file's images, its header found to be sound."""
    if not content:
        raise Problem(422, "the file is empty")
    file = io.BytesIO(content)
    kind = kind_of(file)
    if not kind:
        raise Problem(415, "PNG, JPEG, TIFF, DICOM or NIfTI is expected")
    if kind in _BEFORE:
        _BEFORE[kind](content)
    if kind == "DICOM":
        return dicom.Object(content)
    try:
        images = open_images(file, kind)
    except pictures.bomb_errors() as error:
        raise Problem(413, "the image is too large") from error
    if kind == "NIfTI":
        nifti.check(images, content)
    return images


def _chosen(images: Images, limits: Limits, frames: Sequence[int] | None) -> list[int]:
    """Numbers, from 1, of the frames to decode."""
    total, part = images.num_frames, images.part
    if total == 1:
        return [1]
    wanted = range(1, total + 1) if frames is None else sorted(set(frames))
    if not wanted:
        raise Problem(422, "frames: at least one number is expected", field="frames")
    if wanted[0] < 1 or wanted[-1] > total:
        raise Problem(422, f"frames: numbers from 1 to {total} are expected, one for each {part}", field="frames")
    if len(wanted) > limits.frames:
        detail = f"{total} {part}s: at most {limits.frames} are taken at once; name those that count in frames"
        raise Problem(413, detail, field="frames")
    return list(wanted)


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    if math.prod(size) > limits.pixels:
        raise Problem(413, f"an image of at most {limits.pixels} pixels (height x width) is expected")


def _pixels(images: Images, number: int, window: Window | None, case: Case | None) -> np.ndarray:
    """One frame, decoded."""
    index = number - 1
    if case is None:
        return check_varies(images.pixels(index, window))
    with case.room.taken(math.prod(images.size(index))) as hold:
        return hold(check_varies(images.pixels(index, window)))
