"""The ASGI application: every protocol's routes over one ``Server``, and how errors are told."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import exl
from exl.errors import ConfigError
from exl.server import health, llama, metrics, page, tgi
from exl.server.anthropic import messages
from exl.server.bodies import body_schemas
from exl.server.errors import ApiError, api_error, error_body
from exl.server.gate import Gate, Prefix
from exl.server.journeys import CLIENT_GONE, GONE_STATUS, Journeys, note_error
from exl.server.openai import chat, completions, embeddings, responses
from exl.server.request_body import BodyBounds
from exl.server.responses import json_response
from exl.server.state import Server

# Each protocol's module has ``router(server)`` and ``BODIES``: the models of its requests' bodies.
_PROTOCOLS: tuple[Any, ...] = (health, metrics, page, chat, completions, embeddings, responses, messages, llama, tgi)
# Newer versions of FastAPI have spans of their own, which would stand beside those of ``traces.py``, and environment
# variables would decide where they go. Older versions take the argument and do nothing.
_NO_TELEMETRY: Any = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)


def create_app(server: Server) -> ASGIApp:
    """The whole application. Nothing of it runs before its first request. Raises ``ConfigError``."""
    prefix = server.options.root_path
    servers = [{"url": prefix}] if prefix else None
    app = FastAPI(
        title="exl", version=exl.__version__, docs_url=None, redoc_url=None, servers=servers, telemetry=_NO_TELEMETRY
    )
    bodies: dict[str, type[BaseModel]] = {}
    for protocol in _PROTOCOLS:
        router: APIRouter = protocol.router(server)
        _check_prefix(router, prefix)
        app.include_router(router)
        bodies |= {model.__name__: model for model in protocol.BODIES}
    _describe(app, bodies)

    async def tell(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            text = f"{request.method} {request.scope['path'][:200]}: {error.detail}"
            error = ApiError(error.status_code, text, headers=dict(error.headers or {}))
        if isinstance(error, RequestValidationError):  # of a path or a query; bodies are not FastAPI's
            found = error.errors()[0]
            error = ApiError(422, f"{found['loc'][-1]}: {found['msg']}", code="invalid_value")
        if isinstance(error, CLIENT_GONE):
            request.scope["journey"].error = "the client has left"
            return Response(status_code=GONE_STATUS)  # for the log; nobody gets it
        told = api_error(error)
        note_error(request.scope["journey"], error)
        return json_response(error_body(request.scope["path"], told), told.status, told.headers)

    for kind in (ApiError, HTTPException, RequestValidationError, exl.ExlError, *CLIENT_GONE, Exception):
        app.add_exception_handler(kind, tell)
    guarded: ASGIApp = Journeys(Gate(app, server), server, tell)
    if server.options.cors_origins:
        exposed = ["x-request-id", "retry-after"]
        guarded = CORSMiddleware(guarded, server.options.cors_origins, ["*"], ["*"], expose_headers=exposed)
    return Prefix(BodyBounds(guarded, server.options), prefix)


def _check_prefix(router: APIRouter, prefix: str) -> None:
    """A path that begins with the prefix must be one that the proxy has passed on whole."""
    for route in router.routes:
        path = getattr(route, "path", "")
        if prefix and (path == prefix or path.startswith(f"{prefix}/")):
            raise ConfigError(f"root_path: found {prefix!r}, with which the server's own path {path} begins")


def _describe(app: FastAPI, bodies: dict[str, type[BaseModel]]) -> None:
    """The OpenAPI document, with the schemas of all bodies; made when it is first asked for."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {}).setdefault("schemas", {}).update(body_schemas(bodies))
        return document

    app.openapi = openapi  # type: ignore[method-assign]
