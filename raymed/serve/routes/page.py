"""GET /: the page for people, /page/...: what it is made of, and each model's card, as Markdown.

The page asks /v1/models as any client does. Its files are read when the server starts, so that a path of a request is
looked up and never opened.
"""

import asyncio
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Response

from raymed.registry.card import card as card_of
from raymed.serve.problems import Problem, documented
from raymed.serve.service import Service

OPEN = ("/", "/page/*")
"""The page itself holds nothing, and asks for the token."""
_TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "html": "text/html"}


def router(service: Service) -> APIRouter:
    """/, /page/FILE and /v1/models/NAME/card."""
    routes = APIRouter()
    assets = _read(files("raymed.serve") / "page")

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        """The page."""
        return _response("index.html", assets)

    @routes.get("/page/{name:path}", include_in_schema=False)
    async def asset(name: str) -> Response:
        """Styles and modules."""
        return _response(name, assets)

    @routes.get(
        "/v1/models/{name}/card",
        tags=["models"],
        response_class=Response,
        responses={200: {"content": {"text/markdown": {}}}} | documented(404, 422, 503),
    )
    async def card(name: str) -> Response:
        """The model card of the version in use."""
        live = service.models.get(name)
        text = await asyncio.to_thread(card_of, live.handler.bundle, name)
        return Response(text, media_type="text/markdown; charset=utf-8")

    return routes


def _response(name: str, assets: Mapping[str, bytes]) -> Response:
    if name not in assets:
        raise Problem(404, "the page has no such file")
    return Response(assets[name], media_type=_TYPES[name.rpartition(".")[2]])


def _read(folder: Traversable, place: str = "") -> dict[str, bytes]:
    """Path below the folder -> content of the file."""
    found: dict[str, bytes] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _read(entry, f"{place}{entry.name}/")
        elif entry.name.rpartition(".")[2] in _TYPES:
            found[place + entry.name] = entry.read_bytes()
    return found
