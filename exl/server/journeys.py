"""Each request has a ``Journey`` from its first byte to its last, and an id that its client and the log share."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from exl.server.errors import ClientGone, api_error
from exl.server.state import Server
from exl.server.watch import CURRENT_JOURNEY, Journey

LOG = logging.getLogger("exl.server")
CLIENT_GONE = (ClientGone, ClientDisconnect)
GONE_STATUS = 499  # nginx's number for a client that left before its answer


def note_error(journey: Journey, error: Exception) -> None:
    """For logs and traces. An error that nobody expected is logged with its traceback."""
    journey.error = str(error) or type(error).__name__
    if api_error(error).status == 500:
        LOG.error("request %s failed", journey.request_id, exc_info=error)


class Journeys:
    """Gives each request its ``Journey`` in ``scope["journey"]`` and an ``X-Request-Id``, and tells who looks on of its
    end. Also answers where the routes raised what nobody expected, or the client has left."""

    def __init__(self, app: ASGIApp, server: Server, tell: Callable[[Request, Exception], Awaitable[Response]]) -> None:
        self._app, self._server, self._tell = app, server, tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:128]
        if not request_id.isascii() or not request_id.replace("-", "").replace("_", "").isalnum():
            request_id = uuid.uuid4().hex
        journey = scope["journey"] = Journey(request_id, "unknown", scope["method"], scope["path"])
        CURRENT_JOURNEY.set(journey)
        host, port = scope.get("client") or ("", 0)
        journey.client = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        journey.traceparent = headers.get(b"traceparent", b"").decode("latin-1") or None

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                journey.status = message["status"]
                own = [(b"x-request-id", request_id.encode()), *_model_headers(journey)]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        self._server.num_open += 1
        self._server.num_requests += 1
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if journey.status is None:  # else it is told, and raised once more by the framework
                response = await self._tell(Request(scope), error)
                await response(scope, receive, send_with_id)
        finally:
            self._server.num_open -= 1
            route = scope.get("route")
            journey.route = getattr(route, "path", "unknown")
            for watch in self._server.watches:
                watch.responded(journey)


def _model_headers(journey: Journey) -> list[tuple[bytes, bytes]]:
    """Tell a client that it waited for its model: how many seconds, and whether it was loaded for it."""
    found = []
    if journey.model_wait >= 0.0005:
        found.append((b"x-exl-model-wait", f"{journey.model_wait:.3f}".encode()))
    if journey.loaded_model:
        found.append((b"x-exl-model-loaded", b"1"))
    return found
