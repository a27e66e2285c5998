"""What the two chat routes share: from a conversation to a generation, and its stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack

from fastapi import Request
from pydantic import Field

from exl.errors import ConfigError
from exl.request_options import CONSTRAINTS, RequestOptions
from exl.server.errors import ApiError, openai_body
from exl.server.generation import Generation, Job
from exl.server.journeys import note_error
from exl.server.openai.fields import GenerationFields, JsonObject, Written, request_options
from exl.server.responses import EventStream, sse
from exl.server.served import Conversation, PreparedChat, ServedModel
from exl.server.state import Server
from exl.server.watch import Journey


class ChatFields(GenerationFields):
    """What may be asked of any chat."""

    tool_choice: Written = None
    parallel_tool_calls: bool | None = None
    # vLLM's name
    chat_template_kwargs: JsonObject | None = Field(None, description="Variables of the chat template.")


async def begin_chat(
    server: Server,
    model: ServedModel,
    request: Request,
    body: ChatFields,
    conversation: Conversation,
    max_tokens: int | None,
    top_logprobs: int | None,
    schema_field: str,
) -> Generation:
    """Renders the conversation and asks the engine. ``body``: all other options; ``schema_field``: where its protocol
    has the schema of an answer. Raises ``ApiError``, ``ExlError``."""
    prepared = await _prepared(server, model, body, conversation)
    asked = body.model_copy(update={"max_tokens": max_tokens, "json_schema": None})
    options = request_options(server, asked, model.context - len(prepared.prompt_ids))
    if prepared.constraint:
        _constrain(options, prepared, schema_field)
    if prepared.stop:
        options["stop"] = (*(options.get("stop") or ()), *prepared.stop)
    if top_logprobs is not None:
        options["top_logprobs"] = top_logprobs
    job = Job(prepared.prompt_ids, options, prepared.make_parser)
    try:
        return await Generation.begin(server, model, job, request.scope["journey"])
    except ConfigError as error:
        name, _, words = str(error).partition(": ")
        if name not in prepared.constraint or body.json_schema is not None:
            raise
        field = "tools" if conversation.json_schema is None else schema_field
        raise ApiError(400, f"{field}: {words}", param=field) from None


async def _prepared(server: Server, model: ServedModel, body: ChatFields, conversation: Conversation) -> PreparedChat:
    """What exl calls variables is chat_template_kwargs here."""
    name = "chat_template_kwargs"
    if body.chat_template_kwargs and model.llm.tokenizer.chat_template is None:
        raise ApiError(400, f"{name}: this model has no chat template", param=name)
    try:
        return await server.in_thread(lambda: model.prepare(conversation))
    except ConfigError as error:
        where, _, words = str(error).partition(": ")
        if where != "variables":
            raise
        raise ApiError(400, f"{name}: {words}", param=name) from None


def _constrain(options: RequestOptions, prepared: PreparedChat, schema_field: str) -> None:
    given = next((name for name in CONSTRAINTS if options.get(name) is not None), None)
    if given is not None:
        text = f"{given}: found it with {schema_field} or tools that constrain the answer: expected one of them"
        raise ApiError(400, text, param=given)
    options.update(prepared.constraint)  # type: ignore[typeddict-item]


def event_stream(
    events: AsyncGenerator[bytes, None],
    journey: Journey,
    resources: AsyncExitStack,
    tell: Callable[[ApiError], bytes] = lambda error: sse(openai_body(error)),
) -> EventStream:
    return EventStream(events, tell, lambda error: note_error(journey, error), resources)
