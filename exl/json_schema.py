"""JSON schemas as requests give them, and the white space of the JSON that follows them."""

from __future__ import annotations

import json
from typing import Any

from exl.errors import ConfigError

# Between two parts of JSON: a space, or a line end and indentation. Unbounded white space, which JSON also permits, is
# where a model that has nothing more to say goes on and on (llama.cpp bounds it in the same way in json.gbnf).
JSON_SPACE = r" |\n{1,2}[ \t]{0,20}"
EXPECTED = "expected a JSON schema as a dictionary or as JSON text, a pydantic model, True or 'object'"


def schema_of(value: Any) -> dict[str, Any]:
    """The schema that ``RequestOptions.json_schema`` means: a dictionary, JSON text of one, a pydantic model (any class
    with ``model_json_schema``), or True or "object" for any JSON object. Raises ``ConfigError`` for anything else."""
    if value is True or value == "object":
        return {"type": "object"}
    try:
        if hasattr(value, "model_json_schema"):
            value = value.model_json_schema()
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"json_schema: {error}; {EXPECTED}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"json_schema: found {value!r} ({type(value).__name__}), {EXPECTED}")
    return found
