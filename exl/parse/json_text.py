"""JSON that comes piece by piece: checked and copied while it comes (RFC 8259)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import Any

from exl.parse.lexer import Tag
from exl.parse.reader import Malformed, Reader, Wait

# As models write them that have learned more Python than JSON.
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
MAX_DEPTH = 200  # of brackets in each other; Python's json.loads reads about a thousand

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # characters of a string that stand for themselves
_WORDS = {"t": "true", "f": "false", "n": "null"}
# From a state of a number, by the kind of the next character ("9" is 1 to 9), to the next.
_NUMBER = {
    "": {"-": "-", "0": "0", "9": "9"},
    "-": {"0": "0", "9": "9"},
    "0": {".": ".", "e": "e"},
    "9": {"0": "9", "9": "9", ".": ".", "e": "e"},
    ".": {"0": ".9", "9": ".9"},
    ".9": {"0": ".9", "9": ".9", "e": "e"},
    "e": {"0": "e9", "9": "e9", "+": "e+", "-": "e+"},
    "e+": {"0": "e9", "9": "e9"},
    "e9": {"0": "e9", "9": "e9"},
}
_NUMBER_ENDS = ("0", "9", ".9", "e9")
_NUMBER_KINDS = {**dict.fromkeys("123456789", "9"), **{char: char for char in "0-+.e"}, "E": "e"}


class JsonText:
    """One JSON value. Control characters inside strings, which JSON forbids and models write, are escaped."""

    def __init__(self) -> None:
        self.done = False
        self._open: list[str] = []  # the brackets that are open
        self._state = "value"
        self._rest = ""  # of a word; the state of a number; the digits of \u that are missing, one character each

    def takes(self, text: str) -> bool:
        """Whether this text would be text inside a string, all of it."""
        return self._state == "string" and '"' not in text and "\\" not in text

    def feed(self, text: str, at: int = 0) -> tuple[int, str]:
        """Reads on at ``text[at]``: returns where it stopped, at the end of the text or of the value, and the copy.

        Raises ``Malformed`` with the copy of what was read, if the next character is wrong: ``error.args`` are then
        what would have been returned.
        """
        copied: list[str] = []
        while at < len(text) and not self.done:
            start = at
            if self._state == "string":
                at = _PLAIN.match(text, at).end()  # type: ignore[union-attr]
                copied.append(text[start:at])
                if at == len(text):
                    break
            elif self._state in ("value", "item", "key", "member", "colon", "after"):
                at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
                copied.append(text[start:at])
                if at == len(text):
                    break
            elif self._state == "number" and text[at] not in _NUMBER_KINDS:
                if self._rest not in _NUMBER_ENDS:
                    raise Malformed(at, "".join(copied))
                self._close_value()
                continue
            written = self._step(text[at])
            if written is None:
                raise Malformed(at, "".join(copied))
            copied.append(written)
            at += 1
        return at, "".join(copied)

    def _step(self, char: str) -> str | None:
        """Goes on by a character that is no plain one; how it is written, or None if it is wrong."""
        state = self._state
        if state == "string":
            if char == '"':
                self._close_string()
            elif char == "\\":
                self._state = "escape"
            else:
                return json.dumps(char)[1:-1]
        elif state == "escape":
            self._state, self._rest = ("hex", "uuuu") if char == "u" else ("string", "")
            return char if char in '"\\/bfnrtu' else None
        elif state == "hex":
            self._rest = self._rest[1:]
            self._state = "hex" if self._rest else "string"
            return char if char in "0123456789abcdefABCDEF" else None
        elif state == "number":
            self._rest = _NUMBER[self._rest].get(_NUMBER_KINDS[char], "")
            return char if self._rest else None
        elif state == "word":
            if not self._rest.startswith(char):
                return None
            self._rest = self._rest[1:]
            if not self._rest:
                self._close_value()
        else:
            return self._structure(char)
        return char

    def _structure(self, char: str) -> str | None:
        """A character between values."""
        state = self._state
        if state in ("item", "member") and char == ("]" if state == "item" else "}"):
            self._open.pop()
            self._close_value()
        elif state in ("value", "item"):
            return self._begin_value(char)
        elif state in ("key", "member") and char == '"':
            self._state, self._rest = "string", ""
            self._open.append(":")  # the string is a key
        elif state == "colon" and char == ":":
            self._state = "value"
        elif state == "after" and char == ",":
            self._state = "key" if self._open[-1] == "{" else "value"
        elif state == "after" and char == ("}" if self._open[-1] == "{" else "]"):
            self._open.pop()
            self._close_value()
        else:
            return None
        return char

    def _begin_value(self, char: str) -> str | None:
        if char in "{[":
            if len(self._open) == MAX_DEPTH:
                return None
            self._open.append(char)
            self._state = "member" if char == "{" else "item"
        elif char == '"':
            self._state, self._rest = "string", ""
        elif char in _WORDS:
            self._state, self._rest = "word", _WORDS[char][1:]
        elif char in _NUMBER_KINDS and (state := _NUMBER[""].get(_NUMBER_KINDS[char])):
            self._state, self._rest = "number", state
        else:
            return None
        return char

    def _close_string(self) -> None:
        if self._open and self._open[-1] == ":":
            self._open.pop()
            self._state = "colon"
        else:
            self._close_value()

    def _close_value(self) -> None:
        self._state = "after"
        self.done = not self._open


def escaped(text: str) -> str:
    """A text as it is written inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def checked_object(text: str) -> str:
    """JSON text of an object, and nothing else, as ``JsonText`` writes it. Raises ``Malformed``."""
    value = JsonText()
    at, copied = value.feed(text)
    if not value.done or text[at:].strip(" \t\n\r") or not text.lstrip(" \t\n\r").startswith("{"):
        raise Malformed
    return copied


def copy_json(reader: Reader, write: Callable[[str], None]) -> Wait[None]:
    """Takes one JSON value from a reader and writes it while it comes. Raises ``Malformed`` at the first character
    that is wrong, which is not taken. JSON counts more than tags: a tag inside a string is text of that string, unless
    it is a special token, which has no text."""
    value = JsonText()
    while not value.done:
        found = yield from reader.next()
        if isinstance(found, str):
            _feed(value, reader, write)
        elif isinstance(found, Tag) and found.text and value.takes(found.text):
            reader.take_tag(found)
            write(value.feed(found.text)[1])
        else:
            raise Malformed


def _feed(value: JsonText, reader: Reader, write: Callable[[str], None]) -> None:
    try:
        stop, copied = value.feed(reader.text, reader.at)
    except Malformed as error:
        stop, copied = error.args
        reader.take(stop - reader.at)
        write(copied)
        raise Malformed from None
    reader.take(stop - reader.at)
    write(copied)


def read_json(reader: Reader) -> Generator[None, None, Any]:
    """Takes a short JSON value and returns it. Raises ``Malformed``."""
    copied: list[str] = []
    yield from copy_json(reader, copied.append)
    try:
        return json.loads("".join(copied))
    except (ValueError, RecursionError):  # a number of more digits than Python reads
        raise Malformed from None
