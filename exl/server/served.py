"""A loaded model as the protocols see it: prompts from messages, a parser for its answers."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import exl
from exl.chat import TRANSCRIPT_STOP, transcript
from exl.errors import ConfigError
from exl.llm import LLM
from exl.parse.choose import choose_for, parser_for
from exl.parse.constrain import constrain, constrain_text
from exl.parse.formats import NONE
from exl.parse.messages import MessageForms
from exl.parse.parts import AnswerParser
from exl.request_options import RequestOptions

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
ToolChoice = Literal["auto", "none", "required"] | tuple[str, ...]  # names: one of these functions must be called


@dataclass(frozen=True)
class Conversation:
    """What a chat protocol asks: messages and tools in the form of OpenAI's API, as chat templates take them."""

    messages: Messages
    tools: Tools = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    json_schema: Any = None  # that the answer's text must follow, see ``RequestOptions``
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the template
    add_generation_prompt: bool = True
    continue_final: bool = False  # the last message, an assistant's, is the beginning of the answer
    stop: Sequence[str] = ()

    @property
    def follows_schema(self) -> bool:
        """Whether the schema constrains the answer: of calls that are required there is no text."""
        return self.json_schema is not None and self.tool_choice in ("auto", "none")


@dataclass(frozen=True)
class PreparedChat:
    """What the engine is to be asked for a conversation."""

    prompt_ids: list[int]
    constraint: dict[str, Any]  # options of a request: json_schema, grammar, after, ...
    make_parser: Callable[[], AnswerParser | None]  # for each choice; None: its text is all text
    # Besides the request's own: a model that is shown a transcript would also write what the user says next.
    stop: tuple[str, ...] = ()

    def added_to(self, options: RequestOptions) -> RequestOptions:
        """A request's options with these, which count more."""
        found: RequestOptions = {**options, **self.constraint}  # type: ignore[typeddict-item]
        if self.stop:
            found["stop"] = (*(options.get("stop") or ()), *self.stop)
        return found


class ServedModel:
    """Made once for each time that a model is loaded. Raises ``ConfigError`` for formats that nobody knows."""

    def __init__(self, llm: LLM, name: str, tool_format: str = "auto", reasoning_format: str = "auto") -> None:
        self.llm, self.name = llm, name
        self.adapter: str | None = None  # that answers; None: the model itself
        self.created = int(time.time())  # loaded at, seconds since 1970
        self.format = choose_for(llm.tokenizer, tool_format=tool_format, reasoning_format=reasoning_format)
        self._forms = MessageForms.of(llm.tokenizer.chat_template)
        facts = (exl.__version__, llm.folder.name, llm.config, llm.quant, llm.decode_steps)
        # OpenAI's ``system_fingerprint``: with it and the seed the same, the text is.
        self.fingerprint = "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:10]

    @property
    def context(self) -> int:
        return self.llm.context

    def with_adapter(self, name: str) -> ServedModel:
        """The same model, of which one of its adapters answers, under that name."""
        other = copy.copy(self)
        other.name = other.adapter = name
        other.fingerprint = "fp_" + hashlib.sha256(f"{self.fingerprint} {name}".encode()).hexdigest()[:10]
        return other

    def prepare(self, chat: Conversation) -> PreparedChat:
        """Renders and encodes a conversation, which takes time: for a thread. Raises ``ConfigError``."""
        tools = None if chat.tool_choice == "none" or not chat.tools else chat.tools
        prompt = self.chat_prompt(
            chat.messages, tools, chat.variables, chat.add_generation_prompt, continue_final=chat.continue_final
        )
        constraint = self._constraint(chat, tools or (), prompt)
        stop = (TRANSCRIPT_STOP,) if self.llm.tokenizer.chat_template is None else ()
        return PreparedChat(prompt, constraint, lambda: self.parser(prompt, tools, (*chat.stop, *stop)), stop)

    def _constraint(self, chat: Conversation, tools: Tools, prompt: Sequence[int]) -> dict[str, Any]:
        """What required and strict calls, and a schema of the text, ask of the engine."""
        parallel, choice = chat.parallel_tool_calls, chat.tool_choice
        if chat.follows_schema:
            return constrain_text(
                self.format, self.llm.tokenizer, chat.json_schema, tools=tools, parallel=parallel, prompt_ids=prompt
            )
        if not tools:
            return {}
        if isinstance(choice, tuple):
            tools, choice = [tool for tool in tools if tool["function"]["name"] in choice], "required"
        return constrain(
            self.format, self.llm.tokenizer, tools, tool_choice=choice, parallel=parallel, prompt_ids=prompt
        )

    def chat_prompt(
        self,
        messages: Messages,
        tools: Tools | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        *,
        continue_final: bool = False,
    ) -> list[int]:
        """Token ids. A model without a chat template gets the conversation as a transcript, as in ``exl chat``.

        ``continue_final``: the last message, which must be an assistant's, stands behind what the template writes
        before an answer, and its turn stays open: what is generated goes on with it. Raises ``ConfigError``.
        """
        begun = ""
        if continue_final:
            begun, messages = _begun(messages), messages[:-1]
            add_generation_prompt = True
        messages = self._forms.fit(messages)
        if self.llm.tokenizer.chat_template is None:
            written = _transcript(messages, tools, add_generation_prompt)
            return self.llm.encode(f"{written} {begun}" if begun else written)
        ids = self.llm.chat_prompt(
            messages, tools=tools, variables=variables, add_generation_prompt=add_generation_prompt
        )
        return [*ids, *self.llm.tokenizer.encode(begun, bos=False)] if begun else ids

    def chat_text(
        self,
        messages: Messages,
        tools: Tools | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text that ``chat_prompt`` encodes, for people to read: where a message holds what looks like a control
        token, it does not show that this is plain text for the model."""
        template, messages = self.llm.tokenizer.chat_template, self._forms.fit(messages)
        if template is None:
            return _transcript(messages, tools, add_generation_prompt)
        return template.render(messages, tools=tools, variables=variables, add_generation_prompt=add_generation_prompt)

    def text_prompt(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of a text in which whoever sends it may have applied a chat template: control tokens in it count
        as such, and a BOS that it begins with is not put before it again."""
        tokenizer = self.llm.tokenizer
        ids, prefix = tokenizer.encode(text, bos=False, special=True), tokenizer.encode("")
        return ids if not bos or ids[: len(prefix)] == prefix else [*prefix, *ids]

    def parser(
        self, prompt_ids: Sequence[int], tools: Tools | None = None, stop: Sequence[str] = ()
    ) -> AnswerParser | None:
        """For one choice of a chat's answer. None: the answer is plain text, and so are calls of tools that nobody has
        offered."""
        if self.format.reasoning == NONE and not tools:
            return None
        return parser_for(self.format, self.llm.tokenizer, tools=tools, prompt_ids=prompt_ids, stop=stop)


def _transcript(messages: Messages, tools: Tools | None, to_answer: bool) -> str:
    if tools:
        raise ConfigError("tools: this model has no chat template, which would show them to it")
    return transcript([_plain(message) for message in messages], to_answer)


def _begun(messages: Messages) -> str:
    last = messages[-1]
    content = last.get("content")
    if last.get("role") != "assistant" or last.get("tool_calls") or not content:
        raise ConfigError("messages: found no text of an assistant's at the end, expected the answer's beginning there")
    return _text(content)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of a transcript, which has texts only."""
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": _text(message.get("content"))}


def _text(content: Any) -> str:
    """Of a text, of parts, or of None."""
    if isinstance(content, list | tuple):
        return "\n".join(str(part.get("text") or "") for part in content)
    return content or ""
