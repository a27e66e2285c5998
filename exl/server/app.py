"""The ASGI application: every protocol's routes over one ``Server``, and how errors are told."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import exl
from exl.server import health
from exl.server.bodies import body_schemas
from exl.server.errors import ApiError, api_error, error_body
from exl.server.journeys import Journeys, note_error
from exl.server.openai import chat, completions, embeddings, responses
from exl.server.responses import json_response
from exl.server.state import Server

# Each protocol's module has ``router(server)`` and ``BODIES``: the models of its requests' bodies.
_PROTOCOLS: tuple[Any, ...] = (health, chat, completions, embeddings, responses)


def create_app(server: Server) -> ASGIApp:
    """The whole application. Nothing of it runs before its first request."""
    app = FastAPI(title="exl", version=exl.__version__, docs_url=None, redoc_url=None)
    bodies: dict[str, type[BaseModel]] = {}
    for protocol in _PROTOCOLS:
        router: APIRouter = protocol.router(server)
        app.include_router(router)
        bodies |= {model.__name__: model for model in protocol.BODIES}
    _describe(app, bodies)

    async def tell(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        told = api_error(error)
        note_error(request.scope["journey"], error)
        return json_response(error_body(request.scope["path"], told), told.status, told.headers)

    for kind in (ApiError, HTTPException, exl.ExlError):
        app.add_exception_handler(kind, tell)
    return Journeys(app, server, tell)


def _describe(app: FastAPI, bodies: dict[str, type[BaseModel]]) -> None:
    """The OpenAPI document, with the schemas of all bodies; made when it is first asked for."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {}).setdefault("schemas", {}).update(body_schemas(bodies))
        return document

    app.openapi = openapi  # type: ignore[method-assign]
