"""What the routes for chats share: from a conversation to a generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import BaseModel, Field

from exl.request_options import CONSTRAINTS, RequestOptions
from exl.server.errors import ApiError, told_as
from exl.server.generation import Generation, Job
from exl.server.openai.fields import GenerationFields, JsonObject, Written, request_options
from exl.server.served import Conversation, ServedModel
from exl.server.state import Server

TEMPLATE_NAMES = {"variables": "chat_template_kwargs"}  # exl's name and vLLM's


class ChatFields(GenerationFields):
    """What may be asked of any chat."""

    tool_choice: Written = None
    parallel_tool_calls: bool | None = None
    # vLLM's name
    chat_template_kwargs: JsonObject | None = Field(None, description="Variables of the chat template.")

    @property
    def stops(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or ()

    def only_schema(self, wanted: Any, field: str) -> tuple[Any, str]:
        """The schema that the answer must follow, and the field that has it. ``wanted``: that of OpenAI's own field,
        or None. Raises ``ApiError`` for two schemas."""
        if wanted is None:
            return self.json_schema, "json_schema"
        if self.json_schema is not None:
            raise ApiError(400, f"{field}: found it and json_schema, expected one of the two", param=field)
        return wanted, field


@dataclass(frozen=True)
class AskedChat:
    """A chat as its protocol's body asks for it. Errors name the fields that the protocol has."""

    body: BaseModel  # with ``SamplingFields``: all options but those here
    conversation: Conversation
    max_tokens: int | None
    tokens_field: str = "max_tokens"
    schema_field: str = "json_schema"  # has the conversation's schema
    top_logprobs: int | None = None


async def begin_chat(server: Server, model: ServedModel, request: Request, asked: AskedChat) -> Generation:
    """Renders the conversation and asks the engine. Raises ``ApiError``, ``ExlError``."""
    conversation = asked.conversation
    with told_as(TEMPLATE_NAMES):
        prepared = await server.in_thread(lambda: model.prepare(conversation))
    constrains = asked.schema_field if conversation.follows_schema else "tools"
    names = {"max_tokens": asked.tokens_field, **dict.fromkeys(prepared.constraint, constrains)}
    body = asked.body.model_copy(update={"max_tokens": asked.max_tokens})
    with told_as(names):
        options = request_options(server, body, model.context - len(prepared.prompt_ids))
    options.pop("json_schema", None)  # the conversation has it
    if prepared.constraint:
        _check_unconstrained(options, asked.schema_field)
    options = prepared.added_to(options)
    if asked.top_logprobs is not None:
        options["top_logprobs"] = asked.top_logprobs
    with told_as(names):
        job = Job(prepared.prompt_ids, options, prepared.make_parser)
        return await Generation.begin(server, model, job, request.scope["journey"])


def check_template_kwargs(model: ServedModel, given: Mapping[str, Any] | None) -> None:
    if given and model.llm.tokenizer.chat_template is None:
        name = TEMPLATE_NAMES["variables"]
        raise ApiError(400, f"{name}: this model has no chat template", param=name)


def _check_unconstrained(options: RequestOptions, schema_field: str) -> None:
    given = next((name for name in CONSTRAINTS if options.get(name) is not None), None)
    if given is not None:
        text = f"{given}: found it with {schema_field} or tools that constrain the answer: expected one of them"
        raise ApiError(400, text, param=given)
