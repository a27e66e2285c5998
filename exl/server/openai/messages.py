"""Messages and tools as OpenAI's clients write them, checked, and as chat templates take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from exl.server.bodies import Body, Json, text_or
from exl.server.errors import ApiError
from exl.server.openai.fields import Ignored, JsonObject, refused
from exl.server.served import ToolChoice

_TEXTS = ("text", "input_text", "output_text")  # the last two are those of /v1/responses
_UNREAD = {
    "image_url": "images",
    "input_image": "images",
    "image": "images",
    "input_audio": "sound",
    "audio_url": "sound",
    "video_url": "videos",
    "file": "files",
    "input_file": "files",
}


class ContentPart(BaseModel):
    """A part of a message's content: a text."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> ContentPart:
        if self.type in _UNREAD:
            words = {"found": self.type, "what": _UNREAD[self.type]}
            raise PydanticCustomError("unsupported", "this model reads text and no {what}: the part '{found}'", words)
        if self.type not in (*_TEXTS, "refusal"):
            raise PydanticCustomError("unsupported", "expected a part 'text', not '{found}'", {"found": self.type})
        if self.told is None:
            raise PydanticCustomError("missing", "expected a text in this part")
        return self

    @property
    def told(self) -> str | None:
        return self.refusal if self.type == "refusal" else self.text


Content: Any = text_or(list[ContentPart])


class FunctionCall(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    arguments: Json = "{}"  # JSON text; an object is taken, too


class ToolCall(BaseModel):
    """A call in an assistant's message. What clients add when they send answers back is left alone."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One message. Keys beside OpenAI's, such as ``reasoning_content``, are for the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    audio: refused("this model makes and reads no sound") = None  # type: ignore[valid-type]
    function_call: refused("expected tool_calls") = None  # type: ignore[valid-type]
    annotations: Ignored = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        silent = self.content is None and self.refusal is None
        if silent and not (self.role == "assistant" and self.tool_calls):
            also = " or tool_calls" if self.role == "assistant" else ""
            raise PydanticCustomError(
                "missing", "found no content, expected it{also} in a message of role '{role}'",
                {"also": also, "role": self.role},
            )  # fmt: skip
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("unsupported", "found tool_calls in a message of role '{role}', expected them "
                                      "in an assistant's", {"role": self.role})  # fmt: skip
        return self

    def for_template(self) -> dict[str, Any]:
        """As ``exl.parse.messages`` takes it."""
        found: dict[str, Any] = {"role": self.role}
        if isinstance(self.content, list):
            found["content"] = [{"type": "text", "text": part.told} for part in self.content]
        else:
            found["content"] = self.refusal if self.content is None else self.content
        if self.tool_calls:
            found["tool_calls"] = [_call_for_template(call) for call in self.tool_calls]
        for key in ("name", "tool_call_id"):
            if (value := getattr(self, key)) is not None:
                found[key] = value
        return {**(self.__pydantic_extra__ or {}), **found}


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {**({} if call.id is None else {"id": call.id}), "type": "function", "function": function}


class FunctionDefinition(Body):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


def function_only(value: Any) -> Any:
    """Refuses another tool by its type, before it lacks what functions have."""
    if isinstance(value, dict) and value.get("type") != "function":
        found = str(value.get("type"))[:80]
        raise PydanticCustomError(
            "unsupported", "expected a tool of the type 'function', not '{found}'", {"found": found}
        )
    return value


class Tool(Body):
    """A function that the model may call. OpenAI's own tools (web search, ...) are refused: nothing here runs them."""

    type: Literal["function"]
    function: FunctionDefinition

    @model_validator(mode="before")
    @classmethod
    def _is_function(cls, value: Any) -> Any:
        return function_only(value)

    def for_template(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


def chosen_tools(tools: Sequence[dict[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], ToolChoice]:
    """The tools, as templates take them, that a request may use, and whether it must, by its ``tool_choice``: a word,
    ``{"type": "function", "function": {"name": ...}}``, the same without the inner object (of /v1/responses), or
    ``allowed_tools``. Raises ``ApiError``."""
    names = [tool["function"]["name"] for tool in tools]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ApiError(400, f"tools: found the function {twice!r} twice, expected each once", param="tools")
    if choice is None or choice in ("auto", "none"):
        return list(tools), choice or "auto"
    if not tools:
        raise _wrong_choice(choice, "no tool_choice without tools")
    if choice == "required":
        return list(tools), "required"
    if not isinstance(choice, dict):
        raise _wrong_choice(choice, "'auto', 'none', 'required' or an object that names a function")
    if choice.get("type") == "allowed_tools":
        return _allowed(tools, choice)
    if (name := _named(choice)) not in names:
        raise _wrong_choice(choice, f"a function among {', '.join(map(repr, names))}")
    return list(tools), (name,)


def _allowed(tools: Sequence[dict[str, Any]], choice: dict[str, Any]) -> tuple[list[dict[str, Any]], ToolChoice]:
    allowed = choice.get("allowed_tools", choice)
    mode, listed = (allowed.get("mode", "auto"), allowed.get("tools")) if isinstance(allowed, dict) else (None, None)
    if mode not in ("auto", "required") or not isinstance(listed, list):
        raise _wrong_choice(choice, "allowed_tools with a mode, 'auto' or 'required', and a list of tools")
    wanted = [_named(tool) if isinstance(tool, dict) else None for tool in listed]
    kept = [tool for tool in tools if tool["function"]["name"] in wanted]
    if not kept or len(kept) < len(set(wanted)):
        raise _wrong_choice(choice, "functions of tools")
    return kept, mode


def _named(choice: dict[str, Any]) -> Any:
    inner = choice.get("function", choice)
    return inner.get("name") if choice.get("type") == "function" and isinstance(inner, dict) else None


def _wrong_choice(choice: Any, expected: str) -> ApiError:
    found = repr(choice)
    return ApiError(400, f"tool_choice: found {found[:200]}, expected {expected}", param="tool_choice")


class JsonSchemaFormat(Body):
    name: Ignored = None
    description: Ignored = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="The answer follows the schema in any case.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("unsupported", "expected json_schema if the type is 'json_schema', and only then")
        return self

    def schema_of(self) -> Any:
        """The option ``json_schema`` of a request; None: any text."""
        if self.json_schema is None:
            return True if self.type == "json_object" else None
        return True if self.json_schema.schema_ is None else self.json_schema.schema_


# What reasoning models' templates are asked: gpt-oss' reads ``reasoning_effort``, Qwen's ``enable_thinking``,
# DeepSeek's and Granite's ``thinking``.
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def template_variables(effort: str | None, given: dict[str, Any] | None) -> dict[str, Any]:
    """Of ``reasoning_effort`` and ``chat_template_kwargs``; the latter count more."""
    thinks = effort != "none"
    found = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": thinks, "thinking": thinks}
    return {**found, **(given or {})}
