"""``POST /v1/chat/completions`` (platform.openai.com/docs/api-reference/chat)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from exl.server.bodies import json_body, read_body
from exl.server.errors import ApiError
from exl.server.generation import Generation
from exl.server.openai.begin import AskedChat, ChatFields, begin_chat, check_template_kwargs
from exl.server.openai.chat_answer import ChatAnswer
from exl.server.openai.fields import MAX_TOP_LOGPROBS, Ignored, StreamOptions, openai_event, refused
from exl.server.openai.messages import Effort, Message, ResponseFormat, Tool, chosen_tools, template_variables
from exl.server.responses import SSE_DONE, EventStream, json_response, unless_gone
from exl.server.served import Conversation, ServedModel
from exl.server.state import Server


class ChatRequest(ChatFields):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    # vLLM's names
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(
        None, description="The last message, an assistant's, is the beginning of the answer."
    )

    modalities: refused("this model writes text only", ["text"]) = None  # type: ignore[valid-type]
    audio: refused("this model makes no sound") = None  # type: ignore[valid-type]
    functions: refused("expected tools, which have replaced it") = None  # type: ignore[valid-type]
    function_call: refused("expected tool_choice, which has replaced it") = None  # type: ignore[valid-type]
    web_search_options: refused("this server searches nothing") = None  # type: ignore[valid-type]
    prediction: refused('exl\'s own guesses are speculate: "prompt" or "draft"') = None  # type: ignore[valid-type]
    moderation: refused("this server moderates nothing") = None  # type: ignore[valid-type]
    store: refused("this server keeps no answers", False) = None  # type: ignore[valid-type]
    verbosity: refused("the model is not asked for another length", "medium") = None  # type: ignore[valid-type]

    user: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None


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
        generation = await _begin(server, model, request, body)
        stack.callback(generation.close)
        answer = ChatAnswer(model, bool(body.stream_options and body.stream_options.include_usage))
        if not body.stream:
            choices = await unless_gone(request, generation.choices())
            return json_response(answer.whole(choices, generation))
        return EventStream(_events(answer, generation), openai_event, stack.pop_all())


def _conversation(body: ChatRequest, schema: Any) -> Conversation:
    """Raises ``ApiError``."""
    tools, choice = chosen_tools([tool.for_template() for tool in body.tools or ()], body.tool_choice)
    if body.continue_final_message and body.add_generation_prompt:
        text = "continue_final_message: found it with add_generation_prompt, expected one of the two"
        raise ApiError(400, text, param="continue_final_message")
    return Conversation(
        [message.for_template() for message in body.messages],
        tools,
        choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        json_schema=schema,
        variables=template_variables(body.reasoning_effort, body.chat_template_kwargs),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final=bool(body.continue_final_message),
        stop=body.stops,
    )


async def _begin(server: Server, model: ServedModel, request: Request, body: ChatRequest) -> Generation:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: found it without logprobs, expected both", param="top_logprobs")
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(400, "prompt_logprobs: found it with stream, expected one of the two", param="prompt_logprobs")
    max_tokens, tokens_field = body.max_tokens, "max_tokens"
    if max_tokens is None:
        max_tokens, tokens_field = body.max_completion_tokens, "max_completion_tokens"
    elif body.max_completion_tokens not in (None, max_tokens):
        text = "max_completion_tokens: found another number in max_tokens, expected one of the two"
        raise ApiError(400, text, param="max_completion_tokens")
    check_template_kwargs(model, body.chat_template_kwargs)
    wanted = None if body.response_format is None else body.response_format.schema_of()
    schema, schema_field = body.only_schema(wanted, "response_format")
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    conversation = _conversation(body, schema)
    asked = AskedChat(body, conversation, max_tokens, tokens_field, schema_field, top_logprobs)
    return await begin_chat(server, model, request, asked)


async def _events(answer: ChatAnswer, generation: Generation) -> AsyncGenerator[bytes, None]:
    async for update in generation.updates():
        if chunks := answer.chunks(update, generation):
            yield chunks
    yield answer.end(generation) + SSE_DONE
