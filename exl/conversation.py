"""The messages of a chat and what can be done with them without a model: what answers them is a class of its own."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exl.checkpoint.header import shown
from exl.errors import ConfigError
from exl.replace_file import replace_file
from exl.saved_chat import SavedChat

MAX_ANSWER = 512  # tokens of an answer, unless more are asked for
LEAST_ROOM = 4  # with "drop-oldest", an answer has at least this part of the context, if it wants that much
_EXAMPLE = '[{"role": "user", "content": "Hello"}]'
Message = dict[str, Any]


class Conversation:
    """Messages and a system prompt. Not thread-safe."""

    def __init__(
        self, model: str, system: str | None = None, messages: Sequence[Mapping[str, Any]] = (), overflow: str = "error"
    ) -> None:
        """``model``: the name that ``save`` writes. ``messages``: earlier turns; the first may be the system prompt.
        ``overflow``: "error" or "drop-oldest". Raises ``ConfigError`` for messages that are none."""
        self._model = model
        self._overflow = _checked_overflow(overflow)
        self._system, self._messages = _split_system(_checked_system(system), messages)
        self._forgotten = 0
        self._written_with: str | None = None

    def _changed(self) -> None:
        """Called when messages or system prompt are no longer what the last answer was made with."""

    @property
    def written_with(self) -> str | None:
        """The name of the model whose conversation was loaded; None: it was not loaded, or does not say."""
        return self._written_with

    @property
    def messages(self) -> list[Message]:
        """Copies, without the system prompt: ``{"role": "user", "content": "Hello"}``."""
        return [dict(message) for message in self._messages]

    @property
    def system(self) -> str | None:
        """The system prompt. A new one applies from the next turn on, for which all turns are computed again."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = _checked_system(text)
        self._changed()

    @property
    def num_forgotten(self) -> int:
        """How many of ``messages``, the oldest, the model is not shown any more; see ``overflow``."""
        return self._forgotten

    def undo(self) -> str:
        """Removes the last user message and all messages after it. Returns that message's text."""
        last = self._last_of_user("undo")
        text = self._messages[last]["content"]
        del self._messages[last:]
        self._forgotten = min(self._forgotten, last)
        self._changed()
        return text

    def add(self, role: str, content: str, *, name: str | None = None, tool_call_id: str | None = None) -> None:
        """Appends a message without answering it: a tool's result, or turns of an earlier conversation."""
        extra = {key: value for key, value in (("name", name), ("tool_call_id", tool_call_id)) if value is not None}
        self._messages.append({"role": _checked(role), "content": _checked(content), **extra})
        self._changed()

    def reset(self) -> None:
        """Removes all messages; keeps the system prompt."""
        self._messages, self._forgotten = [], 0
        self._changed()

    # ---- files

    def save(self, path: str | Path) -> None:
        """Writes the conversation as JSON, atomically. Raises ``ConfigError`` if the file cannot be written."""
        path = Path(path).expanduser()
        part = path.parent / f".{path.name}.{os.getpid()}.part"
        try:
            part.write_text(json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            replace_file(part, path)
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte; a message with lone surrogates
            with contextlib.suppress(OSError, ValueError):
                part.unlink()
            raise ConfigError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None

    def to_json(self) -> dict[str, Any]:
        """The conversation as ``save`` writes it."""
        return SavedChat(self._system, self.messages, self._model).to_json()

    def _take(self, saved: SavedChat) -> None:
        """A conversation that was saved, of any model."""
        self._system, self._messages, self._written_with = saved.system, saved.messages, saved.model

    # ---- what is to be answered

    def _asked(self, text: str | None) -> list[Message]:
        """The messages with one more of the user's; None: those that are there. Raises ``ConfigError`` if the last is
        none to answer."""
        messages = self._messages
        if text is not None:
            messages = [*messages, {"role": "user", "content": _checked(text)}]
        if not messages:
            raise ConfigError("message: found none, expected a text to answer")
        if messages[-1]["role"] == "assistant":
            raise ConfigError("message: found an answer as the last message, expected one to answer")
        return messages

    def _asked_again(self) -> list[Message]:
        """The messages up to the last one of the user's."""
        return self._messages[: self._last_of_user("retry") + 1]

    def _begun(self) -> tuple[list[Message], str]:
        """The messages before the last answer, and its text, which is to go on. Raises ``ConfigError``."""
        if not self._messages or self._messages[-1]["role"] != "assistant":
            raise ConfigError("continue: found no answer as the last message")
        return self._messages[:-1], self._messages[-1]["content"]

    def _last_of_user(self, asked: str) -> int:
        for i in reversed(range(len(self._messages))):
            if self._messages[i]["role"] == "user":
                return i
        raise ConfigError(f"{asked}: found no message of the user")

    def _with_system(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *messages]


def _checked(text: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"message: found {text!r}, expected a text that is not empty")
    return text


def _checked_system(text: str | None) -> str | None:
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"system: found {text!r}, expected a text or None")
    return text


def _checked_overflow(value: str) -> str:
    if value not in ("error", "drop-oldest"):
        raise ConfigError(f"overflow: found {value!r}, expected 'error' or 'drop-oldest'")
    return value


def _split_system(system: str | None, messages: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[Message]]:
    """The system prompt, and the messages without it. Raises ``ConfigError`` for what is no list of messages."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ConfigError(f"messages: found {shown(messages)}, expected a list such as {_EXAMPLE}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f"messages[{i}]: found {shown(message)}, expected an object such as {_EXAMPLE[1:-1]}")
    copies = [dict(message) for message in messages]
    if not copies or copies[0]["role"] != "system":
        return system, copies
    if system is not None:
        raise ConfigError("system: given twice, as an argument and as the first message")
    return _checked_system(copies[0].get("content")), copies[1:]
