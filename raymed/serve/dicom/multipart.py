"""multipart/related bodies of DICOM objects, as DICOMweb sends them (PS3.18, 8.6.1.2)."""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from raymed.config import UserError

DICOM = "application/dicom"
_PARTS = 2000
"""Of a body."""
_PIECE = 2**20
"""Bytes of a file that are in memory at once."""


def write_related(parts: Iterable[bytes]) -> tuple[bytes, str]:
    """(body, content type) of DICOM files."""
    boundary = uuid.uuid4().hex
    return b"".join(_pieces(boundary, ([part] for part in parts))), _content_type(boundary)


def related_of_files(files: Sequence[Path]) -> tuple[Iterator[bytes], dict[str, str]]:
    """(body in pieces, its headers) of DICOM files, which are read as the body is sent. Raises OSError for a file
    that is not there."""
    boundary = uuid.uuid4().hex
    size = sum(map(len, _pieces(boundary, ([] for _ in files)))) + sum(file.stat().st_size for file in files)
    headers = {"Content-Type": _content_type(boundary), "Content-Length": str(size)}
    return _pieces(boundary, map(_read, files)), headers


def _content_type(boundary: str) -> str:
    return f'multipart/related; type="{DICOM}"; boundary={boundary}'


def _pieces(boundary: str, parts: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    for part in parts:
        yield f"--{boundary}\r\nContent-Type: {DICOM}\r\n\r\n".encode()
        yield from part
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode()


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def read_related(body: bytes, content_type: str) -> list[bytes]:
    """The DICOM files of a body; a body that is one DICOM file is taken too. Raises UserError for anything else."""
    from python_multipart.exceptions import MultipartParseError
    from python_multipart.multipart import MultipartParser, parse_options_header

    kind, options = parse_options_header(content_type)
    if kind == DICOM.encode():
        return [body]
    boundary = options.get(b"boundary")
    if kind != b"multipart/related" or not boundary or options.get(b"type", DICOM.encode()) != DICOM.encode():
        raise UserError(f'the content type must be {DICOM} or multipart/related; type="{DICOM}"; boundary=...')
    parts: list[bytes | bytearray] = []

    def begin() -> None:
        if len(parts) == _PARTS:
            raise UserError(f"at most {_PARTS} instances are taken at once")
        parts.append(bytearray())

    def more(data: bytes, start: int, end: int) -> None:
        parts[-1] += memoryview(data)[start:end]

    def end() -> None:
        parts[-1] = bytes(parts[-1])

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_part_data": more,
                "on_part_end": end,
            },
        )
        parser.write(body)
        parser.finalize()
    except MultipartParseError:
        raise UserError("the body is no multipart/related body, or a part of one") from None
    return [bytes(part) for part in parts]
