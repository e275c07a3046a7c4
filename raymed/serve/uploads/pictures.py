"""What PNG, JPEG and TIFF files must be before Pillow sees them: of few enough parts.

Pillow bounds the pixels and the texts of a file; not how many chunks, segments, scans or pages it has, each of which
costs time or memory far beyond its bytes.
"""

import struct
from collections.abc import Iterator

from raymed.serve.problems import Problem
from raymed.serve.uploads.codestreams import SCANS, jpeg_segments

CHUNKS = 50_000
"""Of a PNG."""
SEGMENTS = 5_000
"""Of a JPEG."""
PAGES = 2_000
"""Of a TIFF."""
VALUES = 300_000
"""Of all tags of a TIFF: strips and tiles."""
_COMPRESSIONS = {1, 5, 7, 8, 32773, 32946}
"""None, LZW, JPEG, deflate (two numbers), PackBits."""
_COMPRESSION, _TILE_WIDTH, _TILE_LENGTH = 259, 322, 323
_TILE = 2**24
"""Pixels of a TIFF's tile."""


def bomb_errors() -> tuple[type[Exception], ...]:
    """What Pillow raises for an image of far too many pixels."""
    from PIL import Image

    return (Image.DecompressionBombError,)


def check_png(content: bytes) -> None:
    """Raises Problem (413)."""
    position, num = 8, 0
    while position + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        position, num = position + 12 + length, num + 1
        if num > CHUNKS:
            raise Problem(413, f"a PNG of at most {CHUNKS} chunks is expected")


def check_jpeg(content: bytes) -> None:
    """Raises Problem (413)."""
    num = scans = 0
    for marker, _ in jpeg_segments(content):
        num, scans = num + 1, scans + (marker == 0xDA)
        if num > SEGMENTS or scans > SCANS:
            raise Problem(413, f"a JPEG of at most {SEGMENTS} segments and {SCANS} scans is expected")


def check_tiff(content: bytes) -> None:
    """Raises Problem: 413 for too much, 415 for a compression that is not taken, 422 for a damaged file."""
    try:
        _check_pages(content)
    except struct.error:
        raise Problem(422, "damaged or cut short, it cannot be decoded") from None


def _check_pages(content: bytes) -> None:
    num_values = 0
    for num_pages, page in enumerate(_pages(content), start=1):
        tags = {}
        if num_pages > PAGES:
            raise Problem(413, f"a TIFF of at most {PAGES} pages is expected")
        for tag, is_bytes, count, value in page:
            num_values += 1 if is_bytes else count
            tags[tag] = value
            if num_values > VALUES:
                raise Problem(413, f"a TIFF whose tags have at most {VALUES} values is expected")
        if tags.get(_COMPRESSION, 1) not in _COMPRESSIONS:
            raise Problem(415, "a TIFF without compression, or LZW, deflate, PackBits or JPEG, is expected")
        if tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0) > _TILE:
            raise Problem(413, f"a TIFF with tiles of at most {_TILE} pixels is expected")


def _pages(content: bytes) -> Iterator[Iterator[tuple[int, bool, int, int]]]:
    """Each page as (tag, whether its values are bytes, number of values, the value if it is one small number)."""
    order = "<" if content.startswith(b"II") else ">"
    big = content[2:4] in (b"+\0", b"\0+")
    entry = struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
    count_of, next_of = struct.Struct(order + ("Q" if big else "H")), struct.Struct(order + ("Q" if big else "I"))

    def entries(start: int, num: int) -> Iterator[tuple[int, bool, int, int]]:
        for i in range(num):
            tag, kind, count, raw = entry.unpack_from(content, start + i * entry.size)
            value = struct.unpack_from(order + {3: "H", 4: "I", 16: "Q"}.get(kind, "B"), raw.ljust(8, b"\0"))[0]
            yield tag, kind in (1, 2, 6, 7), count, value

    (position,) = next_of.unpack_from(content, 8 if big else 4)
    seen: set[int] = set()
    while position and position not in seen:
        seen.add(position)
        (num,) = count_of.unpack_from(content, position)
        start = position + count_of.size
        yield entries(start, num)
        (position,) = next_of.unpack_from(content, start + num * entry.size)
