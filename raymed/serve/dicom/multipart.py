"""multipart/related bodies of DICOM objects, as DICOMweb sends them (PS3.18, 8.6.1.2)."""

import uuid
from collections.abc import Iterable

from raymed.config import UserError

DICOM = "application/dicom"
_PARTS = 2000
"""Of a body."""


def write_related(parts: Iterable[bytes]) -> tuple[bytes, str]:
    """(body, content type) of DICOM files."""
    boundary = uuid.uuid4().hex
    pieces = [f"--{boundary}\r\nContent-Type: {DICOM}\r\n\r\n".encode() + part + b"\r\n" for part in parts]
    body = b"".join([*pieces, f"--{boundary}--\r\n".encode()])
    return body, f'multipart/related; type="{DICOM}"; boundary={boundary}'


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
    parts: list[bytearray] = []

    def begin() -> None:
        if len(parts) == _PARTS:
            raise UserError(f"at most {_PARTS} instances are taken at once")
        parts.append(bytearray())

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_part_data": lambda data, start, end: parts[-1].extend(data[start:end]),
            },
        )
        parser.write(body)
        parser.finalize()
    except MultipartParseError:
        raise UserError("the body is no multipart/related body, or a part of one") from None
    return [bytes(part) for part in parts]
