"""``POST /v1/completions``: a prompt goes on (platform.openai.com/docs/api-reference/completions)."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from exl.parse.parts import Text
from exl.server.bodies import json_body, read_body
from exl.server.errors import ApiError
from exl.server.generation import Choice, Generation, Job, Update, run_together, together, total
from exl.server.openai.fields import (
    MAX_TOP_LOGPROBS,
    GenerationFields,
    Ignored,
    StreamOptions,
    counts_of,
    finish_reason,
    openai_event,
    refused,
    request_options,
)
from exl.server.openai.logprobs import LegacyLogprobs
from exl.server.openai.prompts import Prompts
from exl.server.responses import SSE_DONE, EventStream, json_bytes, json_response, sse, unless_gone
from exl.server.served import ServedModel
from exl.server.state import Server

_DEFAULT_TOKENS = 16  # OpenAI's


class CompletionRequest(GenerationFields):
    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = Field(
        None, description="Whether a text gets the model's BOS; by default it does."
    )

    suffix: refused("this model fills no gaps") = None  # type: ignore[valid-type]
    user: Ignored = None


BODIES: tuple[type[BaseModel], ...] = (CompletionRequest,)


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions", openapi_extra=json_body(CompletionRequest), summary="Continues prompts")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionRequest)
        return await _answer(server, request, body)

    return routes


async def _answer(server: Server, request: Request, body: CompletionRequest) -> Response:
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(server.models.use(body.model))
        prompts = await server.in_thread(lambda: [_encoded(model, body, prompt) for prompt in body.prompt])
        jobs = [_job(server, model, body, prompt) for prompt in prompts]
        generations = []
        for job in jobs:
            generations.append(await Generation.begin(server, model, job, request.scope["journey"]))
            stack.callback(generations[-1].close)
        told = _Told(model, body, generations)
        if not body.stream:
            found = await unless_gone(request, run_together([generation.choices() for generation in generations]))
            return json_response(told.whole(found))
        return EventStream(_events(told, generations), openai_event, stack.pop_all())


def _encoded(model: ServedModel, body: CompletionRequest, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return model.text_prompt(prompt, bos=body.add_special_tokens is not False)
    return model.llm.encode(prompt)


def _job(server: Server, model: ServedModel, body: CompletionRequest, prompt: list[int]) -> Job:
    if body.prompt_logprobs is not None:
        text = "prompt_logprobs: expected echo with logprobs, which tell them here"
        raise ApiError(400, text, param="prompt_logprobs")
    options = request_options(server, body, model.context - len(prompt), _DEFAULT_TOKENS)
    if body.logprobs is not None:
        options["top_logprobs"] = body.logprobs
        if body.echo:
            options["prompt_logprobs"] = body.logprobs
    return Job(prompt, options)


async def _events(told: _Told, generations: Sequence[Generation]) -> AsyncGenerator[bytes, None]:
    async with aclosing(together([generation.updates() for generation in generations])) as updates:
        async for place, update in updates:
            if chunk := told.chunk(place, update):
                yield chunk
    yield told.end() + SSE_DONE


class _Told:
    """Answers in OpenAI's words, whole or in chunks. Choices of the first prompt come first."""

    def __init__(self, model: ServedModel, body: CompletionRequest, generations: Sequence[Generation]) -> None:
        self._model, self._body, self._generations = model, body, generations
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        self._begin = b"data: " + json_bytes(self._head)[:-1] + b',"choices":['
        self._wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._close = b'],"usage":null}\n\n' if self._wants_usage else b"]}\n\n"
        self._logprobs: dict[int, LegacyLogprobs] = {}
        self._began: set[int] = set()

    def whole(self, found: Sequence[Sequence[Choice]]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for place, answers in enumerate(found):
            for choice in answers:
                text = "".join(part.text for part in choice.parts if isinstance(part, Text))
                reason = finish_reason(choice.outcome, True, False)
                choices.append(self._choice(place, len(choices), text, choice.logprobs or (), reason))
        return {**self._head, "choices": choices, **self._counts()}

    def chunk(self, place: int, update: Update) -> bytes:
        text = "".join(part.text for part in update.parts if isinstance(part, Text))
        index = place * self._generations[place].num_choices + update.choice
        is_first = index not in self._began
        if not text and not update.logprobs and update.outcome is None and not (is_first and self._body.echo):
            return b""
        reason = None if update.outcome is None else finish_reason(update.outcome, True, False)
        shown = self._choice(place, index, text, update.logprobs or (), reason)
        return self._begin + json_bytes(shown) + self._close

    def end(self) -> bytes:
        return sse({**self._head, "choices": [], **self._counts()}) if self._wants_usage else b""

    def _counts(self) -> dict[str, Any]:
        return counts_of(total([generation.usage for generation in self._generations]))

    def _choice(self, place: int, index: int, text: str, tokens: Sequence[Any], reason: str | None) -> dict[str, Any]:
        is_first = index not in self._began
        self._began.add(index)
        prompt: Sequence[Any] = ()
        if is_first and self._body.echo:
            text = self._prompt_text(place) + text
            prompt = self._generations[place].prompt_logprobs() or ()
        shown = None
        if self._body.logprobs is not None:
            shown = self._logprobs_of(place, index).shown([*prompt, *tokens])
        return {"text": text, "index": index, "logprobs": shown, "finish_reason": reason}

    def _logprobs_of(self, place: int, index: int) -> LegacyLogprobs:
        if index not in self._logprobs:
            ids = self._generations[place].prompt_ids
            self._logprobs[index] = LegacyLogprobs(self._model.llm.tokenizer, ids, echo=bool(self._body.echo))
        return self._logprobs[index]

    def _prompt_text(self, place: int) -> str:
        given = self._body.prompt[place]
        return given if isinstance(given, str) else self._model.llm.tokenizer.decode(given)
