"""What compressed pixels say of themselves: read before a decoder, which would believe them, allocates what they ask.

JPEG (ITU-T T.81), JPEG-LS (T.87), JPEG 2000 (T.800), and the run lengths of DICOM (PS3.5 annex G).
"""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from raymed.serve.problems import Problem

SCANS = 40
"""Of a JPEG: each goes over all pixels again. The usual progressive ones have 10."""
_MARKER = re.compile(rb"\xff+([\x80-\xcf\xd8-\xfe])")
"""Not what follows 0xFF within a scan: restarts, and what is stuffed there (in JPEG-LS anything below 0x80)."""
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xF7}
"""Baseline, extended, progressive, lossless, JPEG-LS."""
_HARMLESS = {0xC4, 0xCC, 0xDA, 0xDB, 0xDD, 0xD8, 0xD9, 0xF8, 0xFE, *range(0xE0, 0xF0)} - {0xEB}
"""Tables, scans, comments, what applications add; not APP11, in which JPEG XT hides a second image."""
_SIZ, _COD, _COC, _POC = 0xFF51, 0xFF52, 0xFF53, 0xFF5F
_SOT, _SOD, _EOC = 0xFF90, 0xFF93, 0xFFD9
_TILES = 4096
_LAYERS = 256


@dataclass(frozen=True)
class Shape:
    """Of the image of a codestream."""

    height: int
    width: int
    components: int
    precision: int


def jpeg_segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, payload) of each segment up to the end of the image, or of the content."""
    position = 2
    while found := _MARKER.search(content, position):
        marker, position = content[found.end() - 1], found.end()
        if marker in (0xD8, 0xD9, 0x01):
            yield marker, b""
            if marker == 0xD9:
                return
            continue
        if position + 2 > len(content):
            return
        (length,) = struct.unpack_from(">H", content, position)
        yield marker, content[position + 2 : position + length]
        position += max(2, length)


def jpeg_shape(content: bytes) -> Shape:
    """Of a JPEG or JPEG-LS codestream. Raises Problem (422) for none, for several frames, for too many scans."""
    shapes, scans = [], 0
    for marker, payload in jpeg_segments(content):
        if marker in _FRAMES and len(payload) >= 6:
            precision, height, width, components = struct.unpack_from(">BHHB", payload)
            shapes.append(Shape(height, width, components, precision))
        elif marker not in _HARMLESS or (marker == 0xF8 and payload[:1] == b"\x04"):
            raise damaged()
        scans += marker == 0xDA
        if scans > SCANS:
            raise Problem(413, f"JPEG pixels of at most {SCANS} scans are expected")
    if not content.startswith(b"\xff\xd8") or len(shapes) != 1:
        raise damaged()
    return shapes[0]


def jpeg2000_shape(content: bytes) -> Shape:
    """Of a JPEG 2000 codestream. Raises Problem (422) for none, and for one that is cut into far smaller pieces than
    any encoder does, each of which takes memory."""
    if not content.startswith(b"\xff\x4f\xff\x51"):
        raise damaged()
    shape, position, part_end = None, 2, 0
    while position + 4 <= len(content):
        marker, length = struct.unpack_from(">HH", content, position)
        payload = content[position + 4 : position + 2 + length]
        if marker == _EOC:
            break
        if marker == _SIZ and shape is None:
            shape = _siz(payload)
        elif marker == _COD:
            _check_coding(payload[0], payload[5:], *struct.unpack_from(">H", payload, 2))
        elif marker == _COC and shape is not None:
            _check_coding(payload[1], payload[2:])
        elif marker == _SOT:
            (num_bytes,) = struct.unpack_from(">I", payload, 2)
            part_end = position + num_bytes if num_bytes else len(content)
        elif marker == _SOD and part_end > position:
            position = part_end
            continue
        elif marker in (_SIZ, _COC, _SOD, _POC) or marker >> 8 != 0xFF:
            raise damaged()
        position += 2 + max(2, length)
    if shape is None:
        raise damaged()
    return shape


def _siz(payload: bytes) -> Shape:
    width, height, x0, y0, tile_width, tile_height, tile_x0, tile_y0, num = struct.unpack_from(">8IH", payload, 2)
    components = [payload[36 + 3 * i : 39 + 3 * i] for i in range(min(num, 5))]
    is_plain = not (x0 or y0 or tile_x0 or tile_y0) and all(each[1:] == b"\1\1" for each in components)
    if not is_plain or not tile_width or not tile_height or not components:
        raise damaged()
    if math.ceil(width / tile_width) * math.ceil(height / tile_height) > _TILES:
        raise Problem(413, f"JPEG 2000 pixels in at most {_TILES} tiles are expected")
    return Shape(height, width, num, max((each[0] & 0x7F) + 1 for each in components))


def _check_coding(style: int, coding: bytes, layers: int = 1) -> None:
    """Of a COD or COC marker: code blocks of 16 x 16 pixels at least, precincts of 32 x 32."""
    levels, block_width, block_height = coding[:3]
    precincts = coding[5 : 6 + levels] if style & 1 else b""
    small = min(block_width & 15, block_height & 15) < 2 or any(min(each & 15, each >> 4) < 5 for each in precincts)
    if levels > 32 or small or not 1 <= layers <= _LAYERS:
        raise damaged()


def check_run_lengths(content: bytes, num_segments: int, num_bytes: int) -> None:
    """Raises Problem (422) for a frame that does not decode to num_segments planes of num_bytes each, or to no more
    than a pad byte beyond."""
    (found,) = struct.unpack_from("<I", content)
    offsets = [*struct.unpack_from("<15I", content, 4)[:num_segments], len(content)]
    if found != num_segments or offsets[0] < 64 or offsets != sorted(offsets):
        raise damaged()
    for start, end in zip(offsets, offsets[1:], strict=False):
        if not num_bytes <= _unpacked(content[start:end], num_bytes + 1) <= num_bytes + 1:
            raise damaged()


def _unpacked(segment: bytes, most: int) -> int:
    """Bytes that a segment's run lengths (PackBits) decode to; counting ends beyond the most."""
    position = total = 0
    while position < len(segment) and total <= most:
        header = segment[position]
        if header < 128:
            total += min(header + 1, len(segment) - position - 1)
            position += header + 2
        else:
            total += 257 - header if header > 128 and position + 1 < len(segment) else 0
            position += 2 if header > 128 else 1
    return total


def damaged() -> Problem:
    """422 of pixels that are not as their header says."""
    return Problem(422, "damaged, or its pixels are not as its header says")
