"""Calls that are Python expressions: ``[f(a=1, b="x"), g()]``, as Llama 3.2 and 4, LFM2, OLMo 3 and Gemma 3 write them.

Only literals are read: nothing is ever run. Their values come out as JSON while they come.
"""

from __future__ import annotations

import json
import math
import re

from exl.parse.calls import MAX_NAME, MAX_NESTING, Calls
from exl.parse.json_text import PYTHON_WORDS, escaped
from exl.parse.lexer import Tag
from exl.parse.reader import Malformed, Wait

_PLAIN = re.compile(r"[^'\"\\]+")  # what stands for itself inside a string
_WORDS = PYTHON_WORDS | {word: word for word in PYTHON_WORDS.values()}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0"} | {
    char: char for char in "\\'\""
}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


def read_python_call(calls: Calls, known: bool) -> Wait[None]:
    """A call, at its name. ``known``: it is one only if it is a tool of the request that it names. ``print(f(a=1))`` is
    a call of f."""
    reader = calls.reader
    name = yield from _read_name(calls, known)
    yield from reader.space()
    yield from reader.expect("(")
    if name == "print" and name not in calls.tools:
        yield from reader.space()
        yield from read_python_call(calls, True)
        yield from reader.space()
        if (yield from reader.next()) == ")":
            reader.take(1)
        calls.settle()
        return
    if known and name not in calls.tools:
        raise Malformed
    calls.begin(name)
    yield from _read_arguments(calls, name)
    calls.end()


def _read_name(calls: Calls, known: bool) -> Wait[str]:
    reader = calls.reader
    name = ""
    while isinstance(char := (yield from reader.next()), str) and (char.isalnum() or char in "_.-"):
        if len(name) == MAX_NAME or (not name and not (char.isalpha() or char == "_")):
            raise Malformed
        name += char
        if known and name not in calls.tools.beginnings and not "print".startswith(name):
            raise Malformed
        reader.take(1)
    return name


def _read_arguments(calls: Calls, name: str) -> Wait[None]:
    """Arguments, behind the opening bracket. Those without a name are the parameters in the order of the schema."""
    reader = calls.reader
    unnamed = calls.tools.parameters(name)
    separator = "{"
    while True:
        yield from reader.space()
        char = yield from reader.next()
        if char == ")":
            reader.take(1)
            calls.write("{}" if separator == "{" else "}")
            return
        key = ""
        if isinstance(char, str) and (char.isalpha() or char == "_"):
            key = yield from _read_word(calls)
            yield from reader.space()
        if key and (yield from reader.next()) == "=":
            reader.take(1)
            yield from reader.space()
            calls.write(f'{separator}"{escaped(key)}": ')
            if key in unnamed:
                unnamed.remove(key)
            yield from _read_value(calls)
        elif unnamed and (not key or key in _WORDS):
            calls.write(f'{separator}"{escaped(unnamed.pop(0))}": ')
            if key:
                calls.write(_WORDS[key])
            else:
                yield from _read_value(calls)
        else:
            raise Malformed
        separator = ", "
        yield from reader.space()
        if (yield from reader.next()) != ")":
            yield from reader.expect(",")


def _read_word(calls: Calls) -> Wait[str]:
    reader = calls.reader
    word = ""
    while isinstance(char := (yield from reader.next()), str) and (char.isalnum() or char == "_"):
        if len(word) == MAX_NAME:
            raise Malformed
        word += reader.take(1)
    return word


def _read_value(calls: Calls, depth: int = 0) -> Wait[None]:
    """A literal, written as JSON."""
    reader = calls.reader
    char = yield from reader.next()
    if not isinstance(char, str) or depth > MAX_NESTING:
        raise Malformed
    if char in "'\"":
        yield from _read_string(calls)
    elif char in "[(":
        yield from _read_list(calls, depth)
    elif char == "{":
        yield from _read_dict(calls, depth)
    elif char.isalpha():
        word = yield from _read_word(calls)
        if word not in _WORDS:
            raise Malformed
        calls.write(_WORDS[word])
    else:
        yield from _read_number(calls)


def _read_list(calls: Calls, depth: int) -> Wait[None]:
    close = "]" if calls.reader.take(1) == "[" else ")"
    yield from calls.members("[]", close, lambda: _read_value(calls, depth + 1))


def _read_dict(calls: Calls, depth: int) -> Wait[None]:
    calls.reader.take(1)
    yield from calls.members("{}", "}", lambda: _read_item(calls, depth + 1), begins="'\"")


def _read_item(calls: Calls, depth: int) -> Wait[None]:
    """A key, which is a string, and its value."""
    reader = calls.reader
    yield from _read_string(calls)
    yield from reader.space()
    yield from reader.expect(":")
    calls.write(": ")
    yield from reader.space()
    yield from _read_value(calls, depth)


def _read_string(calls: Calls) -> Wait[None]:
    """A string in single, double or triple quotes; those of one quote may hold line ends, as models write them."""
    reader = calls.reader
    quote = reader.take(1)
    num_quotes = 1
    if (yield from reader.next()) == quote:
        reader.take(1)
        if (yield from reader.next()) != quote:
            calls.write('""')
            return
        reader.take(1)
        num_quotes = 3
    calls.write('"')
    closing = 0  # quotes that came last, which close the string if there are enough of them
    while closing < num_quotes:
        char = yield from reader.next()
        if isinstance(char, Tag) and char.text and not closing:  # as in JSON, a tag inside a string is text
            reader.take_tag(char)
            calls.write(escaped(char.text))
            continue
        if not isinstance(char, str):
            raise Malformed
        if char == quote:
            reader.take(1)
            closing += 1
            continue
        if closing:
            calls.write(escaped(quote * closing))
            closing = 0
        if char == "\\":
            reader.take(1)
            calls.write((yield from _read_escape(calls)))
        else:
            calls.write(escaped(reader.run(_PLAIN) or reader.take(1)))
    calls.write('"')


def _read_escape(calls: Calls) -> Wait[str]:
    """What follows a backslash, as it is written in JSON. One that means nothing to Python stays, as in Python."""
    reader = calls.reader
    char = yield from reader.next()
    if not isinstance(char, str):
        raise Malformed
    reader.take(1)
    if char == "\n":
        return ""
    if char in _ESCAPES:
        return escaped(_ESCAPES[char])
    digits = ""
    for _ in range(_HEX_DIGITS.get(char, 0)):
        digits += yield from reader.expect("0123456789abcdefABCDEF")
    if not digits:
        return escaped("\\" + char)
    if int(digits, 16) > 0x10FFFF:
        raise Malformed
    return json.dumps(chr(int(digits, 16)))[1:-1]  # with escapes, so that half a pair of surrogates stays JSON


def _read_number(calls: Calls) -> Wait[None]:
    reader = calls.reader
    digits: list[str] = []
    while isinstance(char := (yield from reader.next()), str) and (char.isalnum() or char in "+-._"):
        digits.append(reader.take(1))
    calls.write(_number("".join(digits)))


def _number(text: str) -> str:
    """A number of Python as JSON. Raises ``Malformed`` for what is none, and what JSON has none for."""
    try:
        if len(text) <= 1000:
            return str(int(text, 0))
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        raise Malformed from None
    if not math.isfinite(value) or not text.isascii():
        raise Malformed
    return repr(value)
