"""``/health``, while models load, and ``/v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel

from exl.server.models import ModelState
from exl.server.responses import json_response
from exl.server.state import Server

BODIES: tuple[type[BaseModel], ...] = ()


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health", summary="200: requests are taken; 503: not yet, or no more")
    async def health() -> Response:
        if server.draining:
            return json_response({"status": "draining"}, 503)
        first = server.models.states[0]
        if first.status == "loading":
            return json_response({"status": "loading model", "model": first.name, "progress": first.share}, 503)
        if first.status == "failed":
            return json_response({"status": "failed", "model": first.name, "error": first.error}, 503)
        return json_response({"status": "ok"})

    @routes.get("/v1/models", summary="The models that clients may name")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_shown(state) for state in server.models.states]})

    @routes.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> Response:
        return json_response(_shown(server.models.find(name)))

    return routes


def _shown(state: ModelState) -> dict[str, Any]:
    """OpenAI's keys; ``status`` as llama-server has it."""
    served = state.served
    found: dict[str, Any] = {
        "id": state.name,
        "object": "model",
        "created": 0 if served is None else served.created,
        "owned_by": "exl",
        "status": {"value": state.status, "progress": state.share},
    }
    if served is not None:
        found["max_model_len"] = served.context
    return found
