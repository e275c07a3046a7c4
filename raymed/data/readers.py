"""One image from one file: PNG, JPEG, TIFF, DICOM or NIfTI -> (H, W) or (H, W, 3), uint8 or uint16.

The format is told by the file's content, not by its name. 16 bits stay 16 bits. Whatever is wrong with a file comes out
as one `ImageProblem` that says why in plain words.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from raymed.config import UserError
from raymed.data.locations import Location, near
from raymed.storage import exists

if TYPE_CHECKING:
    from pydicom import Dataset

Window = tuple[float, float]


class ImageProblem(UserError):
    """Why one image cannot be used. The text is the reason alone; whoever catches it knows row and path."""


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


def read(path: str | Path, frame: int | None = None, window: Window | None = None) -> np.ndarray:
    """Decode one image.

    Args:
        path: a PNG, JPEG, TIFF (or whatever else Pillow knows), DICOM or NIfTI file.
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
    return check_varies(_decoded(Path(path), frame, window))


def read_mask(path: str | Path, frame: int | None = None) -> np.ndarray:
    """Decode a mask: (H, W) bool, True where the value is not the lowest possible one (of several labels, any).

    Formats and `frame` as of `read`; a PNG holds one picture, whatever the frame of its image. Raises ImageProblem as
    `read` does, but one value everywhere is fine; a JPEG is none, since its values are not those that were drawn.
    """
    path = Path(path)
    kind = _head(path)[:4]
    if kind.startswith(b"\xff\xd8"):
        raise ImageProblem("a JPEG blurs the borders of a mask: store it as PNG")
    pixels = _decoded(path, None if kind == b"\x89PNG" else frame, None)
    return pixels.reshape(*pixels.shape[:2], -1).max(axis=2) > 0


def _decoded(path: Path, frame: int | None, window: Window | None) -> np.ndarray:
    decode = _decoder(path)
    try:
        return decode(path, frame, window)
    except ImageProblem:
        raise
    except Exception as error:  # decoders raise anything at all on damaged files
        raise ImageProblem(_reason(error)) from error


def check_varies(pixels: np.ndarray) -> np.ndarray:
    """Return the pixels. Raises ImageProblem when all of them have one value."""
    if pixels.min() == pixels.max():
        raise ImageProblem(f"all pixels have one value ({pixels.flat[0]})")
    return pixels


def content_hash(pixels: np.ndarray) -> str:
    """sha256 of shape, dtype and values: equal for exact duplicates, whatever file format they came in."""
    header = f"{pixels.dtype.name} {pixels.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise ImageProblem("is a folder")
    if not path.is_file():
        raise ImageProblem("there is no such file")
    with path.open("rb") as file:
        head = file.read(132)
    if not head:
        raise ImageProblem("the file is empty (0 bytes)")
    return head


def _decoder(path: Path) -> Callable[[Path, int | None, Window | None], np.ndarray]:
    head = _head(path)
    if head[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom", ".ima"):
        return _read_dicom
    return _read_nifti if path.name.lower().endswith((".nii", ".nii.gz")) else _read_picture


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


def _read_picture(path: Path, frame: int | None, window: Window | None) -> np.ndarray:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(path)
    except UnidentifiedImageError as error:
        raise ImageProblem("not an image of a known format (PNG, JPEG, TIFF, DICOM, NIfTI)") from error
    with image:
        # A phone's JPEG may carry a second picture (MPO): the first is the image.
        num_frames = getattr(image, "n_frames", 1) if image.format in ("TIFF", "GIF") else 1
        image.seek(_check_frame(frame, num_frames, "frame"))
        return _picture_pixels(ImageOps.exif_transpose(image))


def _picture_pixels(image) -> np.ndarray:
    """Pillow image -> uint8 or uint16; palettes, alpha, CMYK become RGB or grey."""
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "I":
        return _check_depth(np.asarray(image)).astype(np.uint16)
    if image.mode == "F":
        return _to_uint(_finite(np.asarray(image)), None, np.uint16)
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def _check_depth(values: np.ndarray) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise ImageProblem(f"has values from {values.min()} to {values.max()}: 16 bits hold 0 to 65535")
    return values


def _finite(values: np.ndarray) -> np.ndarray:
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ImageProblem(f"{bad} of its {values.size} values are NaN or infinite")
    return values


def _to_uint(values: np.ndarray, window: Window | None, dtype: type, function: str = "LINEAR") -> np.ndarray:
    """Window values (None: smallest to largest) to the full range of dtype.

    The functions are those of DICOM PS3.3 C.11.2.1.2: LINEAR, LINEAR_EXACT and SIGMOID.
    """
    values = values.astype(np.float64)
    if window is None:
        low, high = values.min(), values.max()
        unit = (values - low) / ((high - low) or 1.0)
    elif function == "SIGMOID":
        unit = 1 / (1 + np.exp(-4 * (values - window[0]) / window[1]))
    elif function == "LINEAR_EXACT" or window[1] <= 1:
        unit = (values - window[0]) / window[1] + 0.5
    else:
        unit = (values - (window[0] - 0.5)) / (window[1] - 1) + 0.5
    return np.round(unit.clip(0, 1) * np.iinfo(dtype).max).astype(dtype)


def _read_dicom(path: Path, frame: int | None, window: Window | None) -> np.ndarray:
    import pydicom
    import pydicom.config
    from pydicom.pixels.processing import apply_color_lut, apply_rescale
    from pydicom.pixels.utils import pixel_array

    # A warning about an invalid value would print it, and it may name the patient.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    ds = pydicom.dcmread(path, force=True)
    if not any(name in ds for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ImageProblem("DICOM without pixel data" if "SOPClassUID" in ds else "not a DICOM file")
    _check_transfer_syntax(ds)
    index = _check_frame(frame, int(ds.get("NumberOfFrames") or 1), "frame")
    stored = pixel_array(ds, index=index)
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, ds)
    dtype = np.uint8 if stored.dtype.itemsize == 1 else np.uint16
    if stored.ndim == 3:
        return _check_depth(stored).astype(dtype)
    values = _finite(apply_rescale(stored, _group(ds, index, "PixelValueTransformationSequence")))
    voi = _group(ds, index, "FrameVOILUTSequence")
    pixels = _to_uint(values, window or _stated_window(voi), dtype, voi.get("VOILUTFunction") or "LINEAR")
    return np.iinfo(dtype).max - pixels if ds.PhotometricInterpretation == "MONOCHROME1" else pixels


def _check_transfer_syntax(ds: "Dataset") -> None:
    from pydicom.pixels.decoders.base import get_decoder

    uid = ds.file_meta.get("TransferSyntaxUID") if hasattr(ds, "file_meta") else None
    if uid is None:
        raise ImageProblem("DICOM that does not state its transfer syntax")
    try:
        decoder = get_decoder(uid)
    except NotImplementedError as error:
        raise ImageProblem(
            f"transfer syntax {uid.name} ({uid}) cannot be decoded: convert the file to Explicit VR Little Endian, "
            "for example with `gdcmconv --raw`"
        ) from error
    if not decoder.is_available:
        raise ImageProblem(
            f"transfer syntax {uid.name} ({uid}) needs one of: {'; '.join(decoder.missing_dependencies)} (pip install)"
        )


def _group(ds: "Dataset", index: int, sequence: str) -> "Dataset":
    """Where an attribute of one frame stands: its functional group in an enhanced object, else the data set."""
    groups = [*ds.get("PerFrameFunctionalGroupsSequence", [])[index : index + 1]]
    groups += ds.get("SharedFunctionalGroupsSequence", [])
    return next((group[sequence][0] for group in groups if group.get(sequence)), ds)


def _stated_window(ds: "Dataset") -> Window | None:
    """The first window a file states."""
    if ds.get("WindowCenter") in (None, "") or ds.get("WindowWidth") in (None, ""):
        return None
    center, width = (np.atleast_1d(ds[name].value)[0] for name in ("WindowCenter", "WindowWidth"))
    return (float(center), float(width)) if width > 0 else None


def _read_nifti(path: Path, frame: int | None, window: Window | None) -> np.ndarray:
    from nibabel.filebasedimages import ImageFileError
    from nibabel.loadsave import load
    from nibabel.spatialimages import SpatialImage

    try:
        image = load(path)
    except ImageFileError as error:
        raise ImageProblem("not a NIfTI file, or a damaged one") from error
    if not isinstance(image, SpatialImage):
        raise ImageProblem("a NIfTI file without an image in it")
    shape = image.shape + (1,) * (3 - len(image.shape))
    if len(image.shape) < 2 or np.prod(shape[3:]) > 1:
        raise ImageProblem(f"has the shape {image.shape}: store each volume in a file of its own")
    index = _check_frame(frame, shape[2], "slice")
    plane = image.dataobj if len(image.shape) == 2 else image.dataobj[:, :, index]
    values = np.asarray(plane, dtype=np.float64).reshape(shape[:2]).T
    return _to_uint(_finite(values), window, np.uint16)
