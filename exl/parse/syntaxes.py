"""The shapes that tool calls have, each with what differs between models as its fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from exl.parse.calls import Calls
from exl.parse.json_calls import copy_arguments, read_call
from exl.parse.json_text import escaped
from exl.parse.python_calls import read_python_call
from exl.parse.reader import Malformed, Wait


class Syntax(Protocol):
    """How calls are written."""

    @property
    def opens(self) -> tuple[str, ...]:
        """Tags that calls begin with."""

    @property
    def closes(self) -> tuple[str, ...]:
        """Tags behind a call. What is wrong in a call ends with one of them, too."""

    @property
    def tags(self) -> tuple[str, ...]:
        """All tags, those inside calls too."""

    @property
    def bare(self) -> str:
        """Characters that calls without a tag begin with, at the beginning of an answer."""

    def read(self, calls: Calls, opened: str | None) -> Wait[None]:
        """Reads a call behind this tag, or several; without a tag if it is None. Raises ``Malformed``."""


@dataclass(frozen=True)
class Listed:
    """Calls that name their function themselves, one after the other or in a list."""

    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    json: bool = True  # {"name": "f", "arguments": {}}
    python: bool = False  # f(a=1)
    bare: str = ""
    separators: str = ""  # between calls that are not in a list
    unsure: tuple[str, ...] = ()  # those of ``opens`` that other text begins with, too: only calls of known tools count

    @property
    def tags(self) -> tuple[str, ...]:
        return self.opens + self.closes

    def read(self, calls: Calls, opened: str | None) -> Wait[None]:
        reader, closes = calls.reader, calls.tags(*self.closes)
        yield from reader.space()
        if listed := (yield from reader.next()) == "[":
            reader.take(1)
            yield from reader.space()
        known = opened is None or opened in self.unsure
        yield from self._read_one(calls, known)
        while True:
            yield from reader.space()
            char = yield from reader.next()
            if listed:
                if (yield from reader.expect(",]")) == "]":
                    break
                yield from reader.space()
            elif (yield from reader.accept(closes)) is not None or not isinstance(char, str):
                return
            elif char in self.separators:
                reader.take(1)
                yield from reader.space()
                if not isinstance((yield from reader.next()), str):
                    return
            elif not (char == "{" and self.json) and not (self.python and (char.isalpha() or char == "_")):
                return
            yield from self._read_one(calls, known)
        calls.settle()

    def _read_one(self, calls: Calls, known: bool) -> Wait[None]:
        char = yield from calls.reader.next()
        if char == "{" and self.json:
            yield from read_call(calls, known)
        elif self.python:
            yield from read_python_call(calls, known)
        else:
            raise Malformed


@dataclass(frozen=True)
class Named:
    """A name, a tag, and the arguments as a JSON object: Mistral since 2025, DeepSeek, Kimi.

    ``<open>name<arguments_tag>{...}<close>``; also ``<open>type<arguments_tag>name```json{...}```<close>``.
    """

    call_open: str
    arguments_tag: str
    section: tuple[str, str] = ("", "")  # around all calls of an answer
    close: str = ""
    id_tag: str = ""  # <open>name<id_tag>id<arguments_tag>{...}
    fenced: bool = False  # the second form
    name_in_id: bool = False  # the name is written as functions.name:0, which is the call's id
    listed: Listed | None = None  # the form that calls may have instead, if they begin with [ or {
    bare: ClassVar[str] = ""  # calls begin with their tag

    @property
    def opens(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.section[0], self.call_open)))

    @property
    def closes(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.close, self.section[1])))

    @property
    def tags(self) -> tuple[str, ...]:
        return (*self.opens, *self.closes, *filter(None, (self.arguments_tag, self.id_tag)))

    def read(self, calls: Calls, opened: str | None) -> Wait[None]:
        reader = calls.reader
        yield from reader.space()
        if opened == self.section[0]:
            yield from reader.require(calls.tags(self.call_open))
            yield from reader.space()
        if self.listed is not None and (yield from reader.next()) in ("[", "{"):
            yield from self.listed.read(calls, opened)
            return
        tag, call_id = self.arguments_tag, None
        name, found = yield from calls.name(calls.tags(tag, self.id_tag), also="{")
        if found == self.id_tag:
            call_id, _ = yield from calls.name(calls.tags(tag), also="{")
        yield from reader.space()
        if self.fenced and (yield from reader.next()) != "{":
            name = yield from self._fenced_name(calls)
        elif self.name_in_id:
            name, call_id = name.removeprefix("functions.").rpartition(":")[0] or name, name
        calls.begin(name, call_id)
        yield from copy_arguments(calls)
        if self.fenced:
            yield from calls.close(calls.tags("```"))

    def _fenced_name(self, calls: Calls) -> Wait[str]:
        name, _ = yield from calls.name(calls.tags("```json", "```"), also="{")
        return name


@dataclass(frozen=True)
class Marked:
    """Each argument between tags of its own: Qwen3 Coder, Seed, GLM, MiniMax, DeepSeek V3.2.

    ``<call_open>name<name_close>  <key_open>key<key_close>value<value_close>  <call_close>``. Values are text. What
    they mean is said by ``string_attribute``, or by the tool's schema; strings come out while they come.
    """

    section: tuple[str, str]
    call_open: str  # empty: the section's tag is the call's
    name_close: str  # empty: the name ends with its line, or where the next tag begins
    key_open: str
    key_close: str
    value_close: str
    call_close: str
    value_open: str = ""  # between key and value, behind white space
    trims_lines: bool = False  # one line end after the beginning of a value and one before its end are no part of it
    string_attribute: bool = False  # key_close is one of '" string="true">' and '" string="false">'
    bare: ClassVar[str] = ""  # calls begin with their tag

    @property
    def opens(self) -> tuple[str, ...]:
        return (self.section[0],)

    @property
    def closes(self) -> tuple[str, ...]:
        return (self.section[1],)

    @property
    def tags(self) -> tuple[str, ...]:
        inner = (self.call_open, self.name_close, self.key_open, *self._key_closes, self.value_open)
        return tuple(filter(None, (*self.section, *inner, self.value_close, self.call_close)))

    @property
    def _key_closes(self) -> tuple[str, ...]:
        if not self.string_attribute:
            return (self.key_close,)
        return ('" string="true">', '" string="false">', self.key_close)

    def read(self, calls: Calls, opened: str | None) -> Wait[None]:
        reader = calls.reader
        yield from reader.space()
        if not self.call_open:
            yield from self._read_call(calls)
            return
        yield from reader.require(calls.tags(self.call_open))
        while True:
            yield from self._read_call(calls)
            if (yield from calls.close(calls.tags(self.call_open))) is None:
                return

    def _read_call(self, calls: Calls) -> Wait[None]:
        if self.name_close:
            name, found = yield from calls.name(calls.tags(self.name_close))
        else:
            name, found = yield from calls.name(calls.tags("\n", self.key_open, self.call_close))
        calls.begin(name)
        separator = "{"
        while found != self.call_close:
            if found != self.key_open:
                yield from calls.reader.space()
                found = yield from calls.reader.require(calls.tags(self.key_open, self.call_close))
                continue
            key, key_close = yield from self._read_key(calls)
            calls.write(f'{separator}"{escaped(key)}": ')
            yield from self._read_value(calls, name, key, key_close)
            separator, found = ", ", ""
        calls.write("{}" if separator == "{" else "}")
        calls.end()

    def _read_key(self, calls: Calls) -> Wait[tuple[str, str]]:
        key, found = yield from calls.name(calls.tags(*self._key_closes))
        if self.value_open:
            yield from calls.reader.space()
            yield from calls.reader.require(calls.tags(self.value_open))
        return key, found

    def _read_value(self, calls: Calls, name: str, key: str, key_close: str) -> Wait[None]:
        types = calls.tools.types(name, key)
        is_string = key_close.endswith('"true">') if key_close != self.key_close else types == {"string"}
        value = _Value(calls, is_string, self.trims_lines)
        if is_string:
            calls.write('"')
        if (yield from calls.reader.scan(calls.tags(self.value_close), value.add)) is None:
            if is_string:
                calls.write(escaped(value.held))
            raise Malformed
        calls.write('"' if is_string else calls.tools.value(name, key, value.text))


class _Value:
    """The text of one value: a string is written while it comes, anything else at its end."""

    def __init__(self, calls: Calls, is_string: bool, trims_lines: bool) -> None:
        self._calls, self._is_string, self._trims_lines = calls, is_string, trims_lines
        self._pieces: list[str] = []
        self.held = ""  # a line end, which may be the value's last
        self._begun = False

    def add(self, text: str) -> None:
        if self._trims_lines:
            text = self.held + text
            if not self._begun:
                text = text.removeprefix("\n")
                self._begun = True
            kept = text.removesuffix("\n")
            text, self.held = kept, text[len(kept) :]
        if self._is_string:
            self._calls.write(escaped(text))
        else:
            self._pieces.append(text)

    @property
    def text(self) -> str:
        """Of a value that is no string."""
        return "".join(self._pieces)
