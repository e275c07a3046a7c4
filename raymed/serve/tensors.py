"""Tensors of the Open Inference Protocol, as JSON holds them and as bytes.

    JSON     {"name", "datatype", "shape", "data"}: data nested by the shape, or flat, row by row; BYTES are text
    binary   {"name", "datatype", "shape", "parameters": {"binary_data_size": N}}, and N bytes after the JSON: numbers
             in little endian, row by row; of BYTES each element behind its length, 4 bytes

https://github.com/kserve/open-inference-protocol, and the extension "binary_tensor_data" of Triton.
"""

import base64
import binascii
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from raymed.serve.described import Described
from raymed.serve.problems import Problem

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
]
_NUMBERS = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
SIZE = "binary_data_size"
_MOST_AXES = 8


class TensorIn(Described):
    """A tensor of a request."""

    name: str
    datatype: Datatype
    shape: list[int] = Field(max_length=_MOST_AXES)
    parameters: dict[str, Any] = {}
    """binary_data_size: bytes that it has after the JSON; it then has no data."""
    data: Any = None
    """Nested by the shape, or flat; text for BYTES."""


class TensorOut(Described):
    """A tensor of an answer."""

    name: str
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


def read_tensors(inputs: Sequence[TensorIn], binary: memoryview) -> dict[str, np.ndarray]:
    """Name -> array, of the datatype and shape that is stated; BYTES are arrays of objects: bytes of the binary form,
    text of JSON. binary: what came after the JSON. Raises Problem (422)."""
    found: dict[str, np.ndarray] = {}
    rest = binary
    for place, tensor in enumerate(inputs):
        where = f"inputs.{place}"
        if tensor.name in found:
            raise Problem(422, f"{where}.name: each name once is expected", field=f"{where}.name")
        if set(tensor.parameters) - {SIZE}:
            detail = f"{where}.parameters: at most {SIZE} is expected: there is no shared memory"
            raise Problem(422, detail, field=f"{where}.parameters")
        if any(not 0 <= length < 2**31 for length in tensor.shape):
            raise Problem(422, f"{where}.shape: lengths from 0 to 2147483647 are expected", field=f"{where}.shape")
        if SIZE in tensor.parameters:
            size = tensor.parameters[SIZE]
            if type(size) is not int or not 0 <= size <= len(rest) or tensor.data is not None:
                detail = f"{where}.parameters.{SIZE}: as many bytes as follow the JSON are expected, and no data"
                raise Problem(422, detail, field=f"{where}.parameters")
            found[tensor.name] = _of_bytes(tensor, rest[:size], where)
            rest = rest[size:]
        else:
            found[tensor.name] = _of_json(tensor, where)
    if len(rest):
        raise Problem(422, f"inputs: the sizes of all binary data must add up to what follows the JSON ({SIZE})")
    return found


def _of_bytes(tensor: TensorIn, content: memoryview, where: str) -> np.ndarray:
    expected = math.prod(tensor.shape)
    if tensor.datatype == "BYTES":
        elements = [*_elements(content, where)]
        _check_number(len(elements), expected, where)
        return _objects(elements, tensor.shape)
    dtype = np.dtype(_NUMBERS[tensor.datatype])
    if len(content) != expected * dtype.itemsize:
        detail = f"{where}: {tensor.datatype} of its shape has {expected * dtype.itemsize} bytes, not {len(content)}"
        raise Problem(422, detail, field=where)
    return np.frombuffer(content, dtype).reshape(tensor.shape)


def _elements(content: memoryview, where: str) -> Iterator[bytes]:
    position = 0
    while position < len(content):
        start = position + 4
        if start > len(content):
            break
        (length,) = struct.unpack_from("<I", content, position)
        position = start + length
        if position > len(content):
            break
        yield bytes(content[start:position])
    if position != len(content):
        raise Problem(422, f"{where}: BYTES are elements behind their length, 4 bytes in little endian", field=where)


def _of_json(tensor: TensorIn, where: str) -> np.ndarray:
    try:
        flat = [*_flat(tensor.data if isinstance(tensor.data, list) else [tensor.data])]
    except RecursionError:
        raise Problem(422, f"{where}.data: as many axes as in shape are expected", field=f"{where}.data") from None
    _check_number(len(flat), math.prod(tensor.shape), where)
    if tensor.datatype == "BYTES":
        _check_types(flat, (str,), "text", where)
        return _objects(flat, tensor.shape)
    kind = tensor.datatype[:2]
    if kind == "BO":
        _check_types(flat, (bool,), "true or false", where)
    elif kind == "FP":
        _check_types(flat, (int, float), "numbers", where)
    else:
        _check_types(flat, (int,), "whole numbers", where)
    try:
        return np.array(flat, dtype=_NUMBERS[tensor.datatype]).reshape(tensor.shape)
    except (OverflowError, ValueError):
        raise Problem(422, f"{where}.data: {tensor.datatype} is expected", field=f"{where}.data") from None


def _flat(data: list[Any]) -> Iterator[Any]:
    for value in data:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value


def _check_types(flat: Sequence[Any], types: tuple[type, ...], named: str, where: str) -> None:
    if not {type(value) for value in flat} <= set(types):
        raise Problem(422, f"{where}.data: {named} are expected", field=f"{where}.data")


def _check_number(found: int, expected: int, where: str) -> None:
    if found != expected:
        raise Problem(422, f"{where}: its shape says {expected} elements, and it has {found}", field=where)


def _objects(elements: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def content_of(element: Any, where: str) -> bytes:
    """The content of a file: bytes or, of JSON, base64. Raises Problem (422)."""
    if isinstance(element, bytes):
        return element
    try:
        return base64.b64decode(element, validate=True)
    except (binascii.Error, ValueError):
        raise Problem(422, f"{where}: files in base64 are expected, or binary data", field=where) from None


def text_of(element: Any, where: str) -> str:
    """An element of BYTES as text. Raises Problem (422)."""
    try:
        return element.decode() if isinstance(element, bytes) else element.encode().decode()
    except UnicodeError:
        raise Problem(422, f"{where}: text in UTF-8 is expected", field=where) from None


def written(name: str, datatype: Datatype, array: np.ndarray, binary: bool) -> tuple[dict[str, Any], bytes]:
    """A tensor of an answer, and what of it comes after the JSON. array: of objects, text, for BYTES. In JSON null
    stands for what is not finite."""
    tensor = {"name": name, "datatype": datatype, "shape": list(array.shape)}
    flat = array.ravel().tolist()
    if not binary:
        finite = [None if isinstance(value, float) and not math.isfinite(value) else value for value in flat]
        return tensor | {"data": finite}, b""
    if datatype == "BYTES":
        encoded = [text.encode() for text in flat]
        content = b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    else:
        content = np.ascontiguousarray(array, _NUMBERS[datatype]).tobytes()
    return tensor | {"parameters": {SIZE: len(content)}}, content


def array_of(values: Sequence[Any], shape: Sequence[int], datatype: Datatype) -> np.ndarray:
    """Flat values as an array."""
    if datatype == "BYTES":
        return _objects(values, shape)
    return np.array(values, dtype=_NUMBERS[datatype]).reshape(shape)
