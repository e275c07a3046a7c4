"""Files as scanners and people make them, and files as nobody should."""

import gzip
import io
import struct
import zlib
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, SecondaryCaptureImageStorage

NAME = "MUELLER^ANNA"
"""Of the patient in every DICOM object here: it must appear nowhere."""
GREY = (np.add.outer(np.arange(40), np.arange(48)) * 2).astype(np.uint8)
GREY16 = GREY.astype(np.uint16) * 257
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=2)
PYDICOM_FILES = Path(pydicom.data.__file__).parent / "test_files"


def picture(pixels: np.ndarray, kind: str, **options) -> bytes:
    """As Pillow writes it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def pages(arrays, **options) -> bytes:
    """A TIFF of several pages."""
    first, *rest = [Image.fromarray(array) for array in arrays]
    file = io.BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=rest, **options)
    return file.getvalue()


def dicom(pixels: np.ndarray = GREY16, *, syntax=ExplicitVRLittleEndian, **attributes) -> bytes:
    """(H, W), (F, H, W) of grey pixels as an object; attributes go into its data set, or its meta information."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
    ds.PatientName = NAME
    ds.Modality = "XA"
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, 0
    if pixels.ndim == 3:
        ds.NumberOfFrames = len(pixels)
    ds.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(ds, name, value)
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def encapsulated(name: str, frame: bytes | None = None, **attributes) -> bytes:
    """One of pydicom's compressed files, its first frame and its attributes replaced."""
    ds = pydicom.dcmread(PYDICOM_FILES / f"{name}.dcm")
    for attribute, value in attributes.items():
        setattr(ds, attribute, value)
    if frame is not None:
        ds.PixelData = pydicom.encaps.encapsulate([frame + b"\0" * (len(frame) % 2)])
        ds["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    ds.save_as(file)
    return file.getvalue()


def codestream(name: str) -> bytes:
    """The first frame of one of pydicom's compressed files."""
    ds = pydicom.dcmread(PYDICOM_FILES / f"{name}.dcm")
    return pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=int(ds.get("NumberOfFrames") or 1))


def nifti(volume: np.ndarray, **fields) -> bytes:
    """A NIfTI-1 file; fields go into its header as they are."""
    image = nibabel.Nifti1Image(volume, np.eye(4))
    content = bytearray(image.to_bytes())
    header = np.frombuffer(content, nibabel.Nifti1Header.template_dtype, 1)
    for name, value in fields.items():
        header[name] = value
    return bytes(content)


def volume(num_slices: int = 4) -> np.ndarray:
    """int16, another slice each."""
    return np.stack([GREY.astype(np.int16) + i for i in range(num_slices)], axis=2)


def nested(depth: int) -> Sequence:
    """Sequences within sequences."""
    item = Dataset()
    if depth:
        item.RequestAttributesSequence = nested(depth - 1)
        item["RequestAttributesSequence"].is_undefined_length = True
    else:
        item.RequestedProcedureID = "1"
    return Sequence([item])


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """With its length and check sum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *chunks: bytes, data: bytes | None = None) -> bytes:
    """A grey PNG of a stated size, whatever its data are."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" * 1000) if data is None else data)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


def tiff_of(pages: list[list[tuple[int, int, int, int]]], loop: bool = False, tail: bytes = b"") -> bytes:
    """A TIFF whose pages have these (tag, type, count, value)."""
    content, position = b"II*\0" + struct.pack("<I", 8), 8
    for i, tags in enumerate(pages):
        position += 2 + 12 * len(tags) + 4
        last = i == len(pages) - 1
        following = (8 if loop else 0) if last else position
        content += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        content += struct.pack("<I", following)
    return content + tail


def tiff_page(width: int, height: int, **more: int) -> list[tuple[int, int, int, int]]:
    """Tags of a grey page; its pixels are where the file begins."""
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8)}
    tags |= {277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, min(width * height, 2**31))}
    tags |= {int(tag[1:]): (4, 1, value) for tag, value in more.items()}
    return [(tag, *tags[tag]) for tag in sorted(tags)]


def elements(num: int) -> bytes:
    """So many empty private data elements, explicit, in ascending order."""
    return b"".join(struct.pack("<HH2sH", 0x0009 + 2 * (i >> 15), 0x1000 + (i & 0x7FFF), b"LO", 0) for i in range(num))


def with_elements(more: bytes, first_tag: bytes = b"\x10\x00\x10\x00") -> bytes:
    """A DICOM object with further elements before its patient's name."""
    content = dicom()
    place = content.index(first_tag)
    return content[:place] + more + content[place:]


def deep(depth: int) -> bytes:
    """A sequence in a sequence, and so on, each of undefined length."""
    head = struct.pack("<HH2sHI", 0x0009, 0x1010, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    tail = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return head * depth + tail * depth


def private(num_bytes: int) -> bytes:
    """A private element of so many bytes."""
    return struct.pack("<HH2sHI", 0x0009, 0x1010, b"OB", 0, num_bytes) + bytes(num_bytes)


def resized_jpeg(content: bytes, height: int, width: int) -> bytes:
    """A JPEG or JPEG-LS codestream that states another size."""
    marker = next(m for m in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2", b"\xff\xc3", b"\xff\xf7") if m in content)
    place = content.index(marker) + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


def with_scans(content: bytes, num: int) -> bytes:
    """A progressive JPEG that goes over its pixels again and again."""
    first = content.index(b"\xff\xda")
    second = content.index(b"\xff", first + 2)
    while content[second + 1] in (0, *range(0xD0, 0xD8)):
        second = content.index(b"\xff", second + 1)
    return content[:first] + content[first:second] * num + content[second:]


def palette(*values: int, **attributes) -> bytes:
    """An object whose palette has a table of these segments (PS3.3, C.7.9.2) for each colour."""
    table, names = struct.pack(f"<{len(values)}H", *values), ("Red", "Green", "Blue")
    tables = {f"Segmented{name}PaletteColorLookupTableData": table for name in names}
    sizes = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in names}
    return dicom(GREY, PhotometricInterpretation="PALETTE COLOR", **sizes, **tables, **attributes)


def deflated() -> bytes:
    """An object of the deflated transfer syntax that inflates to 50 MB."""
    ds = pydicom.dcmread(io.BytesIO(dicom()))
    ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    ds.PixelData = bytes(50_000_000)
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def huge() -> bytes:
    """A volume that is not there."""
    return nifti(volume(), dim=(3, 32767, 32767, 32767, 1, 1, 1, 1))


def stretched() -> bytes:
    """A volume that begins far away, behind an extension of no size."""
    content = bytearray(nifti(volume(), vox_offset=2e9))
    content[348] = 1
    return bytes(content)


def run_lengths(num: int) -> bytes:
    """A frame of two segments, the second of so many runs."""
    return struct.pack("<16I", 2, 64, 64 + 4000, *[0] * 13) + b"\x81\x01" * (2000 + num)


def siz(**numbers: int) -> bytes:
    """A JPEG 2000 codestream of 64 x 64 pixels that states other sizes: w, h, tile_w, tile_h."""
    content = bytearray(codestream("MR_small_jp2klossless"))
    places = {"w": 8, "h": 12, "tile_w": 24, "tile_h": 28}
    for name, number in numbers.items():
        struct.pack_into(">I", content, places[name], number)
    return bytes(content)


def compressed_text() -> bytes:
    """A PNG with a text that is far longer than it looks."""
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 5_000_000, zip=True)
    return picture(GREY, "PNG", pnginfo=text)


JPEG, PROGRESSIVE = picture(RGB, "JPEG"), picture(RGB, "JPEG", progressive=True)
ITEM = b"\xfe\xff\x00\xe0"
SOUND = {
    "grey.png": lambda: picture(GREY, "PNG"),
    "grey16.png": lambda: picture(GREY16, "PNG"),
    "rgb.png": lambda: picture(RGB, "PNG"),
    "grey.jpg": lambda: picture(GREY, "JPEG"),
    "progressive.jpg": lambda: picture(RGB, "JPEG", progressive=True),
    "plain.tif": lambda: picture(GREY16, "TIFF"),
    "lzw.tif": lambda: picture(RGB, "TIFF", compression="tiff_lzw"),
    "deflate.tif": lambda: picture(GREY, "TIFF", compression="tiff_adobe_deflate"),
    "pages.tif": lambda: pages([GREY, GREY[::-1].copy(), GREY[:20].copy()]),
    "big.tif": lambda: picture(GREY, "TIFF", big_tiff=True),
    "volume.nii": lambda: nifti(volume()),
    "volume.nii.gz": lambda: gzip.compress(nifti(volume())),
    "plain.dcm": lambda: dicom(),
    "implicit.dcm": lambda: dicom(syntax=ImplicitVRLittleEndian),
    "frames.dcm": lambda: dicom(np.stack([GREY, GREY[::-1]])),
    "nested.dcm": lambda: dicom(RequestAttributesSequence=nested(3)),
    "MR_small_RLE.dcm": lambda: encapsulated("MR_small_RLE"),
    "JPGExtended.dcm": lambda: encapsulated("JPGExtended"),
    "SC_rgb_jpeg_dcmtk.dcm": lambda: encapsulated("SC_rgb_jpeg_dcmtk"),
    "SC_rgb_jpeg_gdcm.dcm": lambda: encapsulated("SC_rgb_jpeg_gdcm"),
    "MR_small_jpeg_ls_lossless.dcm": lambda: encapsulated("MR_small_jpeg_ls_lossless"),
    "MR_small_jp2klossless.dcm": lambda: encapsulated("MR_small_jp2klossless"),
    "SC_rgb_rle_2frame.dcm": lambda: encapsulated("SC_rgb_rle_2frame"),
    "examples_palette.dcm": lambda: encapsulated("examples_palette"),
    "segments.dcm": lambda: palette(0, 2, 0, 100, 1, 254, 65_535),
}
"""Files that can be read, one of each sort."""


@cache
def sound(name: str) -> bytes:
    """One of SOUND."""
    return SOUND[name]()


HOSTILE = {
    "size.png": lambda: png_of(30_000, 30_000),
    "absurd.png": lambda: png_of(2**31 - 1, 2**31 - 1),
    "nothing.png": lambda: png_of(0, 0),
    "flat.png": lambda: png_of(7_000, 7_000, data=zlib.compress(bytes(7_001 * 7_000))),
    "more.png": lambda: png_of(4, 4, data=zlib.compress(bytes(50_000_000))),
    "text.png": lambda: compressed_text(),
    "profile.png": lambda: png_of(8, 8, png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20_000_000)))),
    "chunks.png": lambda: png_of(8, 8, *[png_chunk(b"abcd", b"")] * 60_000),
    "length.png": lambda: png_of(8, 8)[:33] + b"\xff\xff\xff\xffIDAT",
    "size.jpg": lambda: resized_jpeg(JPEG, 65_500, 65_500),
    "nothing.jpg": lambda: resized_jpeg(JPEG, 0, 0),
    "scans.jpg": lambda: with_scans(resized_jpeg(PROGRESSIVE, 2_000, 2_000), 500),
    "segments.jpg": lambda: JPEG[:2] + b"\xff\xfe\x00\x02" * 100_000 + JPEG[2:],
    "exif.jpg": lambda: JPEG[:2] + b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff" + JPEG[2:],
    "pages.tif": lambda: tiff_of([[]] * 50_000),
    "loop.tif": lambda: tiff_of([tiff_page(8, 8)], loop=True),
    "size.tif": lambda: tiff_of([tiff_page(2**31, 2**31)]),
    "tile.tif": lambda: tiff_of([tiff_page(64, 64, t322=60_000, t323=60_000, t324=8, t325=100)]),
    "strips.tif": lambda: tiff_of([[(273, 4, 2_000_000, 22), *tiff_page(8, 8)]], tail=bytes(8_000_000)),
    "codec.tif": lambda: tiff_of([tiff_page(64, 64, t259=50_001)], tail=bytes(100)),
    "deflate.tif": lambda: tiff_of(
        [tiff_page(64, 64, t259=8, t273=122, t279=97_000)], tail=zlib.compress(bytes(10**8))
    ),
    "zeros.gz": lambda: gzip.compress(bytes(10**8)),
    "zeros.nii.gz": lambda: gzip.compress(nifti(volume()) + bytes(50_000_000)),
    "huge.nii": lambda: huge(),
    "huge.nii.gz": lambda: gzip.compress(huge()),
    "extension.nii.gz": lambda: gzip.compress(stretched() + bytes(50_000_000)),
    "negative.nii": lambda: nifti(volume(), dim=(3, -5, 4, 4, 1, 1, 1, 1)),
    "offset.nii": lambda: nifti(volume(), vox_offset=np.nan),
    "slope.nii": lambda: nifti(volume(), scl_slope=np.inf, scl_inter=1),
    "complex.nii": lambda: nifti(volume().astype(np.complex64)),
    "4d.nii": lambda: nifti(np.zeros((4, 4, 4, 4), np.int16)),
    "size.dcm": lambda: dicom(Rows=65_535, Columns=65_535),
    "frames.dcm": lambda: dicom(NumberOfFrames=2**31 - 1),
    "negative.dcm": lambda: dicom(NumberOfFrames=-3),
    "words.dcm": lambda: dicom(NumberOfFrames="2").replace(b"IS\x02\x002 ", b"IS\x02\x00AB"),
    "bits.dcm": lambda: dicom(BitsAllocated=48, BitsStored=60),
    "samples.dcm": lambda: dicom(SamplesPerPixel=40_000),
    "colour.dcm": lambda: dicom(PhotometricInterpretation="ARGB"),
    "report.dcm": lambda: dicom(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11"),
    "palette.dcm": lambda: palette(0, 1, 0, *[1, 65_535, 65_535, 1, 65_535, 0] * 600),
    "segments.dcm": lambda: palette(*[0, 0] * 32_000, 0, 256, *range(256)),
    "indirect.dcm": lambda: palette(0, 256, *range(256), 2, 1, 0, 0),
    "slope.dcm": lambda: dicom(RescaleSlope="1e308", RescaleIntercept="1e308"),
    "window.dcm": lambda: dicom(WindowCenter=["1e300"] * 3, WindowWidth=["-5", "0"]),
    "letters.dcm": lambda: dicom(WindowCenter="1234", WindowWidth="1e5").replace(b"1234", b"ABC^"),
    "charset.dcm": lambda: dicom(SpecificCharacterSet=[NAME, "ISO 2022 IR 87"]),
    "deflated.dcm": lambda: dicom().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"[:20]),
    "inflate.dcm": lambda: deflated(),
    "deep.dcm": lambda: with_elements(deep(1_000)),
    "elements.dcm": lambda: with_elements(elements(100_000)),
    "private.dcm": lambda: with_elements(private(40_000_000)),
    "length.dcm": lambda: with_elements(struct.pack("<HH2sHI", 0x0009, 0x1010, b"OB", 0, 0xFFFFFFF0)),
    "runs.dcm": lambda: encapsulated("MR_small_RLE", run_lengths(2_000)),
    "bomb.rle.dcm": lambda: encapsulated("MR_small_RLE", run_lengths(1_000_000)),
    "size.j2k.dcm": lambda: encapsulated(
        "MR_small_jp2klossless", siz(w=60_000, h=60_000, tile_w=60_000, tile_h=60_000)
    ),
    "tiles.j2k.dcm": lambda: encapsulated("MR_small_jp2klossless", siz(tile_w=1, tile_h=1), Rows=64, Columns=64),
    "size.jpeg.dcm": lambda: encapsulated(
        "SC_rgb_jpeg_gdcm", resized_jpeg(codestream("SC_rgb_jpeg_gdcm"), 65_000, 65_000)
    ),
    "fragments.dcm": lambda: encapsulated("MR_small_RLE").replace(ITEM, (ITEM + bytes(4)) * 100_000 + ITEM, 1),
}
"""Files whose few bytes ask for much, or lie about themselves."""


@cache
def hostile(name: str) -> bytes:
    """One of HOSTILE."""
    return HOSTILE[name]()
