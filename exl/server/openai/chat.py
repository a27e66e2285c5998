"""``POST /v1/chat/completions`` (platform.openai.com/docs/api-reference/chat)."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from exl.parse.parts import Part, Reasoning, Text
from exl.server.bodies import Body, Json, json_body, read_body
from exl.server.errors import openai_body
from exl.server.generation import Choice, Generation, Job, Update, Usage
from exl.server.journeys import note_error
from exl.server.openai.fields import GenerationFields, finish_reason, request_options, usage_of
from exl.server.responses import SSE_DONE, EventStream, json_response, sse, unless_gone, without_none
from exl.server.served import ServedModel
from exl.server.state import Server


class StreamOptions(Body):
    include_usage: bool | None = None


class ChatRequest(GenerationFields):
    messages: list[dict[str, Json]] = Field(min_length=1)
    max_completion_tokens: int | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


BODIES: tuple[type[BaseModel], ...] = (ChatRequest,)


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", openapi_extra=json_body(ChatRequest), summary="Answers a conversation")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatRequest)
        return await _answer(server, request, body)

    return routes


async def _answer(server: Server, request: Request, body: ChatRequest) -> Response:
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(server.models.use(body.model))
        job = await _job(server, model, body)
        generation = await Generation.begin(server, model, job, request.scope["journey"])
        stack.callback(generation.close)
        told = _Told(model.name)
        if not body.stream:
            choices = await unless_gone(request, generation.choices())
            return json_response(told.whole(choices, generation.usage))
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(
            _events(told, generation, wants_usage),
            lambda error: sse(openai_body(error)),
            lambda error: note_error(generation.journey, error),
            stack.pop_all(),
        )


async def _job(server: Server, model: ServedModel, body: ChatRequest) -> Job:
    prompt = await server.in_thread(lambda: model.chat_prompt(body.messages))
    options = request_options(server, body, model.context - len(prompt))
    return Job(prompt, options, lambda: model.parser(prompt, None, ()))


async def _events(told: _Told, generation: Generation, wants_usage: bool) -> AsyncGenerator[bytes, None]:
    for choice in range(generation.num_choices):
        yield told.chunk(choice, {"role": "assistant", "content": ""})
    async for update in generation.updates():
        for event in told.chunks(update):
            yield event
    if wants_usage:
        yield told.usage_chunk(generation.usage)
    yield SSE_DONE


class _Told:
    """An answer in OpenAI's words, whole or in chunks."""

    def __init__(self, model: str) -> None:
        self._id, self._created, self._model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": i,
                    "message": _message(choice.parts),
                    "finish_reason": finish_reason(choice.outcome, choice.parts),
                }
                for i, choice in enumerate(choices)
            ],
            "usage": usage_of(usage),
            "timings": usage.timings(),
        }

    def chunks(self, update: Update) -> list[bytes]:
        found = [self.chunk(update.choice, delta) for delta in map(_delta, update.parts) if delta]
        if update.outcome is not None:
            found.append(self.chunk(update.choice, {}, finish_reason(update.outcome, update.parts)))
        return found

    def chunk(self, choice: int, delta: Mapping[str, Any], reason: str | None = None) -> bytes:
        shown = {"index": choice, "delta": delta, "finish_reason": reason}
        return sse({**self._head("chat.completion.chunk"), "choices": [shown]})

    def usage_chunk(self, usage: Usage) -> bytes:
        head = self._head("chat.completion.chunk")
        return sse({**head, "choices": [], "usage": usage_of(usage), "timings": usage.timings()})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}


def _message(parts: Sequence[Part]) -> dict[str, Any]:
    text = "".join(part.text for part in parts if isinstance(part, Text))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    return without_none({"role": "assistant", "content": text, "reasoning_content": reasoning or None})


def _delta(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"content": part.text}
    return {"reasoning_content": part.text} if isinstance(part, Reasoning) else {}
