"""Answers as they leave: JSON, streams of server-sent events, and a client that leaves before the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from exl.server.errors import ApiError, ClientGone, api_error
from exl.server.journeys import note_error
from exl.server.watch import Journey

T = TypeVar("T")
_PING_SECONDS = 15.0  # proxies close streams that are silent for a minute
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect the pieces


def json_bytes(value: object) -> bytes:
    """UTF-8. What is no character, as a lone surrogate of a client's own text, is written as "?"."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status, headers, "application/json")


def sse(value: object, event: str | None = None) -> bytes:
    """One server-sent event (html.spec.whatwg.org/multipage/server-sent-events.html)."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + json_bytes(value) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"
SSE_PING = b": ping\n\n"


class EventStream(Response):
    """A stream of server-sent events. An error after its beginning, when the status is gone, is its last event. A
    client that leaves closes ``events``, and with that its request. Pings tell that the server lives."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        tell_error: Callable[[ApiError], bytes],
        resources: AsyncExitStack,
        ping: bytes = SSE_PING,
    ) -> None:
        """``tell_error`` makes the event of an error. ``resources`` are closed at the end, also if no event was ever
        asked for."""
        self.status_code, self.media_type, self.background = 200, "text/event-stream", None
        self.init_headers(_STREAM_HEADERS)
        self._events, self._tell_error, self._resources, self._ping = events, tell_error, resources, ping
        self._last = 0.0  # when something was sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks: list[asyncio.Future[Any]] = []
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._last = asyncio.get_running_loop().time()
            works = self._send_all(send, scope["journey"]), self._send_pings(send), _gone(receive)
            tasks += map(asyncio.ensure_future, works)
            await asyncio.wait((tasks[0], tasks[2]), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end(tasks)
            await self._events.aclose()
            await self._resources.aclose()

    async def _send_all(self, send: Send, journey: Journey) -> None:
        try:
            async for event in self._events:
                self._last = asyncio.get_running_loop().time()
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            note_error(journey, error)
            await send({"type": "http.response.body", "body": self._tell_error(api_error(error)), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_pings(self, send: Send) -> None:
        while True:
            await asyncio.sleep(_PING_SECONDS / 3)
            if asyncio.get_running_loop().time() - self._last >= _PING_SECONDS:
                self._last = asyncio.get_running_loop().time()
                await send({"type": "http.response.body", "body": self._ping, "more_body": True})


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancels what has not ended, and waits for it."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What ``work`` returns; it is cancelled if the client leaves: ``ClientGone``, which nobody reads."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        await _end(tasks)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
