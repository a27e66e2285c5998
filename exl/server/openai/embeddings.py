"""``POST /v1/embeddings``: a vector for each text (platform.openai.com/docs/api-reference/embeddings)."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from exl.embedding import ids_of
from exl.errors import ConfigError
from exl.server.bodies import Body, json_body, read_body
from exl.server.errors import ApiError, api_error
from exl.server.generation import run_together
from exl.server.openai.fields import Ignored
from exl.server.openai.prompts import Prompts
from exl.server.responses import json_response, unless_gone
from exl.server.served import ServedModel
from exl.server.state import Server

_AT_ONCE = 16  # texts of one request in the engine, which leaves its queue to others


class EmbeddingRequest(Body):
    input: Prompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, description="Only the model's own number.")
    # exl's own
    pooling: Literal["mean", "last"] = Field("mean", description="Of all tokens' states, or the last token's state.")
    normalize: bool = Field(True, description="Vectors get the length 1, as OpenAI's have.")

    user: Ignored = None


BODIES: tuple[type[BaseModel], ...] = (EmbeddingRequest,)


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/embeddings", openapi_extra=json_body(EmbeddingRequest), summary="Vectors of texts")
    async def embeddings(request: Request) -> Response:
        body = await read_body(request, EmbeddingRequest)
        async with server.models.use(body.model) as model:
            size = model.llm.config.hidden_size
            if body.dimensions not in (None, size):
                text = f"dimensions: found {body.dimensions}, this model's vectors have {size}"
                raise ApiError(400, text, param="dimensions")
            prompts = await server.in_thread(lambda: _encoded(model, body.input))
            journey = request.scope["journey"]
            journey.model, journey.submitted = model.name, time.perf_counter()
            journey.num_prompt = sum(map(len, prompts))
            vectors = await unless_gone(request, _vectors(server, model, body, prompts))
            return json_response(_told(model, body, vectors, journey.num_prompt))

    return routes


def _encoded(model: ServedModel, texts: Sequence[str | list[int]]) -> list[list[int]]:
    """Token ids of each text. All are checked before the first is computed."""
    found = []
    for i, text in enumerate(texts):
        where = "input" if len(texts) == 1 else f"input[{i}]"
        try:
            found.append(ids_of(model.llm.encode, model.context, where, text))
        except ConfigError as error:
            told = api_error(error)
            raise ApiError(told.status, told.message, code=told.code, param="input") from None
    return found


async def _vectors(
    server: Server, model: ServedModel, body: EmbeddingRequest, prompts: Sequence[list[int]]
) -> list[torch.Tensor]:
    """In the order of the prompts. Cancelled, what runs in the engine ends."""
    waiting = iter(range(len(prompts)))
    found: list[torch.Tensor | None] = [None] * len(prompts)

    async def take() -> None:
        for i in waiting:
            handle = await server.in_thread(lambda i=i: model.llm.submit_embed(  # type: ignore[misc]
                prompts[i], body.pooling, normalize=body.normalize, lora=model.adapter
            ))  # fmt: skip
            try:
                found[i] = await handle
            finally:
                handle.cancel()

    await run_together([take() for _ in range(min(_AT_ONCE, len(prompts)))])
    return [vector for vector in found if vector is not None]


def _told(model: ServedModel, body: EmbeddingRequest, vectors: Sequence[torch.Tensor], num_tokens: int) -> Any:
    as_text = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(vector) if as_text else vector.tolist()}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model.name, "usage": usage}


def _base64(vector: torch.Tensor) -> str:
    """Little-endian f32."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
