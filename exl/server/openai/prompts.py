"""Texts or token ids, one or several, as /v1/completions and /v1/embeddings take them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

_MOST = 2048  # texts in one request, OpenAI's own bound
_EXPECTED = f"expected a text, token ids, or a list of at most {_MOST} of one of these"
_IDS = {"type": "array", "items": {"type": "integer"}}


def _checked(value: Any) -> list[str | list[int]]:
    """A list of texts, or of lists of ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("prompts", _EXPECTED)
    if all(map(_is_id, value)):
        return [value]
    for i, item in enumerate(value):
        is_ids = isinstance(item, list) and item and all(map(_is_id, item))
        if not (isinstance(item, str) or is_ids) or isinstance(item, str) != isinstance(value[0], str):
            raise PydanticCustomError("prompts", "number {at} is another; " + _EXPECTED, {"at": i})
    if len(value) > _MOST:
        raise PydanticCustomError("prompts", "found {found}, " + _EXPECTED, {"found": len(value)})
    return value


def _is_id(value: Any) -> bool:
    return type(value) is int


Prompts = Annotated[
    Any,
    AfterValidator(_checked),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, _IDS,
                   {"type": "array", "items": _IDS}]}
    ),
]  # fmt: skip
