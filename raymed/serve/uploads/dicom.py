"""What a DICOM object must be before its pixels are decoded: an image of a known transfer syntax, of sane size, whose
bytes are there."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from raymed.data.formats import Dicom
from raymed.serve.problems import Problem
from raymed.serve.uploads.apart import decompressed
from raymed.serve.uploads.codestreams import check_run_lengths, damaged, jpeg2000_shape, jpeg_shape

if TYPE_CHECKING:
    from pydicom import Dataset

_PIXELS = (0x7FE00010, 0x7FE00001, 0x7FE00002)
"""Pixel Data and its Extended Offset Table."""
_UNCOMPRESSED = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
_JPEG = tuple(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81))
_JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{n}" for n in (90, 91))
_RLE = "1.2.840.10008.1.2.5"
TRANSFER_SYNTAXES = (*_UNCOMPRESSED, _RLE, *_JPEG, *_JPEG_2000)
"""The preferred ones first: little endian, run lengths, JPEG baseline, extended and lossless, JPEG-LS, JPEG 2000."""
_PHOTOMETRIC = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_READS = 200_000
"""Of the parser in one object: three for each data element."""
_DEPTH = 16
"""Of sequences within sequences."""
_SEQUENCE, _ITEMS = 4 * 2**20, 50_000
"""Bytes and items of all sequences of stated length, which are parsed when somebody looks at them."""
_OTHER = 32 * 2**20
"""Bytes of everything but the pixels."""
_FRAGMENTS = 20_000
_ENTRIES, _SEGMENTS = 65_536, 1000
"""Of one segmented table of a palette, which is expanded for every frame."""


class Counted(io.BytesIO):
    """The content of a file that may be read so many times: a parser's memory grows with what it finds."""

    left = _READS

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises Problem (413) when it has been read too often."""
        self.left -= 1
        if self.left < 0:
            raise Problem(413, "too many data elements")
        return super().read(size)


class Object(Dicom):
    """An object from anywhere. Raises Problem: see `check_object`."""

    def __init__(self, content: bytes):
        super().__init__(Counted(content))
        check_object(self.ds)

    def stored(self, index: int) -> np.ndarray:
        """See `Dicom`. Raises Problem (422) for compressed pixels that are not what the header states."""
        ds, syntax = self.ds, self.ds.file_meta.TransferSyntaxUID
        if syntax in _UNCOMPRESSED:
            return super().stored(index)
        frame = self._frame(index)
        if syntax == _RLE:
            check_run_lengths(frame, ds.SamplesPerPixel * ds.BitsAllocated // 8, ds.Rows * ds.Columns)
            return super().stored(index)
        shape = jpeg_shape(frame) if syntax in _JPEG else jpeg2000_shape(frame)
        stated = (ds.Rows, ds.Columns, ds.SamplesPerPixel)
        if (shape.height, shape.width, shape.components) != stated or shape.precision > ds.BitsAllocated:
            raise damaged()
        return decompressed(ds, frame)

    def _frame(self, index: int) -> bytes:
        """Compressed."""
        from pydicom.encaps import get_frame

        ds, table = self.ds, None
        if "ExtendedOffsetTable" in ds:
            table = (ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths)
        return get_frame(ds.PixelData, index, number_of_frames=self.num_frames, extended_offsets=table)

    def header(self) -> "Dataset":
        """The data set without its pixels, which are gone then."""
        for tag in _PIXELS:
            self.ds.pop(tag, None)
        return self.ds


def check_transfer_syntax(content: bytes) -> None:
    """Before the data set is read, since a deflated one would be inflated. Raises Problem (415)."""
    from pydicom.filereader import read_dataset

    file = Counted(content)
    file.seek(132)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") not in TRANSFER_SYNTAXES:
        taken = "uncompressed little endian, JPEG, JPEG-LS, JPEG 2000, RLE"
        raise Problem(415, f"its transfer syntax is not one of those that are taken: {taken}")


def check_object(ds: "Dataset") -> None:
    """Raises Problem: 413 for too much of anything but pixels, 422 for what is no image or has not the bytes that it
    states."""
    _check_elements(ds)
    if not _is_image(ds):
        raise Problem(422, "a DICOM image object is expected")
    sizes = [ds.get(name) for name in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored")]
    frames = ds.get("NumberOfFrames")
    frames = 1 if frames in (None, "") else frames
    if not all(isinstance(value, int) for value in (*sizes, frames)):
        raise damaged()
    rows, columns, samples, allocated, stored = sizes
    is_sane = (
        min(rows, columns, frames) >= 1
        and samples in (1, 3)
        and allocated in (1, 8, 16, 32)
        and 1 <= stored <= allocated
        and ds.get("PhotometricInterpretation") in _PHOTOMETRIC
    )
    if not is_sane:
        raise Problem(422, "its rows, columns, frames, samples, bits or photometric interpretation are not of an image")
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        _check_palette(ds)
    if ds.file_meta.TransferSyntaxUID in _UNCOMPRESSED:
        sampled = 2 if ds.PhotometricInterpretation == "YBR_FULL_422" else samples
        if (rows * columns * sampled * frames * allocated + 7) // 8 > len(ds.PixelData):
            raise Problem(422, "cut short: there are fewer pixels than its header states")
    elif frames > _num_fragments(ds.PixelData):
        raise Problem(422, "cut short: there are fewer frames than its header states")


def _is_image(ds: "Dataset") -> bool:
    """Any of the many storage classes of images (PS3.4 B.5), private ones not; segmentations, doses, reports not."""
    name = getattr(ds.get("SOPClassUID"), "name", "")
    return "PixelData" in ds and ("Image Storage" in name or name == "Enhanced US Volume Storage")


def _check_elements(ds: "Dataset") -> None:
    """Sequences of undefined length have been parsed; those of a stated length are when somebody looks at them."""
    from pydicom.dataelem import RawDataElement

    later = items = other = 0
    within = [(ds, 0)]
    while within:
        part, depth = within.pop()
        if depth > _DEPTH:
            raise Problem(413, f"sequences are nested deeper than {_DEPTH}")
        for tag in part.keys():  # noqa: SIM118
            element = part.get_item(tag)  # not part[tag], which would parse it
            value: Any = element.value
            if isinstance(element, RawDataElement):
                size = len(value or b"")
                other += 0 if tag == 0x7FE00010 else size
                if element.VR in ("SQ", "UN", None) and (value or b"")[:4] == b"\xfe\xff\x00\xe0":
                    later, items = later + size, items + value.count(b"\xfe\xff\x00\xe0")
            elif element.VR == "SQ":
                within += [(item, depth + 1) for item in value]
    if later > _SEQUENCE or items > _ITEMS or other > _OTHER:
        raise Problem(413, "too much beside its pixels")


def _check_palette(ds: "Dataset") -> None:
    """A few bytes of a segmented table may stand for any number of entries. Raises Problem (422) with the name of the
    table."""
    for colour in ("Red", "Green", "Blue", "Alpha"):
        name = f"Segmented{colour}PaletteColorLookupTableData"
        if name in ds:
            is_of_bytes = ds.RedPaletteColorLookupTableDescriptor[2] // 8 == 1  # as pydicom has it
            if not _is_palette(np.frombuffer(ds[name].value, np.uint8 if is_of_bytes else "<u2")):
                raise Problem(422, f"{name}: {_ENTRIES} entries at most, in {_SEGMENTS} segments, are expected")


def _is_palette(values: np.ndarray) -> bool:
    """Whether a segmented table (PS3.3, C.7.9.2) stays within bounds, by the lengths that its segments state. Indirect
    ones, which repeat others, do not."""
    place = entries = segments = 0
    while place + 1 < len(values):
        code, length = int(values[place]), int(values[place + 1])
        entries, segments = entries + length, segments + 1
        if code > 1 or entries > _ENTRIES or segments > _SEGMENTS:
            return False
        place += 2 + (length if code == 0 else 1)
    return True


def _num_fragments(pixel_data: bytes) -> int:
    """Of encapsulated pixels, without the offset table. Raises Problem (413)."""
    position, num = 0, -1
    while position + 8 <= len(pixel_data) and pixel_data[position : position + 4] == b"\xfe\xff\x00\xe0":
        position += 8 + int.from_bytes(pixel_data[position + 4 : position + 8], "little")
        num += 1
        if num > _FRAGMENTS:
            raise Problem(413, f"pixels in at most {_FRAGMENTS} fragments are expected")
    return num
