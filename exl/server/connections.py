"""Connections that cannot hold the server up: uvicorn's protocols with bounds on what a client may send and on how long
it may take.

uvicorn bounds neither the time nor (with httptools) the bytes of a request's headers, nor the time that a client takes
to read its answer. Here one task looks at all connections a few times a second, so that nothing is added to the way of
a token.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from exl.server.errors import ApiError, openai_body
from exl.server.options import ServerOptions

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:  # slower, and the same otherwise
    HttpToolsProtocol = None  # type: ignore[assignment, misc]

LOG = logging.getLogger("exl.server")
MAX_HEAD_BYTES = 64 << 10  # a request's line and headers
_LOOK_SECONDS = 0.25  # between two looks at all connections
_OWN_FILES = 256  # that the process may need beside its connections


class _Bounded:
    """What ``HttpToolsProtocol`` and ``H11Protocol`` have in common with bounds. A request is *pending* from its first
    byte, or from the connection's beginning, until its headers are whole."""

    options: ServerOptions  # of the class that ``protocol_class`` makes
    cycle: Any
    transport: Any
    connections: set[Any]

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        self._pending_since: float | None = time.monotonic()
        self._pending_bytes = self._head_bytes = 0
        self._unsent, self._sent_at = 0, time.monotonic()
        most = max_connections(self.options)
        if len(self.connections) > most:
            LOG.warning("a connection was refused: there are %d", most)
            self._refuse(503, f"this server takes {most} connections at once", {"Retry-After": "2"})

    def data_received(self, data: bytes) -> None:
        # In slices, so that a head that comes in one piece is no longer than one that comes in many.
        for start in range(0, len(data), MAX_HEAD_BYTES):
            if self.transport.is_closing():
                return
            self._receive(data[start : start + MAX_HEAD_BYTES])

    def _receive(self, data: bytes) -> None:
        before = self.cycle
        if before is None or before.response_complete:
            if self._pending_since is None:
                self._pending_since = time.monotonic()
            whole = self._pending_bytes + len(data)
            if self._pending_bytes and whole > MAX_HEAD_BYTES:
                self._refuse_head()
                return
            self._pending_bytes = whole
        super().data_received(data)  # type: ignore[misc]
        if self.cycle is not before:  # headers have become whole
            self._pending_since, self._pending_bytes = None, 0

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for a request that it cannot read."""
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        else:
            self._refuse(400, "the request is no HTTP/1.1")

    def _refuse_head(self) -> None:
        self._refuse(431, f"the request's line and headers have more than {MAX_HEAD_BYTES} bytes")

    def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        """Closes the connection. Where an answer is under way, there is no place for another."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = json.dumps(openai_body(ApiError(status, message))).encode()
            lines = [
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode(),
                b"content-type: application/json",
                b"content-length: %d" % len(body),
                b"connection: close",
                *(f"{name.lower()}: {value}".encode() for name, value in (headers or {}).items()),
            ]
            self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        self.transport.close()

    def shutdown(self) -> None:
        """What uvicorn calls when the server ends."""
        if (self.cycle is None or self.cycle.response_complete) and self.transport.get_write_buffer_size() == 0:
            self.transport.abort()  # with TLS, closing would wait for the client's farewell
        else:
            super().shutdown()  # type: ignore[misc]

    def look(self, now: float) -> None:
        """Ends the connection if its client has taken too long."""
        if self._pending_since is not None and now - self._pending_since > self.options.header_timeout:
            if self._pending_bytes:
                self._refuse(408, f"the request's headers were not whole in {self.options.header_timeout:g} seconds")
            else:
                self.transport.close()
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent:
            self._sent_at = now
        elif now - self._sent_at > self.options.write_timeout:
            self.transport.abort()  # closing would wait until all is sent
        self._unsent = unsent


class _BoundedH11(_Bounded, H11Protocol):
    pass


if HttpToolsProtocol is not None:

    class _BoundedHttpTools(_Bounded, HttpToolsProtocol):
        """llhttp bounds nothing: neither the number of headers, nor that of trailers behind a chunked body."""

        def on_message_begin(self) -> None:
            self._head_bytes = 0
            super().on_message_begin()

        def on_url(self, url: bytes) -> None:
            self._count(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value) + 4)
            super().on_header(name, value)

        def _count(self, num_bytes: int) -> None:
            self._head_bytes += num_bytes
            if self._head_bytes > MAX_HEAD_BYTES:
                raise ValueError("too large")  # the parser stops, and uvicorn calls ``send_400_response``


def protocol_class(options: ServerOptions, httptools: bool = True) -> type[asyncio.Protocol]:
    """uvicorn's protocol with the bounds of ``options``; on httptools if that is installed."""
    base: Any = _BoundedHttpTools if httptools and HttpToolsProtocol is not None else _BoundedH11
    made: type[asyncio.Protocol] = type("BoundedProtocol", (base,), {"options": options})
    return made


async def watch_connections(http: uvicorn.Server) -> None:
    """Looks at all connections, until it is cancelled."""
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        now = time.monotonic()
        for connection in list(http.server_state.connections):
            connection.look(now)  # type: ignore[union-attr]


def allow_many_files() -> None:
    """Each connection is a file, and the usual limit of a shell is 1024 of them. Raises it as far as is allowed."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_connections(options: ServerOptions) -> int:
    """As asked, but no more than the process has files for."""
    if sys.platform == "win32":
        return options.max_connections
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return options.max_connections
    return max(1, min(options.max_connections, soft - _OWN_FILES))
