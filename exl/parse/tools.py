"""What the tools of a request are: their names, and the types of their parameters, for formats that write none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from exl.parse.json_text import PYTHON_WORDS, checked_object
from exl.parse.reader import Malformed

_KINDS = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}  # else a number
_MAX_STEPS = 8  # of references, and of choices in each other
JSON_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")


class Tools:
    """Tools in OpenAI's shapes: ``{"type": "function", "function": {"name": ..., "parameters": SCHEMA}}``, or the
    function itself with ``name`` and ``parameters``. Read only as far as parsing needs it; what has another shape
    is left out."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._parameters: dict[str, Mapping[str, Any]] = {}
        for tool in tools or ():
            function = tool.get("function", tool)
            if isinstance(function, Mapping) and isinstance(name := function.get("name"), str) and name:
                schema = function.get("parameters", function.get("input_schema"))
                self._parameters[name] = schema if isinstance(schema, Mapping) else {}

    def __bool__(self) -> bool:
        return bool(self._parameters)

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    @cached_property
    def beginnings(self) -> frozenset[str]:
        """All beginnings of names."""
        return frozenset(name[:end] for name in self._parameters for end in range(len(name) + 1))

    def parameters(self, name: str) -> list[str]:
        """The names of a tool's parameters, in the order of its schema."""
        properties = self._parameters.get(name, {}).get("properties")
        return list(properties) if isinstance(properties, Mapping) else []

    def types(self, name: str, parameter: str) -> frozenset[str]:
        """The types of JSON that a parameter may have; empty if the schema does not say it."""
        root = self._parameters.get(name, {})
        properties = root.get("properties")
        return schema_types(properties.get(parameter) if isinstance(properties, Mapping) else None, root)

    def value(self, name: str, parameter: str, text: str) -> str:
        """JSON for a parameter that a model has written as bare text: read as JSON where a type says so or no type is
        known, as Python's words where they are meant, and otherwise a string."""
        types = self.types(name, parameter)
        bare = text.strip()
        if not types or types - {"string"}:
            found = _as_json(PYTHON_WORDS.get(bare, bare))
            if found is not None and (not types or _fits(found, types)):
                return found
        return json.dumps(text, ensure_ascii=False)


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """What a schema refers to inside of its root (``{"$ref": "#/$defs/x"}``), if it refers to something."""
    for _ in range(_MAX_STEPS):
        ref = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(ref, str) or not ref.startswith("#/"):
            break
        schema = root
        for key in ref[2:].split("/"):
            schema = schema.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(schema, Mapping) else None
    return schema


def schema_types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """The types that values of a schema may have; empty if it does not say it. ``root``: where it may refer to."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or depth > _MAX_STEPS:
        return frozenset()
    named = schema.get("type")
    if isinstance(named, str | list):
        return frozenset(t for t in ([named] if isinstance(named, str) else named) if t in JSON_TYPES)
    if isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        return frozenset(_type_of(value) for value in values)
    for key in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(key), list):
            found = [schema_types(choice, root, depth + 1) for choice in choices]
            return frozenset().union(*found) if all(found) else frozenset()
    return frozenset()


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


def _as_json(text: str) -> str | None:
    """A text that is one JSON value, as JSON; None if it is none."""
    try:
        return checked_object(f'{{"":{text}}}')[4:-1] if text else None
    except Malformed:
        return None


def _fits(text: str, types: frozenset[str]) -> bool:
    """Whether JSON is of one of these types."""
    kind = _KINDS.get(text.lstrip()[0], "number")
    is_whole = kind == "number" and not set(text) & set(".eE")
    return kind in types or (is_whole and "integer" in types)
