"""``/health``, and the models: which there are, which are loaded, and loading them by hand."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from exl.server.bodies import Body, json_body, read_body
from exl.server.errors import RETRY_SECONDS
from exl.server.models import Models
from exl.server.residency import ModelState
from exl.server.responses import json_response
from exl.server.state import Server


class ModelRequest(Body):
    """Of llama-server's ``/models/load`` and ``/models/unload``."""

    model: str


BODIES: tuple[type[BaseModel], ...] = (ModelRequest,)


def router(server: Server) -> APIRouter:
    routes, models = APIRouter(), server.models

    @routes.get("/health", summary="200: requests are taken; 503: not yet, or no more")
    async def health() -> Response:
        return _health(server)

    @routes.get("/v1/models", summary="The models that clients may name")
    @routes.get("/models", summary="The same, where llama-server has it")
    async def list_models() -> Response:
        await models.refresh()
        return json_response({"object": "list", "data": _all_shown(models)})

    @routes.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> Response:
        return json_response(_shown(await models.named(name), name if name in models.adapters else None))

    @routes.post("/models/load", openapi_extra=json_body(ModelRequest), summary="Loads a model; answers when it is")
    async def load(request: Request) -> Response:
        await models.load((await read_body(request, ModelRequest)).model)
        return json_response({"success": True})

    @routes.post("/models/unload", openapi_extra=json_body(ModelRequest), summary="Unloads a model that is not in use")
    async def unload(request: Request) -> Response:
        await models.unload((await read_body(request, ModelRequest)).model)
        return json_response({"success": True})

    return routes


def _health(server: Server) -> Response:
    models = server.models
    if server.draining:
        return json_response({"status": "draining"}, 503, {"Retry-After": str(RETRY_SECONDS)})
    first = models.starting
    if first is not None:
        return json_response({"status": "loading model", "model": first.name, "progress": first.share}, 503)
    if models.failure is not None:
        return json_response({"status": "failed", "error": models.failure}, 503)
    return json_response({"status": "ok"})


def _all_shown(models: Models) -> list[dict[str, Any]]:
    """Models, and adapters behind the one that they are of."""
    found = [_shown(state) for state in models.states]
    if models.adapters:
        found[1:1] = [_shown(models.states[0], name) for name in models.adapters]
    return found


def _shown(state: ModelState, adapter: str | None = None) -> dict[str, Any]:
    """OpenAI's keys; ``status`` as llama-server's router has it (tools/server/README.md of ggml-org/llama.cpp, "Using
    multiple models"): "unloaded" with ``failed`` after a load that failed. ``memory``: bytes of the plan.
    An adapter has ``parent``, its model's name, as vLLM has it."""
    served = state.served
    status: dict[str, Any] = {"value": state.status, "progress": state.share}
    if state.status == "failed":
        status |= {"value": "unloaded", "failed": True, "error": state.error}
    found: dict[str, Any] = {
        "id": state.name,
        "object": "model",
        "created": 0 if served is None else served.created,
        "owned_by": "exl",
        "aliases": list(state.aliases),
        "status": status,
    }
    if served is not None:
        plan = served.llm.plan
        memory = {"exact": plan.exact_bytes, "at_most": plan.num_bytes}
        found |= {"max_model_len": served.context, "memory": memory}
    if adapter is not None:
        found |= {"id": adapter, "aliases": [], "parent": state.name}
    return found
