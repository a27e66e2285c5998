"""What /v1/responses takes: items instead of messages, tools and formats without inner objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from exl.server.bodies import Body, Json, text_or
from exl.server.openai.fields import Ignored, JsonObject, refused
from exl.server.openai.messages import Content, ContentPart, FunctionDefinition, function_only

_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}


class InputItem(BaseModel):
    """A message, a call, its result, or reasoning, also as an answer of /v1/responses has it."""

    model_config = ConfigDict(extra="allow")

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Content | None = None
    summary: list[Json] | None = None
    encrypted_content: refused("this server encrypts no reasoning") = None  # type: ignore[valid-type]

    @model_validator(mode="before")
    @classmethod
    def _reasoning_texts(cls, value: Any) -> Any:
        """Reasoning's parts are of another type than a message's, and as harmless."""
        if isinstance(value, dict) and value.get("type") == "reasoning" and isinstance(value.get("content"), list):
            parts = [part | {"type": "text"} if isinstance(part, dict) else part for part in value["content"]]
            return value | {"content": parts}
        return value

    @model_validator(mode="after")
    def _is_whole(self) -> InputItem:
        for name in _NEEDED[self.type]:
            if getattr(self, name) is None:
                raise PydanticCustomError(
                    "missing", "found no {name} in an item '{type}'", {"name": name, "type": self.type}
                )
        return self


Input: Any = text_or(Annotated[list[InputItem], Field(min_length=1)])


def messages_of(given: str | Sequence[InputItem], instructions: str | None) -> list[dict[str, Any]]:
    """Messages for chat templates. Reasoning, texts and calls that follow each other are one turn of the
    assistant's, as in /v1/chat/completions."""
    found: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*found, {"role": "user", "content": given}]
    turn: dict[str, Any] | None = None  # the assistant's, which may go on
    for item in given:
        if item.type == "function_call_output":
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            turn = None
        elif item.type == "message" and item.role != "assistant":
            found.append({"role": item.role, "content": _parts(item.content)})
            turn = None
        else:
            if turn is None or (item.type != "function_call" and "tool_calls" in turn):
                turn = {"role": "assistant", "content": None}
                found.append(turn)
            _add(turn, item)
    return found


def _add(turn: dict[str, Any], item: InputItem) -> None:
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    elif item.type == "reasoning":
        summary = "\n".join(str(part.get("text", "")) for part in item.summary or () if isinstance(part, dict))
        text = _text(item.content) or summary
        if text:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + text
    else:
        turn["content"] = (turn["content"] or "") + _text(item.content)


def _text(content: str | list[ContentPart] | None) -> str:
    if isinstance(content, list):
        return "".join(part.told or "" for part in content)
    return content or ""


def _parts(content: str | list[ContentPart] | None) -> Any:
    if isinstance(content, list):
        return [{"type": "text", "text": part.told} for part in content]
    return content


class ResponseTool(FunctionDefinition):
    """A function. OpenAI's own tools (web search, ...) are refused: nothing here runs them."""

    type: Literal["function"]
    output_schema: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def _is_function(cls, value: Any) -> Any:
        return function_only(value)

    def for_template(self) -> dict[str, Any]:
        function = self.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)
        return {"type": "function", "function": function}

    def shown(self) -> dict[str, Any]:
        return self.model_dump(include={"type", "name", "description", "parameters", "strict"})


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="The answer follows the schema in any case.")

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise PydanticCustomError("unsupported", "expected a schema if the type is 'json_schema', and only then")
        return self

    def schema_of(self) -> Any:
        return True if self.type == "json_object" else self.schema_


class TextConfig(Body):
    format: TextFormat | None = None
    verbosity: refused("the model is not asked for another length", "medium") = None  # type: ignore[valid-type]
