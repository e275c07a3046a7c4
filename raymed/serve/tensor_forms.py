"""What a kind of model takes and says, as tensors: read off its `Fields` and its `Result`.

    Fields.texts: list[str]                  -> input texts, BYTES [-1]
    Result.probability: float                -> output probability, FP64 [1]
    Result.images[].probability: float       -> output images.probability, FP64 [-1]
    Result.images[].embedding: list[float]   -> output images.embedding, FP64 [-1, -1]
    ....distances: dict[str, float]          -> JSON, BYTES

What is not there (null, or shorter than the longest beside it) is NaN, -1 or empty.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from pydantic import BaseModel

from raymed.serve.tensors import Datatype, array_of

_DATATYPES: dict[str, Datatype] = {"number": "FP64", "integer": "INT64", "boolean": "BOOL", "string": "BYTES"}
_MISSING: dict[str, Any] = {"FP64": float("nan"), "INT64": -1, "INT8": -1, "BOOL": False, "BYTES": ""}


@dataclass(frozen=True)
class Form:
    """A tensor of a kind of model.

    path: to the value, without places in lists. shape: -1 for each list on the way, () without one. is_json: elements
    are JSON, since they have no form of their own.
    """

    path: tuple[str, ...]
    datatype: Datatype
    shape: tuple[int, ...]
    is_json: bool = False

    @property
    def name(self) -> str:
        """images.probability of images[].probability."""
        return ".".join(self.path)

    def described(self, **parameters: Any) -> dict[str, Any]:
        """As metadata has it."""
        made = {"name": self.name, "datatype": self.datatype, "shape": list(self.shape or (1,))}
        return made | ({"parameters": parameters} if parameters else {})

    def array(self, value: Mapping[str, Any]) -> np.ndarray:
        """Its part of a value, as `model_dump` gives it."""
        axes = len(self.shape)
        nested = _gathered(value, self.path, axes)
        missing = _MISSING[self.datatype]
        sizes = _sizes(nested, axes)
        flat = [*_filled(nested, sizes, missing)]
        if self.is_json:
            flat = ["" if part == missing else json.dumps(part) for part in flat]
        return array_of(flat, sizes or (1,), self.datatype)

    def is_missing(self, array: np.ndarray) -> bool:
        """Whether nothing of it is there."""
        missing = _MISSING[self.datatype]
        if self.datatype == "BOOL":
            return array.size == 0
        return bool(np.isnan(array).all()) if self.datatype == "FP64" else bool((array == missing).all())


@cache
def input_forms(fields: type[BaseModel]) -> dict[str, Form]:
    """Of what a request may say beside its files, by name. Objects are JSON."""
    schema = fields.model_json_schema()
    found = {}
    for name, part in schema.get("properties", {}).items():
        forms = [*_forms(part, (name,), (), schema.get("$defs", {}))]
        is_plain = len(forms) == 1 and forms[0].path == (name,) and len(forms[0].shape) < 2
        found[name] = forms[0] if is_plain else Form((name,), "BYTES", (), is_json=True)
    return found


@cache
def output_forms(result: type[BaseModel]) -> dict[str, Form]:
    """Of what an answer says, by name."""
    schema = result.model_json_schema(mode="serialization")
    return {form.name: form for form in _forms(schema, (), (), schema.get("$defs", {}))}


def _forms(
    schema: Mapping[str, Any], path: tuple[str, ...], shape: tuple[int, ...], defs: Mapping[str, Any]
) -> Iterator[Form]:
    schema, is_optional = _plain(schema, defs)
    kind = schema.get("type")
    if "properties" in schema:
        for name, part in schema["properties"].items():
            yield from _forms(part, (*path, name), shape, defs)
    elif kind == "array" and "prefixItems" in schema:
        yield from _forms(schema["prefixItems"][0], path, (*shape, len(schema["prefixItems"])), defs)
    elif kind == "array":
        yield from _forms(schema.get("items", {}), path, (*shape, -1), defs)
    elif kind in _DATATYPES:
        datatype = _DATATYPES[kind]
        yield Form(path, "INT8" if datatype == "BOOL" and is_optional else datatype, shape)
    else:
        yield Form(path, "BYTES", shape, is_json=True)


def _plain(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """What a schema refers to, less null; whether it may be null."""
    if "$ref" in schema:
        return _plain(defs[schema["$ref"].rpartition("/")[2]], defs)
    others = [part for part in schema.get("anyOf", []) if part.get("type") != "null"]
    if len(others) != 1:
        return schema, False
    return _plain(others[0], defs)[0], True


def _gathered(value: Any, path: tuple[str, ...], axes: int) -> Any:
    """The value at a path, as lists in lists. None where there is none."""
    if isinstance(value, list | tuple) and axes:
        return [_gathered(part, path, axes - 1) for part in value]
    if isinstance(value, Mapping) and path:
        return _gathered(value.get(path[0]), path[1:], axes)
    return value


def _sizes(nested: Any, axes: int) -> tuple[int, ...]:
    """Of the smallest array that has room for all."""
    if not axes:
        return ()
    parts = [_sizes(part, axes - 1) for part in nested or ()]
    inner = tuple(max((part[axis] for part in parts), default=0) for axis in range(axes - 1))
    return len(parts), *inner


def _filled(nested: Any, sizes: tuple[int, ...], missing: Any) -> Iterator[Any]:
    """Flat, row by row."""
    if not sizes:
        yield missing if nested is None else nested
        return
    parts = list(nested or ())
    for part in [*parts, *[None] * (sizes[0] - len(parts))]:
        yield from _filled(part, sizes[1:], missing)
