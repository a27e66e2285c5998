"""What a line typed in a chat is: a message, or a command. Messages of several lines stand between triple quotes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from exl.errors import ConfigError

QUOTES = '"""'
# A command is one word. /usr/share/dict is a path, and the line a message.
_COMMAND = re.compile(r"/([^\s/]*)(?:\s+(.*))?", re.DOTALL)


def parse_command(line: str) -> tuple[str, str] | None:
    """``parse_command("/set seed 7") == ("set", "seed 7")``; None: the line is a message."""
    match = _COMMAND.fullmatch(line.strip())
    return None if match is None else (match[1], (match[2] or "").strip())


def is_open(text: str) -> bool:
    """Whether a message that began with triple quotes still waits for those that end it."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def unquoted(text: str) -> str | None:
    """The message between triple quotes; None if ``text`` does not begin with them."""
    text = text.strip()
    if not text.startswith(QUOTES):
        return None
    return text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")


def join_quoted(lines: Iterable[str]) -> Iterator[str]:
    """Lines as they come -> messages and commands, each whole. Raises ``ConfigError`` for quotes that do not end."""
    text = None
    for line in lines:
        text = line if text is None else f"{text}\n{line}"
        if not is_open(text):
            yield text
            text = None
    if text is not None:
        raise ConfigError(f"message: found {QUOTES} without an end, expected {QUOTES} after its last line")
