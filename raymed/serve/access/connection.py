"""A connection of uvicorn, which itself has neither a limit nor a time for a request's head, and says nothing of the
client's certificate."""

import asyncio
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 * 1024
_BESIDE_BYTES = 2**20
"""Of chunks' own lines between two pieces of a body."""
HEAD_S = 20.0
"""From the opening of a connection, or the first byte of a request, to the end of its head; and for the rest of a body
that was refused before it had come."""


class Connection(HttpToolsProtocol):
    """Is closed when a head is too long or too slow, and puts the subject of the client's certificate into the scope,
    as the TLS extension of ASGI says."""

    head_s = HEAD_S

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._closing: asyncio.TimerHandle | None = None
        self._head: int | None = 0
        """Bytes of a head that has not ended; None between heads."""
        self._beside = 0
        self._whole = True
        """Whether the body of the last request has come."""

    def connection_made(self, transport: Any) -> None:
        """Wait for a head."""
        super().connection_made(transport)
        self._wait()
        tls = transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) if tls is not None else None
        if certificate:
            subject = x509.load_der_x509_certificate(certificate).subject.rfc4514_string()
            self.app = _with_subject(self.app, subject)

    def connection_lost(self, exc: Exception | None) -> None:
        """No longer wait."""
        self._come()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what comes of a head, and what comes beside the body: chunks' own lines."""
        self._beside += len(data)
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self.transport.close()
        elif self._beside > _BESIDE_BYTES:
            self.transport.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of the head; nobody reads those that follow a body, and they would be without end."""
        if self._head is None:
            self.transport.close()
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
        """What was answered before it had come whole comes for nothing."""
        super().on_response_complete()
        if not self._whole:
            self._wait()

    def _wait(self) -> None:
        if self._closing is None:
            self._closing = self.loop.call_later(self.head_s, self.transport.close)

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
