"""Anthropic's content blocks, tools and settings, checked, and in the form of OpenAI's API, which chat templates take.

The shapes are those of docs.anthropic.com/en/api/messages and of the client's ``anthropic.types``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from exl.server.bodies import Body, Json, text_or
from exl.server.errors import ApiError
from exl.server.openai.fields import Ignored, refused
from exl.server.openai.messages import Effort, FunctionDefinition, Tool, chosen_tools
from exl.server.served import ToolChoice

# What a block holds that this model does not read. Others are those of tools that Anthropic's own servers run.
_UNREAD = {
    "image": "images",
    "document": "documents",
    "search_result": "search results",
    "container_upload": "files",
    "redacted_thinking": "thinking that another server has encrypted",
}


class TextBlock(Body):
    type: Literal["text"]
    text: str
    citations: Ignored = None
    cache_control: Ignored = None


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: Ignored = None


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Json]
    caller: Ignored = None
    cache_control: Ignored = None


class UnreadBlock(BaseModel):
    """Refused."""

    model_config = ConfigDict(extra="allow")

    type: str

    @model_validator(mode="after")
    def _refuse(self) -> UnreadBlock:
        words = {"found": self.type, "what": _UNREAD.get(self.type)}
        if words["what"] is not None:
            raise PydanticCustomError("unsupported", "this model reads no {what}: the block '{found}'", words)
        raise PydanticCustomError("unsupported", "expected no block '{found}' here", words)


def _member(known: Sequence[str]) -> Any:
    """By a block's type, told by hand, so that an error is of the block that was meant and not of all others."""

    def tag(value: Any) -> str:
        found = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return found.title() if isinstance(found, str) and found in known else "Unread"

    return tag


_Unread = Annotated[UnreadBlock, Tag("Unread")]
_Text = Annotated[TextBlock, Tag("Text")]
OnlyText = Annotated[_Text | _Unread, Discriminator(_member(("text",)))]
Texts: Any = text_or(list[OnlyText])


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None
    cache_control: Ignored = None


Block = Annotated[
    _Text
    | Annotated[ThinkingBlock, Tag("Thinking")]
    | Annotated[ToolUseBlock, Tag("Tool_Use")]
    | Annotated[ToolResultBlock, Tag("Tool_Result")]
    | _Unread,
    Discriminator(_member(("text", "thinking", "tool_use", "tool_result"))),
]
_BLOCKS_OF = {
    "system": (TextBlock,),
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, ToolUseBlock),
}


class InputMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: text_or(list[Block])  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _fits(self) -> InputMessage:
        for block in self.blocks:
            if not isinstance(block, _BLOCKS_OF[self.role]):
                words = {"found": block.type, "role": self.role}
                text = "expected no block '{found}' in a message of role '{role}'"
                raise PydanticCustomError("unsupported", text, words)
        return self

    @property
    def blocks(self) -> Sequence[Any]:
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


# Messages


def openai_messages(system: str | Sequence[Any] | None, messages: Sequence[InputMessage]) -> list[dict[str, Any]]:
    """Neighbours of one role are one turn, as Anthropic's API has it. Raises ``ApiError`` for the result of a tool use
    that there was not."""
    found: list[dict[str, Any]] = []
    if texts := _texts(system):
        found.append({"role": "system", "content": _content(texts)})
    uses: set[str] = set()  # ids of those so far
    start = 0
    while start < len(messages):
        role = messages[start].role
        stop = next((i for i in range(start, len(messages)) if messages[i].role != role), len(messages))
        blocks = [(i, block) for i in range(start, stop) for block in messages[i].blocks]
        if role == "assistant":
            found.append(_assistant([block for _, block in blocks]))
            uses |= {block.id for _, block in blocks if isinstance(block, ToolUseBlock)}
        else:
            found += _others(role, blocks, uses)
        start = stop
    return found


def _assistant(blocks: Sequence[Any]) -> dict[str, Any]:
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    thinking = "\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    message: dict[str, Any] = {"role": "assistant", "content": _content(texts) if texts else None}
    if thinking:
        message["reasoning_content"] = thinking
    if uses := [block for block in blocks if isinstance(block, ToolUseBlock)]:
        message["tool_calls"] = [
            {"id": use.id, "type": "function", "function": {"name": use.name, "arguments": use.input}} for use in uses
        ]
    elif not texts:
        message["content"] = ""
    return message


def _others(role: str, blocks: Sequence[tuple[int, Any]], uses: set[str]) -> list[dict[str, Any]]:
    """A message for each run of texts, one for each result."""
    found: list[dict[str, Any]] = []
    texts: list[str] = []

    def close() -> None:
        if texts:
            found.append({"role": role, "content": _content(texts)})
            texts.clear()

    for i, block in blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
            continue
        close()
        if block.tool_use_id not in uses:
            where = f"messages[{i}].content"
            text = f"{where}: found the result of {block.tool_use_id!r}, expected one of a tool_use before it"
            raise ApiError(400, text, param=where)
        results = _texts(block.content)
        if block.is_error:  # OpenAI's messages have no word for it, so the model is told in the text
            results = ["Error: " + "\n".join(results)]
        found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _content(results)})
    close()
    if not found:
        found.append({"role": role, "content": ""})
    return found


def _texts(content: str | Sequence[Any] | None) -> list[str]:
    blocks: Sequence[Any] = [] if content is None or isinstance(content, str) else content
    return [content] if isinstance(content, str) and content else [block.text for block in blocks]


def _content(texts: Sequence[str]) -> str | list[dict[str, str]]:
    if len(texts) == 1:
        return texts[0]
    return [{"type": "text", "text": text} for text in texts] or ""


# Tools


class ToolDefinition(Body):
    """A tool of the client's own. Those that are known by their type alone are refused: nothing here runs them, and
    this model was not trained to use them."""

    type: Literal["custom"] | None = None
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Json]
    strict: bool | None = None
    eager_input_streaming: Ignored = None
    cache_control: Ignored = None
    defer_loading: refused("the model sees all tools", False) = None  # type: ignore[valid-type]
    allowed_callers: refused("only the model calls tools", ["direct"]) = None  # type: ignore[valid-type]
    input_examples: refused("templates have no place for them", []) = None  # type: ignore[valid-type]

    @model_validator(mode="before")
    @classmethod
    def _is_custom(cls, value: Any) -> Any:
        found = value.get("type") if isinstance(value, dict) else None
        if isinstance(found, str) and found != "custom":
            text = "this server has no tools of its own: '{found}'; expected a tool with an input_schema"
            raise PydanticCustomError("unsupported", text, {"found": found})
        return value

    def for_template(self) -> dict[str, Any]:
        function = FunctionDefinition(
            name=self.name, description=self.description, parameters=self.input_schema, strict=self.strict
        )
        return Tool(type="function", function=function).for_template()


class ToolChoiceField(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _has_name(self) -> ToolChoiceField:
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("unsupported", "expected a name if the type is 'tool', and only then")
        return self


def tools_of(
    tools: Sequence[ToolDefinition] | None, choice: ToolChoiceField | None
) -> tuple[list[dict[str, Any]], ToolChoice]:
    """Raises ``ApiError``."""
    words: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    asked = None
    if choice is not None:
        asked = words.get(choice.type) or {"type": "function", "function": {"name": choice.name}}
    return chosen_tools([tool.for_template() for tool in tools or ()], asked)


# Settings


class Thinking(Body):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(None, ge=1, description="Told to the template as thinking_budget, no more.")
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Json] = Field(alias="schema")


class OutputConfig(Body):
    effort: Effort | None = None
    format: JsonFormat | None = None


def template_variables(thinking: Thinking | None, output: OutputConfig | None) -> dict[str, Any]:
    """A request that does not ask for thinking gets none, as with most of Anthropic's models, if the template obeys:
    Qwen's reads ``enable_thinking``, DeepSeek's and Granite's ``thinking``, Seed-OSS' ``thinking_budget``, and gpt-oss'
    ``reasoning_effort``."""
    thinks = thinking is not None and thinking.type != "disabled"
    found: dict[str, Any] = {"enable_thinking": thinks, "thinking": thinks}
    if thinking is not None and thinking.budget_tokens is not None:
        found["thinking_budget"] = thinking.budget_tokens
    if output is not None and output.effort is not None:
        found["reasoning_effort"] = output.effort
    return found
