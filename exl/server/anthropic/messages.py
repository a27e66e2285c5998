"""``POST /v1/messages`` and ``/v1/messages/count_tokens`` (docs.anthropic.com/en/api/messages)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from exl.server.anthropic.answer import PING, MessageAnswer
from exl.server.anthropic.content import (
    InputMessage,
    OutputConfig,
    Texts,
    Thinking,
    ToolChoiceField,
    ToolDefinition,
    openai_messages,
    template_variables,
    tools_of,
)
from exl.server.bodies import Body, json_body, read_body
from exl.server.errors import ApiError, anthropic_body
from exl.server.generation import Generation
from exl.server.openai.begin import AskedChat, begin_chat
from exl.server.openai.fields import Ignored, SamplingFields, Timeout, refused
from exl.server.responses import EventStream, json_response, sse, unless_gone
from exl.server.served import Conversation
from exl.server.state import Server

# Edits of the conversation that leave it as it is.
_NO_EDITS: tuple[dict[str, Any], ...] = ({"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]})


class ConversationFields(Body):
    """What makes the prompt."""

    model: str | None = None
    messages: list[InputMessage] = Field(min_length=1)
    system: Texts | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoiceField | None = None
    thinking: Thinking | None = Field(None, description="Without it the template is told that none is wanted.")
    output_config: OutputConfig | None = None
    cache_control: Ignored = None  # what the cache holds is found by itself
    context_management: refused("conversations are not edited", *_NO_EDITS) = None  # type: ignore[valid-type]
    mcp_servers: refused("this server calls no others", []) = None  # type: ignore[valid-type]
    speed: refused("there is one speed", "standard") = None  # type: ignore[valid-type]
    user_profile_id: Ignored = None


class CountRequest(ConversationFields):
    """The fields of a message's request that make its prompt."""


class MessagesRequest(ConversationFields, SamplingFields):  # type: ignore[valid-type, misc]
    """Beside Anthropic's fields, exl's own sampling options."""

    max_tokens: int = Field(ge=0)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    timeout: Timeout = None
    metadata: Ignored = None
    service_tier: Ignored = None
    container: refused("this server runs no code") = None  # type: ignore[valid-type]
    diagnostics: refused("the cache is not explained") = None  # type: ignore[valid-type]
    inference_geo: refused("this server is where it is") = None  # type: ignore[valid-type]

    @property
    def stop(self) -> list[str] | None:
        return self.stop_sequences or None


BODIES: tuple[type[BaseModel], ...] = (MessagesRequest, CountRequest)


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/messages", openapi_extra=json_body(MessagesRequest), summary="Answers a conversation")
    async def messages(request: Request) -> Response:
        return await _answer(server, request, await read_body(request, MessagesRequest))

    @routes.post(
        "/v1/messages/count_tokens",
        openapi_extra=json_body(CountRequest),
        summary="How long a conversation's prompt is",
    )
    async def count_tokens(request: Request) -> Response:
        body = await read_body(request, CountRequest)
        async with server.models.use(body.model) as model:
            conversation = _conversation(body)
            prepared = await server.in_thread(lambda: model.prepare(conversation))
            return json_response({"input_tokens": len(prepared.prompt_ids)})

    return routes


async def _answer(server: Server, request: Request, body: MessagesRequest) -> Response:
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(server.models.use(body.model))
        conversation = _conversation(body, body.stop or ())
        asked = AskedChat(body, conversation, body.max_tokens, schema_field="output_config.format")
        generation = await begin_chat(server, model, request, asked)
        stack.callback(generation.close)
        omits = body.thinking is not None and body.thinking.display == "omitted"
        answer = MessageAnswer(model.name, body.stop or (), omits)
        if not body.stream:
            (choice,) = await unless_gone(request, generation.choices())
            return json_response(answer.whole(choice, generation.usage))
        return EventStream(
            _events(answer, generation), lambda error: sse(anthropic_body(error), "error"), stack.pop_all(), PING
        )


async def _events(answer: MessageAnswer, generation: Generation) -> AsyncGenerator[bytes, None]:
    yield answer.start(generation.journey.num_prompt)
    async for update in generation.updates():
        if events := answer.events(update, generation):
            yield events


def _conversation(body: ConversationFields, stop: Sequence[str] = ()) -> Conversation:
    """Raises ``ApiError``."""
    messages = openai_messages(body.system, body.messages)
    continues = _continues(messages)
    tools, choice = tools_of(body.tools, body.tool_choice)
    output = body.output_config
    return Conversation(
        messages,
        tools,
        choice,
        parallel_tool_calls=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        json_schema=None if output is None or output.format is None else output.format.schema_,
        variables=template_variables(body.thinking, output),
        continue_final=continues,
        stop=stop,
    )


def _continues(messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is the beginning of the answer; an empty one is taken away. Raises ``ApiError`` if
    nothing can go on from it."""
    last = messages[-1]
    if last["role"] != "assistant":
        return False
    for key, found in (("tool_calls", "a tool_use"), ("reasoning_content", "thinking")):
        if key in last:
            text = f"messages: found {found} in the last one, an assistant's, expected the beginning of an answer"
            raise ApiError(400, text, param="messages")
    content = last["content"]
    begun = content if isinstance(content, str) else content[-1]["text"]
    if begun != begun.rstrip():
        text = "messages: the last one, an assistant's, ends with white space, expected none: tokens begin with it"
        raise ApiError(400, text, param="messages")
    if not content:
        messages.pop()
    return bool(content)
