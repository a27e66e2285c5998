"""A request's body: bounded, read once, parsed and checked by a pydantic model, described in the OpenAPI document.

Not by FastAPI's own ``body: Model``: that parses with Python's ``json`` first, which takes NaN and lone surrogates.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Discriminator, PlainSerializer, Tag, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import from_json

from exl.server.errors import ApiError

_SCHEMAS = "#/components/schemas/"
_REPR = reprlib.Repr()  # looks at no more of a large value than it shows
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 76
M = TypeVar("M", bound=BaseModel)
Json = Annotated[Any, PlainSerializer(lambda value: value)]  # whatever JSON can hold


def text_or(items: Any) -> Any:
    """The type of a text or of a list, ``items``. Told apart by hand, so that an error is of the one that was meant;
    pydantic would tell those of both."""

    def tag(value: Any) -> str:
        return "List" if isinstance(value, list) else "Text"

    return Annotated[Annotated[str, Tag("Text")] | Annotated[items, Tag("List")], Discriminator(tag)]


class Body(BaseModel):
    """A body whose unknown keys are errors, since an option that nobody reads is not what its sender meant."""

    # Strict: true is not 1, "3" not 3. From JSON, whole numbers are still taken for fractions, lists for tuples.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


async def read_body(request: Request, model: type[M]) -> M:
    """Raises ``ApiError``: 400 for what is no JSON or does not fit, 413 for what is too long, 415 for a body that does
    not say that it is JSON: a page of another site could send that without asking the browser (fetch.spec.whatwg.org,
    "CORS-safelisted request-header")."""
    found = request.headers.get("content-type", "")
    kind = found.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        text = f"content-type: found {_shown(found) if found else 'none'}, expected application/json"
        raise ApiError(415, text, code="unsupported_media_type")
    return parse_body(await request.body(), model)


def parse_body(data: bytes, model: type[M]) -> M:
    try:
        if b"NaN" in data or b"Infinity" in data:  # JSON has no such numbers, pydantic's models take them
            from_json(data, allow_inf_nan=False)
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _explained(error) from None
    except ValueError as error:
        raise _no_json(str(error)) from None


def _no_json(why: str) -> ApiError:
    return ApiError(400, f"the body is no JSON: {why.removeprefix('Invalid JSON: ')}", code="invalid_json")


def _explained(error: ValidationError) -> ApiError:
    """The first of what is wrong: the field, what was found, what was expected."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return _no_json(first["msg"])
    where = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        outer, name = _path(first["loc"][:-1]), str(first["loc"][-1])
        name = name[:80] if name.isidentifier() else _shown(name)  # a client's own word
        where = f"{outer}.{name}" if outer else name
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
    text = _REPR.repr(value)
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
