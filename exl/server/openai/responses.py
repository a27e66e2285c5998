"""``POST /v1/responses`` without a memory (platform.openai.com/docs/api-reference/responses)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from exl.server.bodies import Body, json_body, read_body
from exl.server.errors import ApiError
from exl.server.generation import Generation
from exl.server.openai.begin import AskedChat, ChatFields, begin_chat, check_template_kwargs
from exl.server.openai.fields import MAX_TOP_LOGPROBS, Ignored, refused
from exl.server.openai.messages import Effort, chosen_tools, template_variables
from exl.server.openai.response_answer import ResponseAnswer
from exl.server.openai.response_items import Input, ResponseTool, TextConfig, messages_of
from exl.server.responses import EventStream, json_response, unless_gone
from exl.server.served import Conversation, ServedModel
from exl.server.state import Server

_LOGPROBS = "message.output_text.logprobs"
_NO_MEMORY = "this server keeps no answers: send the whole conversation as input"


class ReasoningConfig(Body):
    effort: Effort | None = None
    summary: Ignored = None
    generate_summary: Ignored = None
    context: Ignored = None


class ResponseStreamOptions(Body):
    include_obfuscation: Ignored = None


class ResponsesRequest(ChatFields):
    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextConfig | None = None
    tools: list[ResponseTool] | None = None
    reasoning: ReasoningConfig | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    include: list[str] | None = None

    n: refused("a response has one answer", 1) = None  # type: ignore[valid-type]
    max_tokens: refused("expected max_output_tokens") = None  # type: ignore[valid-type]
    prompt_logprobs: refused("expected /v1/chat/completions, which tells them") = None  # type: ignore
    previous_response_id: refused(_NO_MEMORY) = None  # type: ignore[valid-type]
    conversation: refused(_NO_MEMORY) = None  # type: ignore[valid-type]
    store: refused("this server keeps no answers", False) = None  # type: ignore[valid-type]
    background: refused("this server keeps no answers", False) = None  # type: ignore[valid-type]
    prompt: refused("this server keeps no prompts") = None  # type: ignore[valid-type]
    truncation: refused("this server drops nothing of a conversation", "disabled") = None  # type: ignore[valid-type]
    max_tool_calls: refused("this server runs no tools") = None  # type: ignore[valid-type]
    context_management: refused("this server drops nothing of a conversation") = None  # type: ignore[valid-type]
    moderation: refused("this server moderates nothing") = None  # type: ignore[valid-type]

    stream_options: ResponseStreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None


BODIES: tuple[type[BaseModel], ...] = (ResponsesRequest,)


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/responses", openapi_extra=json_body(ResponsesRequest), summary="Answers a conversation, as items")
    async def responses(request: Request) -> Response:
        body = await read_body(request, ResponsesRequest)
        return await _answer(server, request, body)

    return routes


async def _answer(server: Server, request: Request, body: ResponsesRequest) -> Response:
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(server.models.use(body.model))
        check_template_kwargs(model, body.chat_template_kwargs)
        with_logprobs = _wants_logprobs(body)
        top_logprobs = (body.top_logprobs or 0) if with_logprobs else None
        form = None if body.text is None else body.text.format
        schema, schema_field = body.only_schema(None if form is None else form.schema_of(), "text.format")
        conversation, limit = _conversation(body, schema), body.max_output_tokens
        asked = AskedChat(body, conversation, limit, "max_output_tokens", schema_field, top_logprobs)
        generation = await begin_chat(server, model, request, asked)
        stack.callback(generation.close)
        answer = ResponseAnswer(_echoed(model, body), with_logprobs)
        if not body.stream:
            (choice,) = await unless_gone(request, generation.choices())
            answer.take(choice.parts, choice.logprobs)
            answer.end(choice.outcome, choice.is_whole, generation.usage)
            return json_response(answer.response)
        return EventStream(_events(answer, generation), answer.fail, stack.pop_all())


async def _events(answer: ResponseAnswer, generation: Generation) -> AsyncGenerator[bytes, None]:
    yield answer.begin()
    outcome, is_whole = None, True
    async for update in generation.updates():
        if events := answer.take(update.parts, update.logprobs):
            yield events
        if update.outcome is not None:
            outcome, is_whole = update.outcome, update.is_whole
    yield answer.end(outcome, is_whole, generation.usage)


def _conversation(body: ResponsesRequest, schema: Any) -> Conversation:
    """Raises ``ApiError``."""
    tools, choice = chosen_tools([tool.for_template() for tool in body.tools or ()], body.tool_choice)
    effort = None if body.reasoning is None else body.reasoning.effort
    return Conversation(
        messages_of(body.input, body.instructions),
        tools,
        choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        json_schema=schema,
        variables=template_variables(effort, body.chat_template_kwargs),
        stop=body.stops,
    )


def _wants_logprobs(body: ResponsesRequest) -> bool:
    known = (_LOGPROBS, "reasoning.encrypted_content")
    for name in body.include or ():
        if name not in known:
            text = f"include: found {name!r}, expected {' or '.join(map(repr, known))}"
            raise ApiError(400, text, param="include")
    return _LOGPROBS in (body.include or ()) or body.top_logprobs is not None


def _echoed(model: ServedModel, body: ResponsesRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    text: dict[str, Any] = {"format": {"type": "text"}}
    if body.text is not None and body.text.format is not None:
        text = {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)}
    effort = None if body.reasoning is None else body.reasoning.effort
    return {
        "model": model.name,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "store": False,
        "temperature": body.temperature,
        "text": text,
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool.shown() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
