"""Who may ask: the middleware that looks at the host, at where a browser comes from, and at the caller's token."""

import socket
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from raymed.serve.access import log
from raymed.serve.access.body import STRANGER
from raymed.serve.access.connection import common_name
from raymed.serve.access.limits import Rates
from raymed.serve.access.tokens import Tokens
from raymed.serve.config import ServeConfig
from raymed.serve.problems import Problem

_READING = ("GET", "HEAD", "OPTIONS")


class Gate:
    """Lets through what names this server and bears a token, or comes with a client's certificate, as often as it may.

    tokens: None where nobody needs one. open_paths need none. scope["caller"] is then the name of whoever asks.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, tokens: Tokens | None, open_paths: Sequence[str] = ()):
        self.app = app
        self.tokens = tokens
        self.certificates = config.access.client_ca is not None
        self.rates = Rates(config.limits.per_minute, config.limits.at_once)
        self.open = frozenset(path for path in open_paths if not path.endswith("/*"))
        self.open_below = tuple(path[:-1] for path in open_paths if path.endswith("/*"))
        names = {config.host, "localhost", socket.gethostname(), *config.access.hosts}
        self.names = {name.lower() for name in names}
        self._is_ours = lru_cache(maxsize=256)(self._names_this_server)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI. Raises Problem (400, 401, 403, 429)."""
        if scope["type"] == "websocket":  # no route speaks it
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        self._check_address(scope["method"], headers)
        if self.tokens is None:
            return await self.app(scope, receive, send)
        if self._is_open(scope):
            scope[STRANGER] = True
            return await self.app(scope, receive, send)
        scope["caller"] = name = self._caller(self.tokens, scope, headers)
        log.note(caller=name)
        with self.rates.place(name):
            await self.app(scope, receive, send)

    def _check_address(self, method: str, headers: dict[bytes, bytes]) -> None:
        """A page from elsewhere must neither reach this server under a name of its own (DNS rebinding) nor make a
        browser send what changes or costs something."""
        host = headers.get(b"host", b"")
        if not self._is_ours(host):
            raise Problem(400, "the Host is none of this server's names: start it with --access.hosts NAME")
        if method in _READING:
            return
        site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
        foreign = _netloc(origin) != host if site is None and origin else site in (b"cross-site", b"same-site")
        if foreign:
            raise Problem(403, "pages of other sites may not ask this server")

    def _names_this_server(self, host: bytes) -> bool:
        """An address needs no look at the names: a page that was brought here by its name goes on bearing it."""
        try:
            name = urlsplit(f"//{host.decode('ascii')}").hostname or ""
        except ValueError:
            return False
        return name in self.names or _is_address(name)

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return path in self.open or path.startswith(self.open_below)

    def _caller(self, tokens: Tokens, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """The name of a client's certificate or of a token. Raises Problem (401)."""
        if self.certificates and (name := common_name(scope)):
            return name
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not token:
            raise _unknown("a token is needed: Authorization: Bearer TOKEN", "Bearer")
        name = tokens.name_of(token.strip())
        if name is None:
            raise _unknown("this token is not known here, or no longer", 'Bearer error="invalid_token"')
        return name


def _unknown(detail: str, scheme: str) -> Problem:
    problem = Problem(401, detail, field="Authorization")
    problem.headers["WWW-Authenticate"] = scheme
    return problem


def _netloc(origin: bytes) -> bytes:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return b""


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
