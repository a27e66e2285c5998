"""Grammars of tool calls whose arguments follow the tools' schemas, each format in its own way of writing."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from exl.errors import ConfigError
from exl.parse.braced_calls import Braced
from exl.parse.formats import TOOL_FORMATS
from exl.parse.lark import Lark
from exl.parse.syntaxes import Marked, Named
from exl.parse.tools import JSON_TYPES, resolved, schema_types


@dataclass(frozen=True)
class Function:
    """A tool, checked."""

    name: str
    schema: Mapping[str, Any]  # of its arguments, an object
    strict: bool


@dataclass(frozen=True)
class CallGrammar:
    """Calls as a format writes them: ``open``, if it has such a tag, and ``rest``, expressions of a ``Lark``."""

    open: str
    rest: str


@dataclass(frozen=True)
class _JsonShape:
    """How a format writes calls that are JSON objects."""

    before: str = ""
    head: str = '{"name": '
    middle: str = ', "arguments": '
    after: str = "}"
    between: str = ", "  # two calls; with ``repeats`` between the tags around two calls
    behind: str = ""
    repeats: bool = False  # each call has tags of its own


_JSON_SHAPES = {
    "hermes": _JsonShape(before="\n", behind="\n", between="\n", repeats=True),
    "llama3_json": _JsonShape(middle=', "parameters": ', between="; "),
    "command": _JsonShape("[\n    ", '{"tool_call_id": "0", "tool_name": ', ', "parameters": ', between=",\n    ",
                          behind="\n]"),
    "granite": _JsonShape(before="[", behind="]"),
    "nemotron": _JsonShape(before="[", behind="]"),
    "tool_calls": _JsonShape(before="[", behind="]"),
    "json": _JsonShape(between="\n"),
}  # fmt: skip
# Those of Python, and what stands around them: (before, between, behind).
_PYTHON_SHAPES = {
    "llama_pythonic": ("[", ", ", "]"),
    "lfm2": ("[", ", ", "]"),
    "olmo3": ("", "\n", ""),
    "gemma": ("\n", "\n", "\n"),
}
_LINE_END = "\n"  # no backslash may stand in the braces of an f-string
_BARE = ("llama3_json", "llama_pythonic", "json")  # in which calls stand without a tag


def call_grammar(lark: Lark, name: str, functions: Sequence[Function], parallel: bool) -> CallGrammar:
    """Calls of these functions in the tool format of this name; several if ``parallel``.

    Raises ``ConfigError`` that names the function and what of its schema the format has no grammar for.
    """
    syntax = TOOL_FORMATS[name]
    if name in _JSON_SHAPES:
        return _json_calls(lark, name, functions, parallel)
    if name in _PYTHON_SHAPES:
        return _python_calls(lark, name, functions, parallel)
    if isinstance(syntax, Named):
        return _named_calls(lark, syntax, functions, parallel)
    if isinstance(syntax, Marked):
        return _marked_calls(lark, syntax, functions, parallel)
    assert isinstance(syntax, Braced)
    one = lark.one_of([_braced_call(lark, syntax, function) for function in functions])
    close = lark.text(syntax.close)
    return CallGrammar(syntax.open, _sequence(f"{one} {close}", f"{lark.text(syntax.open)} {one} {close}", parallel))


def _sequence(first: str, further: str, parallel: bool) -> str:
    """One call, or several if ``parallel``. ``further``: a call with what separates it from the one before."""
    return f"{first} ({further})*" if parallel else first


def _tags(name: str) -> tuple[str, str]:
    """The tags around calls that exl makes a model write: the first ones."""
    syntax = TOOL_FORMATS[name]
    if name in _BARE:
        return "", ""
    return syntax.opens[0], syntax.closes[0] if syntax.closes else ""


def _json_calls(lark: Lark, name: str, functions: Sequence[Function], parallel: bool) -> CallGrammar:
    shape = _JSON_SHAPES[name]
    open_tag, close_tag = _tags(name)
    if name == "granite" and not lark.is_own(close_tag):  # Granite 3 has none
        close_tag = ""
    one = lark.one_of([
        f"{lark.text(shape.head + json.dumps(function.name) + shape.middle)} {lark.json(function.schema)} "
        f"{lark.text(shape.after)}"
        for function in functions
    ])  # fmt: skip
    before = lark.text(shape.before)
    behind = lark.text(shape.behind, close_tag)
    if shape.repeats:
        call = f"{before} {one} {behind}"
        return CallGrammar(open_tag, _sequence(call, f"{lark.text(shape.between, open_tag)} {call}", parallel))
    return CallGrammar(open_tag, f"{before} {_sequence(one, f'{lark.text(shape.between)} {one}', parallel)} {behind}")


def _named_calls(lark: Lark, syntax: Named, functions: Sequence[Function], parallel: bool) -> CallGrammar:
    if syntax.listed is not None and not lark.is_own(syntax.arguments_tag):  # Mistral until 2024
        head, middle, an_id = '{"name": ', ', "arguments": ', lark.regex('"[a-zA-Z0-9]{9}"')
        before_id, behind = lark.text(', "id": '), lark.text("}")
        one = lark.one_of([
            f"{lark.text(head + json.dumps(function.name) + middle)} {lark.json(function.schema)} "
            f"{before_id} {an_id} {behind}"
            for function in functions
        ])  # fmt: skip
        listed = _sequence(one, f"{lark.text(', ')} {one}", parallel)
        return CallGrammar(syntax.call_open, f"{lark.text(' [')} {listed} {lark.text(']')}")
    calls = []
    for function in functions:
        arguments = lark.json(function.schema)
        if syntax.name_in_id:
            number = lark.regex("(0|[1-9][0-9]?)")
            head = f"{lark.text(f'functions.{function.name}:')} {number} {lark.text(syntax.arguments_tag)}"
        elif syntax.id_tag and lark.is_own(syntax.id_tag):
            an_id = f"({lark.text(syntax.id_tag)} {lark.regex('[a-zA-Z0-9]{9}')})?"
            head = f"{lark.text(function.name)} {an_id} {lark.text(syntax.arguments_tag)}"
        else:
            head = lark.text(function.name, syntax.arguments_tag)
        calls.append(f"{head} {arguments}")
        if syntax.fenced:
            head = lark.text("function", syntax.arguments_tag, f"{function.name}\n```json\n")
            calls.append(f"{head} {arguments} {lark.text(_LINE_END, '```')}")
    call = f"{lark.one_of(calls)} {lark.text(syntax.close)}"
    begin, end = syntax.section
    inner = _sequence(call, f"{lark.text(syntax.call_open)} {call}", parallel)
    if not begin:
        return CallGrammar(syntax.call_open, inner)
    return CallGrammar(begin, f"{lark.text(syntax.call_open)} {inner} {lark.text(end)}")


# ---- formats whose arguments are not JSON


def _marked_calls(lark: Lark, syntax: Marked, functions: Sequence[Function], parallel: bool) -> CallGrammar:
    begin, end = syntax.section
    one = lark.one_of([_marked_call(lark, syntax, function) for function in functions])
    if not syntax.call_open:  # the section's tags are the call's
        return CallGrammar(begin, _sequence(one, f"{lark.text(_LINE_END, begin)} {one}", parallel))
    if syntax.section[0] == "<tool_call>":  # each call has a section
        call = f"{lark.text(_LINE_END)} {one} {lark.text(_LINE_END, end)}"
        return CallGrammar(begin, _sequence(call, f"{lark.text(_LINE_END, begin)} {call}", parallel))
    calls = _sequence(one, f"{lark.text(_LINE_END)} {one}", parallel)
    return CallGrammar(begin, f"{lark.text(_LINE_END)} {calls} {lark.text(_LINE_END, end)}")


def _marked_call(lark: Lark, syntax: Marked, function: Function) -> str:
    line = "\n" if syntax.trims_lines else ""
    pieces = [lark.text(syntax.call_open, function.name, syntax.name_close, "\n")]
    for key, schema, is_required in _properties(function):
        where = f"{function.name}.{key}"
        is_text = _is_text(function, schema, where)
        key_close = f'" string="{"true" if is_text else "false"}">' if syntax.string_attribute else syntax.key_close
        begin = [syntax.key_open, key, key_close]
        begin += ["\n", syntax.value_open] if syntax.value_open else [line]
        if is_text and (choices := _choices(resolved(schema, function.schema))) is None:
            value = lark.until(syntax.value_close)
        elif is_text:
            value = f"({' | '.join(map(lark.text, choices or ()))}) {lark.text(line, syntax.value_close)}"
        else:
            value = f"{lark.json(_within(function, schema))} {lark.text(line, syntax.value_close)}"
        piece = f"{lark.text(*begin)} {value} {lark.text(_LINE_END)}"
        pieces.append(piece if is_required else f"({piece})?")
    return lark.rule(" ".join([*pieces, lark.text(syntax.call_close)]))


def _python_calls(lark: Lark, name: str, functions: Sequence[Function], parallel: bool) -> CallGrammar:
    before, between, behind = _PYTHON_SHAPES[name]
    open_tag, close_tag = _tags(name)
    one = lark.one_of([_python_call(lark, function) for function in functions])
    calls = _sequence(one, f"{lark.text(between)} {one}", parallel)
    return CallGrammar(open_tag, f"{lark.text(before)} {calls} {lark.text(behind, close_tag)}")


def _python_call(lark: Lark, function: Function) -> str:
    if not all(part.isidentifier() for part in function.name.split(".")):
        raise ConfigError(f"{function.name}: found a name that Python has not, which this model's tool format needs")
    values = _PythonValues(lark)
    members = [
        (f"{key}=", values.of(schema, f"{function.name}.{key}"), is_required)
        for key, schema, is_required in _properties(function)
    ]
    for key, _, _ in members:
        if not key[:-1].isidentifier():
            raise ConfigError(
                f"{function.name}: found a parameter {key[:-1]!r}, expected a name as Python has it in this format"
            )
    return f"{lark.text(function.name + '(')} {_members(lark, members, ', ')} {lark.text(')')}"


def _members(lark: Lark, members: Sequence[tuple[str, str, bool]], separator: str) -> str:
    """Keys and values in their order, those that are not required or not, with separators between."""
    # From the last to the first: what may follow if something stands before, and if nothing does.
    behind = first = ""
    for key, value, is_required in reversed(members):
        here = f"{lark.text(key)} {value} {behind}"
        follows = f"{lark.text(separator + key)} {value} {behind}"
        if is_required:
            behind, first = lark.rule(follows), lark.rule(here)
        else:
            first = lark.rule(f"{here} | {first}") if first else f"({lark.rule(here)})?"
            behind = lark.rule(f"{follows} | {behind}") if behind else f"({lark.rule(follows)})?"
    return first


class _Values(ABC):
    """Grammars of values as a format that is not JSON writes them. ``where``: how errors name a value."""

    separator: str  # between the items of a list
    words: Mapping[str, str]  # for the types boolean and null

    def __init__(self, lark: Lark) -> None:
        self.lark = lark

    @abstractmethod
    def string(self) -> str:
        """Any string."""

    @abstractmethod
    def literal(self, value: Any, where: str) -> str:
        """One value of JSON's."""

    @abstractmethod
    def object(self, schema: Mapping[str, Any], where: str) -> str: ...

    def of(self, schema: Mapping[str, Any], where: str) -> str:
        """The values of a schema. Raises ``ConfigError`` for what the format has no grammar for."""
        if (choices := _choices(schema)) is not None:
            return self.lark.one_of([self.literal(choice, where) for choice in choices])
        return self.lark.one_of([self._of_kind(kind, schema, where) for kind in _kinds(schema, where)])

    def _of_kind(self, kind: str, schema: Mapping[str, Any], where: str) -> str:
        if kind == "string":
            _refuse(schema, ("minLength", "maxLength", "pattern", "format"), where)
            return self.string()
        if kind in ("integer", "number"):
            return self.lark.json({"type": kind, **{key: schema[key] for key in _BOUNDS if key in schema}})
        if kind == "array":
            return self._list(schema, where)
        return self.object(schema, where) if kind == "object" else self.words[kind]

    def _list(self, schema: Mapping[str, Any], where: str) -> str:
        _refuse(schema, ("minItems", "maxItems", "uniqueItems", "prefixItems", "contains"), where)
        items = schema.get("items")
        if not isinstance(items, Mapping):
            raise ConfigError(f"{where}: found an array without a schema for its items, expected one in this format")
        item = self.of(items, f"{where}[]")
        return f'"[" ({item} ({self.lark.text(self.separator)} {item})*)? "]"'


class _PythonValues(_Values):
    separator = ", "
    words: ClassVar = {"boolean": '("True" | "False")', "null": '"None"'}

    def string(self) -> str:
        return self.lark.regex(r'"([^"\\\x00-\x1f]|\\["\\nt])*"')

    def literal(self, value: Any, where: str) -> str:
        if isinstance(value, str):
            if not value.isprintable():
                raise ConfigError(f"{where}: found the value {value!r}, expected characters that can be printed")
            return self.lark.text(json.dumps(value, ensure_ascii=False))
        if value is None or isinstance(value, bool | int | float):
            return self.lark.text(repr(value))
        raise ConfigError(f"{where}: found the value {value!r}, expected texts, numbers, true, false or null")

    def object(self, schema: Mapping[str, Any], where: str) -> str:
        raise ConfigError(f"{where}: found an object, for whose schema this model's tool format has no grammar")


class _BracedValues(_Values):
    separator = ","
    words: ClassVar = {"boolean": '("true" | "false")', "null": '"null"'}

    def __init__(self, lark: Lark, syntax: Braced) -> None:
        super().__init__(lark)
        self._quote = syntax.quote

    def string(self) -> str:
        return f"{self.lark.text(self._quote)} {self.lark.until(self._quote)}"

    def literal(self, value: Any, where: str) -> str:
        if isinstance(value, str):
            quote = self.lark.text(self._quote)
            return f"{quote} {self.lark.text(value)} {quote}"
        return self.lark.text(json.dumps(value))

    def object(self, schema: Mapping[str, Any], where: str) -> str:
        members = [
            (f"{key}:", self.of(inner, f"{where}.{key}"), is_required)
            for key, inner, is_required in _properties(Function(where, schema, True))
        ]
        return f'"{{" {_members(self.lark, members, self.separator)} "}}"'


def _braced_call(lark: Lark, syntax: Braced, function: Function) -> str:
    arguments = _BracedValues(lark, syntax).object(function.schema, function.name)
    return f"{lark.text(f'call:{function.name}')} {arguments}"


# ---- schemas, for formats that are not JSON

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_NOTES = ("type", "description", "title", "default", "examples", "deprecated", "$comment", "strict", "x-guidance")
_OF_OBJECTS = (*_NOTES, "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id")
_OF_VALUES = (*_NOTES, "enum", "const", "items", *_BOUNDS, "minLength", "maxLength", "pattern", "format", "properties")
_OF_VALUES += ("required", "additionalProperties", "minItems", "maxItems", "uniqueItems", "prefixItems", "contains")


def _properties(function: Function) -> list[tuple[str, Mapping[str, Any], bool]]:
    """A function's parameters: name, schema, whether it is required."""
    schema = function.schema
    if others := [key for key in schema if key not in _OF_OBJECTS]:
        raise ConfigError(
            f"{function.name}: found {others[0]!r} in its schema, for which this model's tool format has no grammar"
        )
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise ConfigError(f"{function.name}: found a schema whose 'properties' or 'required' is none, expected both")
    if missing := [key for key in required if key not in properties]:
        raise ConfigError(f"{function.name}: found {missing[0]!r} required, expected it among the properties")
    for key, inner in properties.items():
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{function.name}.{key}: found {inner!r}, expected a schema")
        if not key or any(char in key for char in "<>{}[]()\"'`,;:= \n"):
            raise ConfigError(f"{function.name}: found a parameter {key!r}, whose name this tool format cannot write")
    return [(key, inner, key in required) for key, inner in properties.items()]


def _kinds(schema: Mapping[str, Any], where: str) -> list[str]:
    """The types of a value whose schema is types and simple limits, and nothing else."""
    if others := [key for key in schema if key not in _OF_VALUES]:
        raise ConfigError(f"{where}: found {others[0]!r}, for which this model's tool format has no grammar")
    named = schema.get("type")
    kinds = [named] if isinstance(named, str) else named
    if not isinstance(kinds, list) or not kinds or not all(kind in JSON_TYPES for kind in kinds):
        raise ConfigError(f"{where}: found the type {named!r}, expected one of {', '.join(JSON_TYPES)} in this format")
    return kinds


def _choices(schema: Mapping[str, Any]) -> list[Any] | None:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else None


def _is_text(function: Function, schema: Mapping[str, Any], where: str) -> bool:
    """Whether a value is written as bare text. What is no text must be no string either: the parser could not tell."""
    schema = resolved(schema, function.schema)
    kinds = schema_types(schema, function.schema)
    if not kinds:
        raise ConfigError(f"{where}: found no 'type', for which this model's tool format has no grammar")
    if "string" not in kinds:
        return False
    if (choices := _choices(schema)) is not None:
        if not all(isinstance(choice, str) and choice.strip() == choice and "<" not in choice for choice in choices):
            raise ConfigError(f"{where}: found the values {choices!r}, which this model's tool format cannot write")
        return True
    if kinds - {"string", "null"}:
        raise ConfigError(f"{where}: found the types {sorted(kinds)}, expected a string or none in this format")
    for part in (schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())):
        allowed = (*_NOTES, "anyOf", "oneOf")
        _refuse(part, [key for key in part if key not in allowed], where)
    return True


def _refuse(schema: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in keys:
        if key in schema:
            raise ConfigError(f"{where}: found {key!r}, for which this model's tool format has no grammar")


def _within(function: Function, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's schema with the definitions that it may refer to."""
    shared = {key: function.schema[key] for key in ("$defs", "definitions") if key in function.schema}
    return {**shared, **schema}
