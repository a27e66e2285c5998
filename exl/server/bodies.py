"""A request's body: bounded, read once, parsed and checked by a pydantic model, described in the OpenAPI document.

Not by FastAPI's own ``body: Model``: that parses with Python's ``json`` first, which takes NaN and lone surrogates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError
from pydantic.json_schema import models_json_schema

from exl.server.errors import ApiError

_SCHEMAS = "#/components/schemas/"
M = TypeVar("M", bound=BaseModel)
Json = Annotated[Any, PlainSerializer(lambda value: value)]  # whatever JSON can hold


class Body(BaseModel):
    """A body whose unknown keys are errors, since an option that nobody reads is not what its sender meant."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), str_max_length=None)


async def read_body(request: Request, model: type[M]) -> M:
    """Raises ``ApiError``: 400 for what is no JSON or does not fit, 413 for what is too long."""
    return parse_body(await request.body(), model)


def parse_body(data: bytes, model: type[M]) -> M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _explained(error, model) from None


def _explained(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """The first of what is wrong: the field, what was found, what was expected."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json")
    where = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{where}: unknown field", code="unknown_field", param=where)
    found = "" if first["type"] == "missing" else f", found {_shown(first['input'])}"
    text = f"{where or 'body'}: {first['msg'][:1].lower()}{first['msg'][1:]}{found}"
    return ApiError(400, text, code="invalid_value", param=where or None)


def _path(loc: tuple[int | str, ...]) -> str:
    """``("messages", 0, "content")`` -> ``messages[0].content``; names of a union's members, which pydantic puts among
    them, are left out."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.replace("_", "").isalnum() and part.islower() and part not in ("str", "int", "float", "bool"):
            text += f".{part}" if text else part
    return text


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def json_body(*models: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route that takes one of these models."""
    refs = [{"$ref": f"{_SCHEMAS}{model.__name__}"} for model in models]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "x-exl-models": [model.__name__ for model in models],
    }


def body_schemas(models: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """``components.schemas`` of the OpenAPI document, by name."""
    _, found = models_json_schema(
        [(model, "validation") for model in models.values()], ref_template=_SCHEMAS + "{model}"
    )
    return found.get("$defs", {})
