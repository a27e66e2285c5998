"""Bounds on a request's body: how long it may be, and how long it may take to come."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exl.server.errors import ApiError
from exl.server.options import ServerOptions

_MIN_BYTES_PER_SECOND = 1024  # of a body; Apache's mod_reqtimeout asks for half of that
# After an answer that did not wait for the body's end, as 413, the rest is read for so long and thrown away: if the
# connection were closed at once, the system would tell the client of a reset, and it might never see the answer.
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 64 << 20


class BodyBounds:
    """Outside all that reads a body. ``receive`` raises ``ApiError``: 413 or 408."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            body = _BoundedBody(scope, receive, send, self._options)
            receive, send = body.receive, body.send
        await self._app(scope, receive, send)


class _BoundedBody:
    def __init__(self, scope: Scope, receive: Receive, send: Send, options: ServerOptions) -> None:
        self._receive, self._send, self._options = receive, send, options
        headers = dict(scope["headers"])
        self._declared = int(headers.get(b"content-length", b"0"))  # the parser has seen that it is a number
        self._whole = self._declared == 0 and b"transfer-encoding" not in headers
        self._num_bytes = 0
        self._began: float | None = None  # when it was first asked for
        self._closes = False  # the answer has begun before the body's end

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        most = self._options.max_body
        if self._declared > most:
            raise _too_long(self._declared, most)
        try:
            message = await asyncio.wait_for(self._receive(), self._seconds_left())
        except asyncio.TimeoutError:
            text = f"body: {self._num_bytes} bytes came, then too little for {self._options.body_timeout:g} seconds"
            raise ApiError(408, text, code="body_timeout") from None
        self._note(message)
        if self._num_bytes > most:
            raise _too_long(self._num_bytes, most)
        return message

    def _seconds_left(self) -> float:
        """A client that sends something has ``body_timeout`` for the next piece, unless it is too slow in all."""
        now, allowed = time.monotonic(), self._options.body_timeout
        if self._began is None:
            self._began = now
        until = self._began + allowed + self._num_bytes / _MIN_BYTES_PER_SECOND
        return max(0.0, min(allowed, until - now))

    def _note(self, message: Message) -> None:
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
        else:
            self._whole = True  # the client has left

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._whole:
            self._closes = True
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        if self._closes and message["type"] == "http.response.body" and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _linger(self) -> None:
        until, start = time.monotonic() + _LINGER_SECONDS, self._num_bytes
        while not self._whole and self._num_bytes - start < _LINGER_BYTES:
            try:
                self._note(await asyncio.wait_for(self._receive(), max(0.0, until - time.monotonic())))
            except asyncio.TimeoutError:
                return


def _too_long(num_bytes: int, most: int) -> ApiError:
    return ApiError(413, f"body: found {num_bytes} bytes or more, this server takes {most}", code="body_too_long")
