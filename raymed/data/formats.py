"""The files that images come in, opened: what one holds is known before any of it is decoded.

    open_images(file) -> Picture | Dicom | Nifti: kind, num_frames, size(index), pixels(index, window)

Only the frame that is asked for is decoded.
"""

import io
import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Protocol

import numpy as np

from raymed.config import UserError

if TYPE_CHECKING:
    from pydicom import Dataset

Window = tuple[float, float]
_GZIP = b"\x1f\x8b"
_HEAD = 1024
"""Bytes that tell a kind."""


class ImageProblem(UserError):
    """Why one image cannot be used. The text is the reason alone; whoever catches it knows row and path."""


class Images(Protocol):
    """The images of one file."""

    kind: str
    """PNG, JPEG, TIFF, DICOM or NIfTI; empty for what else Pillow knows."""
    part: ClassVar[str]
    """What one of several images is called."""

    @property
    def num_frames(self) -> int:
        """At least 1."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image, from 0, as its header states them."""
        ...

    def pixels(self, index: int, window: Window | None = None) -> np.ndarray:
        """Decode one: (H, W) or (H, W, 3), uint8 or uint16. Raises ImageProblem, or whatever a decoder raises."""
        ...


def kind_of(file: BinaryIO) -> str:
    """PNG, JPEG, TIFF, DICOM or NIfTI (also gzipped), by a file's first bytes; empty for anything else."""
    file.seek(0)
    head = file.read(_HEAD)
    if head[128:132] == b"DICM":
        return "DICOM"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head.startswith(_GZIP):
        head = Inflated(file).read(_HEAD)
    return "NIfTI" if head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0" else ""


def open_images(file: BinaryIO, kind: str) -> Images:
    """The images of a file of a kind (`kind_of`). Raises ImageProblem, or whatever a decoder raises."""
    file.seek(0)
    if kind == "DICOM":
        return Dicom(file)
    return Nifti(file) if kind == "NIfTI" else Picture(file, kind)


class Picture:
    """What Pillow reads. EXIF orientation is applied to the pixels; `size` is without it."""

    part: ClassVar = "frame"

    def __init__(self, file: BinaryIO, kind: str):
        from PIL import Image, UnidentifiedImageError

        self.kind = kind
        try:
            self.image = Image.open(file, formats=[kind] if kind else None)
        except UnidentifiedImageError as error:
            raise ImageProblem("not an image of a known format (PNG, JPEG, TIFF, DICOM, NIfTI)") from error

    @property
    def num_frames(self) -> int:
        """Of TIFF and GIF. A phone's JPEG may carry a second picture (MPO): the first is the image."""
        return getattr(self.image, "n_frames", 1) if self.image.format in ("TIFF", "GIF") else 1

    def size(self, index: int) -> tuple[int, int]:
        """See `Images`."""
        self.image.seek(index)
        return self.image.height, self.image.width

    def pixels(self, index: int, window: Window | None = None) -> np.ndarray:
        """See `Images`. A window has no meaning here."""
        from PIL import ExifTags, ImageOps

        self.image.seek(index)
        is_upright = self.image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return _picture_pixels(self.image if is_upright else ImageOps.exif_transpose(self.image))


def _picture_pixels(image: Any) -> np.ndarray:
    """Pillow image -> uint8 or uint16; palettes, alpha, CMYK become RGB or grey."""
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "I":
        return _check_depth(np.asarray(image)).astype(np.uint16)
    if image.mode == "F":
        return _to_uint(_finite(np.asarray(image)), None, np.uint16)
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))


class Dicom:
    """A DICOM object. ds: its data set, pixel data included, not yet decoded."""

    kind = "DICOM"
    part: ClassVar = "frame"

    def __init__(self, file: BinaryIO):
        import pydicom
        import pydicom.config

        # A warning about an invalid value would print it, and it may name the patient.
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        self.ds = ds = pydicom.dcmread(file, force=True)
        if not any(name in ds for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise ImageProblem("DICOM without pixel data" if "SOPClassUID" in ds else "not a DICOM file")
        _check_transfer_syntax(ds)

    @property
    def num_frames(self) -> int:
        """As stated."""
        return int(self.ds.get("NumberOfFrames") or 1)

    def size(self, index: int) -> tuple[int, int]:
        """See `Images`."""
        return self.ds.Rows, self.ds.Columns

    def stored(self, index: int) -> np.ndarray:
        """One frame: (H, W) or (H, W, 3) of any type, decompressed, colour as RGB, indices of a palette as they are."""
        from pydicom.pixels.utils import pixel_array

        return pixel_array(self.ds, index=index)

    def pixels(self, index: int, window: Window | None = None) -> np.ndarray:
        """See `Images`. MONOCHROME1 is inverted. window None: what the object states, else smallest to largest."""
        from pydicom.pixels.processing import apply_color_lut, apply_rescale

        ds, stored = self.ds, self.stored(index)
        if ds.PhotometricInterpretation == "PALETTE COLOR":
            stored = apply_color_lut(stored, ds)
        dtype = np.uint8 if stored.dtype.itemsize == 1 else np.uint16
        if stored.ndim == 3:
            return _check_depth(stored).astype(dtype)
        rescale, voi = _group(ds, index, "PixelValueTransformationSequence"), _group(ds, index, "FrameVOILUTSequence")
        window, function = window or _stated_window(voi), voi.get("VOILUTFunction") or "LINEAR"
        pixels = _of_values(
            stored, lambda values: _to_uint(_finite(apply_rescale(values, rescale)), window, dtype, function)
        )
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
    is_usable = width > 0 and math.isfinite(center) and math.isfinite(width)
    return (float(center), float(width)) if is_usable else None


class Nifti:
    """A NIfTI-1 or NIfTI-2 volume in one file, gzipped or not; its images are the slices along the third axis.

    shape: as stated. offset: of the first value. dtype: of the values as stored.
    """

    kind = "NIfTI"
    part: ClassVar = "slice"

    def __init__(self, file: BinaryIO):
        from nibabel.nifti1 import Nifti1Header
        from nibabel.nifti2 import Nifti2Header

        self._file = Inflated(file) if file.read(2) == _GZIP else file
        self._file.seek(0)
        head = self._file.read(540)
        first = head[344:348] == b"n+1\0"
        if not first and (head[4:8] != b"n+2\0" or len(head) < 540):
            raise ImageProblem("not a NIfTI file, or a damaged one")
        header = Nifti1Header(head[:348], check=False) if first else Nifti2Header(head, check=False)
        self.shape: tuple[int, ...] = header.get_data_shape()
        self.offset, self.dtype = int(header.get_data_offset()), header.get_data_dtype()
        if len(self.shape) < 2 or np.prod(self.shape[3:], dtype=float) != 1:
            raise ImageProblem(f"has the shape {self.shape}: store each volume in a file of its own")
        if min(self.shape) < 1 or self.offset < 348 or self.dtype.kind not in "iuf":
            raise ImageProblem("not a NIfTI file of real numbers, or a damaged one")
        self._slope, self._intercept = header.get_slope_inter()

    @property
    def num_frames(self) -> int:
        """Slices."""
        return self.shape[2] if len(self.shape) > 2 else 1

    def size(self, index: int) -> tuple[int, int]:
        """See `Images`. The first axis becomes the columns, as stored."""
        return self.shape[1], self.shape[0]

    def pixels(self, index: int, window: Window | None = None) -> np.ndarray:
        """See `Images`. window None: smallest to largest value of the slice."""
        height, width = self.size(index)
        num_bytes = height * width * self.dtype.itemsize
        self._file.seek(self.offset + index * num_bytes)
        content = self._file.read(num_bytes)
        if len(content) < num_bytes:
            raise ImageProblem("truncated or damaged: there are fewer values than its header states")
        stored = np.frombuffer(content, self.dtype).reshape(height, width)
        return _of_values(stored, lambda values: _to_uint(_finite(self._rescaled(values)), window, np.uint16))

    def _rescaled(self, values: np.ndarray) -> np.ndarray:
        if self._slope is None or self._intercept is None:
            return values
        return values.astype(np.float64) * self._slope + self._intercept


class Inflated(io.RawIOBase):
    """What a gzip file holds. Never more of it is in memory than is asked for; going back begins anew."""

    _CHUNK = 2**16

    def __init__(self, file: BinaryIO):
        self._source = file
        self._begin()

    def _begin(self) -> None:
        self._source.seek(0)
        self._member, self._rest, self._position = zlib.decompressobj(31), b"", 0

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position from the start, by reading up to it."""
        assert whence == io.SEEK_SET
        if position < self._position:
            self._begin()
        while self._position < position and self._some(min(self._CHUNK, position - self._position)):
            pass
        return self._position

    def read(self, size: int = -1) -> bytes:
        """The next bytes; fewer at the end only. Raises zlib.error for damaged content."""
        parts, missing = [], size
        while missing > 0 and (part := self._some(missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _some(self, most: int) -> bytes:
        """At least one byte, unless the file is at its end."""
        while True:
            data = self._rest or self._source.read(self._CHUNK)
            if self._member.eof:  # a file may be several, one after the other
                if not data.startswith(_GZIP):
                    return b""
                self._member = zlib.decompressobj(31)
            part = self._member.decompress(data, most)
            self._rest = self._member.unconsumed_tail or self._member.unused_data
            self._position += len(part)
            if part or not data:
                return part


def _check_depth(values: np.ndarray) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise ImageProblem(f"has values from {values.min()} to {values.max()}: 16 bits hold 0 to 65535")
    return values


def _finite(values: np.ndarray) -> np.ndarray:
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ImageProblem(f"{bad} of its {values.size} values are NaN or infinite")
    return values


def _of_values(stored: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """function(stored), for a function of each value that may also look at the smallest and the largest one. It sees
    every integer between these once, where that is less work than all pixels."""
    if stored.dtype.kind not in "iu":
        return function(stored)
    low, high = int(stored.min()), int(stored.max())
    if high - low >= min(stored.size, 2**16):
        return function(stored)
    table = function(np.arange(low, high + 1))
    out = np.empty(stored.shape, table.dtype)
    rows = max(1, 2**20 // stored.shape[1])
    for top in range(0, len(stored), rows):  # indices take four times the memory of pixels
        out[top : top + rows] = table[stored[top : top + rows].astype(np.intp) - low]
    return out


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
