"""A conversation as ``exl.Chat.save`` writes it and the demo's browser keeps it: a JSON object."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl.errors import ConfigError
from exl.user_text import read_text

_FORMAT, _VERSION = "exl chat", 1


@dataclass(frozen=True)
class SavedChat:
    """``model``: the name of the model that it was written with; None: not known."""

    system: str | None
    messages: list[dict[str, Any]]
    model: str | None

    @classmethod
    def from_json(cls, data: Any, source: str) -> SavedChat:
        """Raises ``ConfigError``, which names ``source``, for anything that ``to_json`` does not give."""
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise _wrong(source, data.get("format") if isinstance(data, dict) else data, f'"format": "{_FORMAT}"')
        if data.get("version") != _VERSION:
            raise _wrong(source, data.get("version"), f"version {_VERSION}")
        system, messages, model = data.get("system"), data.get("messages"), data.get("model")
        if system is not None and not isinstance(system, str):
            raise _wrong(source, system, "a system prompt that is text or null")
        if not isinstance(messages, list):
            raise _wrong(source, messages, "a list of messages")
        for message in messages:
            found = isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
            # A call of tools has no content; some templates take a list of parts.
            if not found or not isinstance(message["content"], str | list | None):
                raise _wrong(source, message, "messages with a role and a content")
        return cls(system, messages, model if isinstance(model, str) else None)

    @classmethod
    def load(cls, path: str | Path) -> SavedChat:
        """Of a file. Raises ``ConfigError``, which names it, if it cannot be read or is none."""
        path = Path(path).expanduser()
        return cls.from_json(parse_saved(read_text(path, str(path)), str(path)), str(path))

    def to_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model,
            "system": self.system,
            "messages": self.messages,
        }


def parse_saved(text: str, source: str) -> Any:
    """The JSON of a saved chat's file, for ``SavedChat.from_json``. Raises ``ConfigError`` if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(source, error, "JSON") from None


def _wrong(source: str, found: object, expected: str) -> ConfigError:
    return ConfigError(f"{source}: not a saved chat: found {str(found)[:60]!r}, expected {expected}")
