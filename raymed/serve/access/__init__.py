"""What stands around the routes: who asks, how often, how much at once, and what is written down of it.

    Entry (number, log, headers, what fails) -> Gate (host, token, rate) -> Body (size, pace, who hangs up) -> routes

Plain ASGI, each a class of one file.
"""

from collections.abc import Callable, Iterable

from fastapi import FastAPI

from raymed.serve.access.body import Body
from raymed.serve.access.entry import Entry
from raymed.serve.access.gate import Gate
from raymed.serve.access.tokens import tokens_of
from raymed.serve.config import ServeConfig


def guard(
    app: FastAPI, config: ServeConfig, open_paths: Iterable[str], counted: Callable[[str, str, int], None]
) -> None:
    """Put them around an app. open_paths: what is answered without a token; one that ends with /* is all below it.
    counted: told method, route and status of every request. Raises UserError where nobody could ask."""
    app.add_middleware(Body, limits=config.limits)
    app.add_middleware(Gate, config=config, tokens=tokens_of(config), open_paths=tuple(open_paths))
    app.add_middleware(Entry, counted=counted)
