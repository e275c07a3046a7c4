"""A connection of uvicorn, which itself has neither a limit nor a time for a request's head, waits for ever until a
client has taken its answer, and says nothing of the client's certificate."""

import asyncio
import socket
from contextlib import suppress
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from raymed.serve.access.body import SLOWEST

HEAD_BYTES = 64 * 1024
_BESIDE_BYTES = 2**20
"""Of chunks' own lines between two pieces of a body."""
HEAD_S = 20.0
"""From the opening of a connection, or the first byte of a request, to the end of its head; and for the rest of a body
that was refused before it had come."""
TAKE_S = 20.0
"""For a client to take what has been answered, beside a second for each `SLOWEST` bytes of it."""
_UNSENT_BYTES = 128 * 1024
"""Of an answer that the kernel takes before the client does. It would be megabytes, and a slow client would look like
one that takes nothing."""


class Connection(HttpToolsProtocol):
    """Is closed when a head is too long or too slow, or an answer is not taken, and puts the subject of the client's
    certificate into the scope, as the TLS extension of ASGI says."""

    head_s = HEAD_S
    take_s = TAKE_S

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._closing: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        self._head: int | None = 0
        """Bytes of a head that has not ended; None between heads."""
        self._beside = 0
        self._whole = True
        """Whether the body of the last request has come."""

    def connection_made(self, transport: Any) -> None:
        """Wait for a head."""
        super().connection_made(transport)
        with suppress(OSError):  # not every kernel knows it
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._wait()
        tls = transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) if tls is not None else None
        if certificate:
            subject = x509.load_der_x509_certificate(certificate).subject.rfc4514_string()
            self.app = _with_subject(self.app, subject)

    def connection_lost(self, exc: Exception | None) -> None:
        """No longer wait."""
        self._come()
        self._taken()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes of a head, and what comes beside the body: chunks' own lines."""
        self._beside += len(data)
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self._close()
        elif self._beside > _BESIDE_BYTES:
            self._close()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of the head; nobody reads those that follow a body, and they would be without end."""
        if self._head is None:
            self._close()
        else:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """A piece of it."""
        self._beside = 0
        super().on_body(body)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._head, self._whole, self._beside = 0, False, 0
        self._wait()

    def on_headers_complete(self) -> None:
        """It ends."""
        self._head = None
        self._come()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """So does the body."""
        self._whole = True
        self._come()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """What was answered before it had come whole comes for nothing; where this was the last answer, the connection
        ends when it has been taken."""
        super().on_response_complete()
        if not self._whole:
            self._wait()
        if self.transport.is_closing():
            self._take()

    def pause_writing(self) -> None:
        """More has been answered than the client takes."""
        super().pause_writing()
        self._take()

    def resume_writing(self) -> None:
        """It has taken most of it."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._taken()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing has come for long."""
        self._close()

    def _close(self) -> None:
        """Without waiting for a client that has not taken its answer."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _take(self) -> None:
        self._taken()
        seconds = self.take_s + self.transport.get_write_buffer_size() / SLOWEST
        self._taking = self.loop.call_later(seconds, self.transport.abort)

    def _taken(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _wait(self) -> None:
        if self._closing is None:
            self._closing = self.loop.call_later(self.head_s, self._close)

    def _come(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None


def _with_subject(app: Any, subject: str) -> Any:
    """The app, told whose certificate a connection has."""

    async def told(scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("extensions", {})["tls"] = {"client_cert_name": subject}
        await app(scope, receive, send)

    return told


def common_name(scope: Any) -> str:
    """Of the client's certificate; "" where there is none."""
    return _common_name(scope.get("extensions", {}).get("tls", {}).get("client_cert_name") or "")


@lru_cache(maxsize=1024)
def _common_name(subject: str) -> str:
    names = x509.Name.from_rfc4514_string(subject).get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""
