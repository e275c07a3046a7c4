"""Configs: frozen dataclasses that fail at construction, print as JSON, hash, and come back from either.

A config is any frozen dataclass whose fields are numbers, strings, booleans, None, tuples, or further configs. A loss
is one too (`raymed.losses`): its fields are its hyper-parameters.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user gave cannot be used. The message says what, what was expected and what to do; it is all that
    is printed, and the exit code is 2."""


def check_range(
    field: str, value: Any, low: float | None = None, high: float | None = None, *, low_open=False, high_open=False
) -> None:
    """Raise UserError unless low <= value <= high (strictly where open). A tensor is checked element by element."""
    smallest, largest = (value, value) if isinstance(value, int | float) else (value.min().item(), value.max().item())
    # "not", so that NaN is in no range.
    too_low = low is not None and not (smallest > low if low_open else smallest >= low)
    too_high = high is not None and not (largest < high if high_open else largest <= high)
    if too_low or too_high:
        above = [] if low is None else [f"{'>' if low_open else '>='} {low:g}"]
        below = [] if high is None else [f"{'<' if high_open else '<='} {high:g}"]
        raise UserError(f"{field} must be {' and '.join(above + below)}, got {smallest if too_low else largest:g}")


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Raise UserError unless value is one of the choices; the message names the nearest one."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{field} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")


def to_dict(config: Any) -> Any:
    """Config -> plain JSON values; a tuple becomes a list."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {str(key): to_dict(value) for key, value in config.items()}
    return config


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The inverse of to_dict. Raises UserError for an unknown field (with the nearest known one)."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name in values:
        check_choice(f"field of {cls.__name__}", name, known)
    return cls(**{name: _from_json(hints[name], value) for name, value in values.items()})


def _from_json(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [h for h in typing.get_args(hint) if h is not type(None)]
        if value is None or len(options) > 1:
            return value
        return _from_json(options[0], value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value)  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        item = typing.get_args(hint)[0]
        return tuple(_from_json(item, v) for v in value)
    return value


def flatten(config: Any) -> dict[str, Any]:
    """Config -> {"data.positive": "normal", ...}: the names the command line uses."""

    def walk(prefix: str, value: Any):
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            yield prefix, value

    return dict(walk("", to_dict(config)))


def replace(config: T, changes: dict[str, Any]) -> T:
    """A copy with fields changed by dotted name: `replace(config, {"losses.asl.gamma_neg": 2.0})`.

    Raises UserError for a field that does not exist.
    """
    for name, value in changes.items():
        config = _replace_one(config, name, name.split("."), value)
    return config


def _replace_one(config: Any, name: str, path: list[str], value: Any) -> Any:
    if not dataclasses.is_dataclass(config):
        raise UserError(f"{name}: {config!r} has no fields")
    check_choice(f"{name}: field of {type(config).__name__}", path[0], [f.name for f in dataclasses.fields(config)])
    inner = value if len(path) == 1 else _replace_one(getattr(config, path[0]), name, path[1:], value)
    return dataclasses.replace(config, **{path[0]: inner})  # type: ignore[type-var]


def to_json(value: Any) -> str:
    """Strict JSON, indented: a number that is not finite is null; configs, numpy numbers and paths become plain."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        if hasattr(value, "item"):
            return plain(value.item())
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    return json.dumps(plain(to_dict(value)), indent=2, allow_nan=False) + "\n"


def config_hash(config: Any, exclude: Iterable[str] = ()) -> str:
    """sha256 of the config's JSON with sorted keys, leaving out the named top-level fields. 1 and 1.0 are alike."""
    values = to_dict(config)
    for name in exclude:
        values.pop(name, None)
    return hashlib.sha256(json.dumps(_plain_numbers(values), sort_keys=True).encode()).hexdigest()


def _plain_numbers(value: Any) -> Any:
    """1.0 and 1 are one number, however they were written."""
    if isinstance(value, dict):
        return {name: _plain_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
