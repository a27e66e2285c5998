"""Calls of FunctionGemma and Gemma 4: ``call:f{city:<|"|>Rome<|"|>,days:3}``.

Keys are bare, strings stand between tags and are written as they are, without escapes; what else there is looks like
JSON (the templates' ``format_argument``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

from exl.parse.calls import MAX_NAME, MAX_NESTING, Calls
from exl.parse.json_text import PYTHON_WORDS, JsonText, copy_json, escaped
from exl.parse.reader import Malformed, Wait

_MAX_WORD = 1000  # characters of a bare value


@dataclass(frozen=True)
class Braced:
    open: str
    close: str
    quote: str  # before and behind a string
    bare: ClassVar[str] = ""  # calls begin with their tag

    @property
    def opens(self) -> tuple[str, ...]:
        return (self.open,)

    @property
    def closes(self) -> tuple[str, ...]:
        return (self.close,)

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.open, self.close, self.quote)

    def read(self, calls: Calls, opened: str | None) -> Wait[None]:
        reader = calls.reader
        yield from reader.space()
        for char in "call:":
            yield from reader.expect(char)
        name, _ = yield from calls.name(calls.tags(), also="{")
        calls.begin(name)
        yield from self._read_object(calls, 0)
        calls.end()

    def _read_object(self, calls: Calls, depth: int) -> Wait[None]:
        yield from calls.reader.expect("{")
        yield from calls.members("{}", "}", lambda: self._read_member(calls, depth + 1))

    def _read_member(self, calls: Calls, depth: int) -> Wait[None]:
        yield from self._read_key(calls)
        yield from calls.reader.space()
        yield from self._read_value(calls, depth)

    def _read_key(self, calls: Calls) -> Wait[None]:
        reader = calls.reader
        quote = calls.tags(self.quote)
        char = yield from reader.next()
        if (yield from reader.accept(quote)) is not None:
            yield from self._read_string(calls)
        elif char == '"':
            yield from copy_json(reader, calls.write)
        else:
            key = ""
            while isinstance(char := (yield from reader.next()), str) and char not in ":{}[],":
                if len(key) == MAX_NAME:
                    raise Malformed
                key += reader.take(1)
            calls.write(f'"{escaped(key.strip())}"')
        yield from reader.space()
        yield from reader.expect(":")
        calls.write(": ")

    def _read_string(self, calls: Calls) -> Wait[None]:
        calls.write('"')
        found = yield from calls.reader.scan(calls.tags(self.quote), lambda text: calls.write(escaped(text)))
        if found is None:
            raise Malformed
        calls.write('"')

    def _read_value(self, calls: Calls, depth: int) -> Wait[None]:
        reader = calls.reader
        if depth > MAX_NESTING:
            raise Malformed
        if (yield from reader.accept(calls.tags(self.quote))) is not None:
            yield from self._read_string(calls)
            return
        char = yield from reader.next()
        if char == "{":
            yield from self._read_object(calls, depth)
        elif char == "[":
            reader.take(1)
            yield from calls.members("[]", "]", lambda: self._read_value(calls, depth + 1))
        elif char == '"':
            yield from copy_json(reader, calls.write)
        else:
            yield from _read_word(calls)


def _read_word(calls: Calls) -> Wait[None]:
    """A number, true, false or null; any other bare word is a string."""
    reader = calls.reader
    word: list[str] = []
    while isinstance(char := (yield from reader.next()), str) and char not in ",}]":
        if len(word) == _MAX_WORD:
            raise Malformed
        word.append(reader.take(1))
    text = "".join(word).strip()
    if not text or not isinstance(char, str):
        raise Malformed
    text = PYTHON_WORDS.get(text, text)
    calls.write(text if _is_scalar(text) else json.dumps(text, ensure_ascii=False))


def _is_scalar(text: str) -> bool:
    value = JsonText()
    try:
        at, _ = value.feed(text + " ")
    except Malformed:
        return False
    return value.done and at == len(text) and text[0] not in '"{['
