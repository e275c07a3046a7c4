"""Takes a request's body, no larger and no slower than may be, and drops the work of clients that hang up."""

import asyncio
import time
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raymed.serve.access import log
from raymed.serve.config import Limits
from raymed.serve.problems import Problem, busy

STRANGER = "raymed.stranger"
"""In the scope of a request that nobody vouches for: it may bring little."""
_LITTLE = 64 * 1024
"""Bytes of a stranger's body, and of one that holds no images."""
_WITHOUT_IMAGES = ("/v1/jobs",)
"""Paths, with all below them, whose bodies only say what is to be done."""
SLOWEST = 20_000
"""Bytes a second that a body brings at least, beside a pause of limits.read_s."""
_HELD = 16
"""Bodies of the largest size that are in memory at once; what comes then is told to come later."""


class Body:
    """Reads the whole body before the routes see the request, so that nothing waits for a slow client but its own
    connection, and cancels the work for a client that has left."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app = app
        self.limits = limits
        self._held = 0
        self._of: Counter[str] = Counter()  # caller -> bytes of theirs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI. Raises Problem (408, 413, 503)."""
        declared = _declared(scope)
        if scope["type"] != "http" or declared == 0:
            return await self.app(scope, receive, send)
        most = min(_LITTLE, self.limits.body_bytes) if _brings_little(scope) else self.limits.body_bytes
        _check(declared or 0, most)
        pieces: list[bytes] = []
        caller = scope.get("caller", "")
        try:
            if await self._read(receive, pieces, most, caller):
                pieces[:] = [b"".join(pieces)]
                log.note(received=len(pieces[0]))
                await _answer(self.app, scope, pieces[0], receive, send)
        finally:
            size = sum(map(len, pieces))
            self._held -= size
            self._of[caller] -= size
            if not self._of[caller]:
                del self._of[caller]

    async def _read(self, receive: Receive, pieces: list[bytes], most: int, caller: str) -> bool:
        """Whether it came whole: False for a client that has left."""
        size, started = 0, time.perf_counter()
        while True:
            late = started + self.limits.read_s + size / SLOWEST - time.perf_counter()
            try:
                async with asyncio.timeout(min(self.limits.read_s, late)):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            if message["type"] == "http.disconnect":
                return False
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            self._held += len(pieces[-1])
            self._of[caller] += len(pieces[-1])
            _check(size, most)
            if caller and self._of[caller] > _HELD * self.limits.body_bytes // 4:
                raise Problem(429, "the bodies of your other requests fill your part of the memory", retry_after=2)
            if self._held > _HELD * self.limits.body_bytes:
                raise busy("the bodies of other requests fill the memory", retry_after=2)
            if not message.get("more_body", False):
                return True

    def _too_slow(self) -> Problem:
        problem = Problem(
            408, f"the body paused for {self.limits.read_s:g} s, or brought less than {SLOWEST} bytes a second"
        )
        problem.headers["Connection"] = "close"
        return problem


def _brings_little(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return STRANGER in scope or path.startswith(_WITHOUT_IMAGES)


def _check(size: int, most: int) -> None:
    if size > most:
        raise Problem(413, f"a request holds at most {most} bytes here", field="body")


async def _answer(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    exchange = _Exchange(body, receive, send)
    watching = asyncio.create_task(exchange.watch())
    try:
        await app(scope, exchange.receive, exchange.send)
    except asyncio.CancelledError:
        if not exchange.left.is_set():  # the server itself ends it
            raise
        exchange.task.uncancel()
    finally:
        watching.cancel()


class _Exchange:
    """A request that has come whole, and the answer to it."""

    def __init__(self, body: bytes, receive: Receive, send: Send):
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.left = asyncio.Event()
        self._body: bytes | None = body
        self._receive, self._send = receive, send
        self._answered = False

    async def watch(self) -> None:
        """Wait for the client to hang up; what it waited for is then no longer wanted."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.left.set()
        if not self._answered:
            self.task.cancel()

    async def receive(self) -> Message:
        """The body, then nothing until the client hangs up."""
        if self._body is None:
            await self.left.wait()
            return {"type": "http.disconnect"}
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Once the last of the answer is on its way, nobody is missed any more."""
        self._answered |= message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)


def _declared(scope: Scope) -> int | None:
    """Bytes that a body will have; None where it does not say, and 0 where there is none."""
    if scope["type"] != "http":
        return 0
    length = 0
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length" and value.isdigit():
            length = int(value)
    return length
