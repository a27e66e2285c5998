"""The parts of a chat's answer, in the order in which a reader of its tokens meets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Text:
    """More of the text that is meant for the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of what the model thought before or between its texts."""

    text: str


@dataclass(frozen=True)
class ToolCallBegin:
    """A call begins. ``index`` counts the answer's calls from 0; ``name`` is whole."""

    index: int
    name: str
    call_id: str | None = None  # that the model itself gave, where its format has one; else the server makes one


@dataclass(frozen=True)
class ToolCallArguments:
    """More of a call's arguments. The pieces of one call join to one JSON object, whatever the model's format was."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """The arguments of this call are a whole JSON object."""

    index: int


Part = Text | Reasoning | ToolCallBegin | ToolCallArguments | ToolCallEnd


class AnswerParser(Protocol):
    """Reads one answer. The parts do not depend on how its tokens were cut into pushes, once neighbours of one kind
    are joined; nor on how its text was cut into tokens, except where a tag is one special token."""

    def push(self, token_ids: Sequence[int]) -> list[Part]:
        """What these tokens make certain. Text is held back only as long as it may begin a tag or a stop string."""

    def finish(self) -> list[Part]:
        """The rest. A call that is not whole gets no ``ToolCallEnd``."""

    @property
    def is_whole(self) -> bool:
        """False: a call did not become whole, or the answer ended behind a call's tag, before its name. With the
        engine's reason "length" that is an answer that was cut, with "stop" a malformed one."""
