"""A loaded model as the protocols see it: prompts from messages, a parser for its answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from exl.chat import transcript
from exl.llm import LLM
from exl.parse.parts import AnswerParser

Messages = Sequence[Mapping[str, Any]]


class ServedModel:
    """Made once for each time that a model is loaded."""

    def __init__(self, llm: LLM, name: str, tool_format: str = "auto", reasoning_format: str = "auto") -> None:
        self.llm, self.name = llm, name
        self.created = int(time.time())  # loaded at, seconds since 1970
        self.tool_format, self.reasoning_format = tool_format, reasoning_format

    @property
    def context(self) -> int:
        return self.llm.context

    def chat_prompt(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids. A model without a chat template gets the conversation as a transcript, as in ``exl chat``."""
        if self.llm.tokenizer.chat_template is None:
            return self.llm.encode(transcript(messages, add_generation_prompt))
        return self.llm.chat_prompt(
            messages, tools=tools, variables=variables, add_generation_prompt=add_generation_prompt
        )

    def chat_text(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text that ``chat_prompt`` encodes, for people to read: where a message holds what looks like a control
        token, it does not show that this is plain text for the model."""
        template = self.llm.tokenizer.chat_template
        if template is None:
            return transcript(messages, add_generation_prompt)
        return template.render(messages, tools=tools, variables=variables, add_generation_prompt=add_generation_prompt)

    def parser(
        self, prompt_ids: Sequence[int], tools: Sequence[Mapping[str, Any]] | None, stop: Sequence[str]
    ) -> AnswerParser | None:
        """For one choice of a chat's answer. None: the answer is plain text."""
        return None
