"""Calls that are JSON objects: ``{"name": "f", "arguments": {"a": 1}}``, alone, in a row or in a list.

Written so by Hermes and Qwen, Llama 3 ("parameters"), Mistral up to 2024, Command R ("tool_name", "tool_call_id"),
Granite, Phi 4, Nemotron, xLAM and many fine-tuned models.
"""

from __future__ import annotations

import re
from typing import Any

from exl.parse.calls import Calls
from exl.parse.json_text import checked_object, copy_json, read_json
from exl.parse.reader import Malformed, Wait

_NAMES = ("name", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_IDS = ("id", "tool_call_id", "call_id")
_WRAPPER = "function"
_OTHERS = ("type",)  # that a call may have, too
_ID = re.compile(r"[\w\-.:]{1,256}", re.ASCII)


def read_call(calls: Calls, known: bool) -> Wait[None]:
    """A call, at its ``{``. ``known``: it is one only if it is a tool of the request that it names, and it has no other
    keys than calls have.

    The call begins as soon as its name is known and its arguments begin. Arguments that come before the name wait for
    it; arguments in a string, which some models write, come out at the string's end. What is wrong behind whole
    arguments changes nothing: models forget brackets there.
    """
    call = _Call(known)
    yield from _read_members(calls, call)
    if call.is_whole:
        yield from _read_rest(calls, call.depth)
        return
    if call.name is None:
        raise Malformed
    calls.begin(call.name, call.call_id)
    calls.write("{}" if call.arguments is None else call.arguments)
    calls.end()


def _read_members(calls: Calls, call: _Call) -> Wait[None]:
    """An object, up to its end, or until the call is whole."""
    reader = calls.reader
    yield from reader.expect("{")
    call.depth += 1
    while True:
        yield from reader.space()
        if (yield from reader.next()) == "}":
            reader.take(1)
            break
        yield from _read_member(calls, call)
        if call.is_whole:
            return
        yield from reader.space()
        if (yield from reader.expect(",}")) == "}":
            break
    call.depth -= 1


class _Call:
    def __init__(self, known: bool) -> None:
        self.known = known
        self.name: str | None = None
        self.call_id: str | None = None
        self.arguments: str | None = None  # that came before the name
        self.is_whole = False  # all of it is given out
        self.depth = 0  # objects that are open: {"function": {"name": ...}} is a call, too


def _read_member(calls: Calls, call: _Call) -> Wait[None]:
    reader = calls.reader
    key = yield from _read_key(calls, call.known)
    yield from reader.space()
    yield from reader.expect(":")
    yield from reader.space()
    char = yield from reader.next()
    if key in _NAMES and char == '"' and call.name is None:
        name = yield from read_json(reader)
        if call.known and name not in calls.tools:
            raise Malformed
        call.name = name
    elif key == _WRAPPER and char == "{" and call.name is None and call.depth == 1:
        yield from _read_members(calls, call)
    elif key in _ARGUMENTS and call.arguments is None:
        yield from _read_arguments(calls, call)
    else:
        value: Any = yield from read_json(reader)
        if key in _IDS and isinstance(value, str) and _ID.fullmatch(value):
            call.call_id = value


def _read_key(calls: Calls, known: bool) -> Wait[str]:
    """A member's key. Where only known calls count, it is refused at the first character that no key of calls has."""
    reader = calls.reader
    if not known:
        if (yield from reader.next()) != '"':
            raise Malformed
        return str((yield from read_json(reader)))
    yield from reader.expect('"')
    key = ""
    keys = (*_NAMES, *_ARGUMENTS, *_IDS, *_OTHERS)
    while True:
        nexts = "".join({name[len(key)] for name in keys if name.startswith(key) and len(name) > len(key)})
        char = yield from reader.expect(nexts + ('"' if key in keys else ""))
        if char == '"':
            return key
        key += char


def _read_arguments(calls: Calls, call: _Call) -> Wait[None]:
    reader = calls.reader
    char = yield from reader.next()
    if char == "{" and call.name is not None:
        calls.begin(call.name, call.call_id)
        yield from copy_arguments(calls)
        call.is_whole = True
        return
    if char == "{":
        copied: list[str] = []
        yield from copy_json(reader, copied.append)
        call.arguments = "".join(copied)
        return
    value = yield from read_json(reader)
    if value is None or value == "":
        call.arguments = "{}"
    elif isinstance(value, str):
        call.arguments = checked_object(value.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
    else:
        raise Malformed
    if call.name is not None:
        calls.begin(call.name, call.call_id)
        calls.write(call.arguments)
        calls.end()
        call.is_whole = True


def _read_rest(calls: Calls, depth: int) -> Wait[None]:
    """Members behind the arguments and the closing brackets of so many objects, as far as they are there."""
    reader = calls.reader
    try:
        while depth:
            yield from reader.space()
            if (yield from reader.expect(",}")) == "}":
                depth -= 1
                continue
            yield from reader.space()
            yield from read_json(reader)
            yield from reader.space()
            yield from reader.expect(":")
            yield from reader.space()
            yield from read_json(reader)
    except Malformed:
        pass
    calls.settle()


def copy_arguments(calls: Calls) -> Wait[None]:
    """The arguments of a call that has begun: an object. Then the call is whole."""
    reader = calls.reader
    yield from reader.space()
    if (yield from reader.next()) != "{":
        raise Malformed
    taken, reader.taken = reader.taken, None  # what is copied is written at once
    try:
        yield from copy_json(reader, calls.output.arguments)
    finally:
        reader.taken = taken
    calls.end()
