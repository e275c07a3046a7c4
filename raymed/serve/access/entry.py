"""The outermost of the middlewares: gives a request its number, and writes down what became of it."""

import os
import re
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raymed.serve.access import log
from raymed.serve.problems import Problem, problem_of, response_of
from raymed.serve.spans import server_span

ID = b"x-request-id"
_TRUSTED_ID = re.compile(rb"[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}")
"""A UUID: other numbers that a hospital has for a request may be a patient's."""
LEFT = 499
"""In the log: the client had hung up before it was answered."""
_CONTENT_POLICY = (
    b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    b"frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _CONTENT_POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
"""Of every answer that does not set its own."""


class Entry:
    """Number, security headers, access log, metrics, and a problem in place of every exception.

    counted(method, route, status): told of every request.
    """

    def __init__(self, app: ASGIApp, counted: Callable[[str, str, int], None]):
        self.app = app
        self.counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["request_id"] = number = request_id(scope)
        line: dict[str, Any] = {"id": number, "method": scope["method"]}
        before = log.current.set(line)
        answer = _Answer(send, number)
        started = time.perf_counter()
        try:
            with server_span(scope) as done:
                await self._answered(scope, receive, answer)
                done(log.described(scope), answer.status)
        finally:
            route, status = log.described(scope), answer.status or LEFT
            line |= {"route": route, "status": status, "ms": round(1e3 * (time.perf_counter() - started), 2)}
            log.write(**line, sent=answer.size)
            log.current.reset(before)
            self.counted(scope["method"], route, status)

    async def _answered(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            if not isinstance(error, Problem):
                log.failed(error)
            if answer.status:  # half of it has gone out already: the server can only hang up
                raise ConnectionAbortedError("an answer broke off") from None
            await response_of(problem_of(error), scope["request_id"])(scope, receive, answer)


class _Answer:
    """`send` of a request."""

    def __init__(self, send: Send, number: str):
        self.send = send
        self.number = number.encode()
        self.status = 0
        self.size = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            own = {name for name, _ in headers}
            added = [pair for pair in _HEADERS if pair[0] not in own]
            message = {**message, "headers": [*headers, *added, (ID, self.number)]}
        elif message["type"] == "http.response.body":
            self.size += len(message.get("body", b""))
        await self.send(message)


def request_id(scope: Scope) -> str:
    """The client's own, where it is a UUID; else a new one."""
    for name, value in scope["headers"]:
        if name == ID and _TRUSTED_ID.fullmatch(value):
            return value.decode()
    return os.urandom(16).hex()
