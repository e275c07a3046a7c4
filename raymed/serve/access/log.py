"""What a server says of itself on stderr: JSON, one line a request and one an event.

No file names, no values of queries or headers, no answers, no texts of exceptions: any of them may name a patient.
"""

import json
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi.routing import iter_route_contexts
from starlette.routing import Match

current: ContextVar[dict[str, Any] | None] = ContextVar("current", default=None)
"""The line of the request that is being answered: what `note` adds to, and `Entry` writes."""

_PACKAGE = Path(__file__).resolve().parents[2]


def write(**what: Any) -> None:
    """A line. A log that nobody reads any more stops no answer."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    with suppress(OSError, ValueError):
        print(json.dumps({"time": now, **what}), file=sys.stderr, flush=True)


def note(**what: Any) -> None:
    """Add to the line of the request that is being answered, if one is: nothing that the client made up."""
    line = current.get()
    if line is not None:
        line.update(what)


def request_id() -> str:
    """Of the request that is being answered; "" where none is."""
    return (current.get() or {}).get("id", "")


def failed(error: BaseException) -> None:
    """A line about an exception that nobody expected: its kind and where it came from, without its text."""
    frames = traceback.extract_tb(error.__traceback__)
    write(event="failed", id=request_id(), error=type(error).__name__, where=[_place(frame) for frame in frames[-8:]])


def _place(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    shown = path.relative_to(_PACKAGE.parent) if path.is_relative_to(_PACKAGE) else Path(*path.parts[-2:])
    return f"{shown}:{frame.lineno} {frame.name}"


def described(scope: Mapping[str, Any]) -> str:
    """The template of the route that a request found, or would have found had it been let in, such as
    /v1/models/{name}; "" where there is none."""
    if "route" in scope:
        return scope["route"].path
    routes = iter_route_contexts(scope["app"].routes)
    return next((route.path or "" for route in routes if route.matches(scope)[0] != Match.NONE), "")
