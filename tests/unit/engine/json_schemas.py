"""Random JSON schemas of the kinds that people write, each of which some JSON fulfils."""

from __future__ import annotations

import random
import string
from typing import Any

# Characters that are one key of JSON, others that must be escaped, and some of several bytes.
LETTERS = string.ascii_letters + string.digits + ' _-"\\/\n\té世🙂'
PATTERNS = (
    "^[a-z]{2,5}$",
    "^[A-Z][0-9]{1,3}$",
    "^(red|green|blue)$",
    "^\\d{3}-\\d{4}$",
    "^[^@\\s]{1,8}@[a-z]{1,8}\\.com$",
)
FORMATS = ("date", "time", "date-time", "ipv4", "uuid", "email")


def word(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 6)))


def constant(rng: random.Random, depth: int = 1) -> Any:
    kinds = [lambda: rng.randint(-999, 999), lambda: word(rng), lambda: None, lambda: rng.random() < 0.5]
    kinds += [lambda: rng.choice([0.5, -2.25, 1e10, 0.001])]
    if depth:
        kinds += [lambda: [constant(rng, depth - 1) for _ in range(rng.randint(0, 2))]]
        kinds += [lambda: {word(rng): constant(rng, depth - 1) for _ in range(rng.randint(0, 2))}]
    return rng.choice(kinds)()


def text(rng: random.Random) -> dict[str, Any]:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": rng.choice(FORMATS)}
    shortest = rng.randint(0, 4)
    return {"type": "string", "minLength": shortest, "maxLength": shortest + rng.randint(0, 8)}


def number(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-2000, 2000)
    high = low + rng.randint(2, 3000)
    found: dict[str, Any] = {"type": rng.choice(["integer", "number"])}
    found |= rng.choice([{}, {"minimum": low}, {"minimum": low, "maximum": high}, {"exclusiveMaximum": high}])
    if found["type"] == "integer" and len(found) == 1 and rng.random() < 0.5:
        found["multipleOf"] = rng.randint(2, 12)
    return found


def array(rng: random.Random, depth: int) -> dict[str, Any]:
    fewest = rng.randint(0, 2)
    found: dict[str, Any] = {"type": "array", "minItems": fewest, "maxItems": fewest + rng.randint(0, 2)}
    if rng.random() < 0.3:
        items = [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": rng.randint(0, len(items))}
    return found | {"items": schema(rng, depth - 1)}


def table(rng: random.Random, depth: int) -> dict[str, Any]:
    properties = {word(rng): schema(rng, depth - 1) for _ in range(rng.randint(0, 4))}
    found: dict[str, Any] = {"type": "object", "properties": properties}
    found["required"] = [name for name in properties if rng.random() < 0.7]
    found["additionalProperties"] = rng.choice([False, False, {"type": "integer"}])
    return found


def schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """``depth``: how many levels may lie below this one."""
    leaves = [
        lambda: text(rng),
        lambda: number(rng),
        lambda: {"type": rng.choice(["boolean", "null", ["null", "boolean"]])},
        lambda: {"enum": [constant(rng) for _ in range(rng.randint(1, 4))]},
        lambda: {"const": constant(rng)},
        lambda: {"$ref": "#/$defs/shared"},
    ]
    nested = [
        lambda: array(rng, depth),
        lambda: table(rng, depth),
        lambda: {"anyOf": [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]},
        lambda: {"allOf": [{"type": "object"}, table(rng, depth)]},
    ]
    return rng.choice(nested * 2 + leaves if depth else leaves)()


def document(rng: random.Random) -> dict[str, Any]:
    """A whole schema; a third of them refer to themselves."""
    found = table(rng, 3) if rng.random() < 0.6 else schema(rng, 3)
    shared: dict[str, Any] = rng.choice([text, number])(rng)
    if rng.random() < 0.3:
        again = {"type": "array", "items": {"$ref": "#/$defs/shared"}, "maxItems": 2}
        shared = {"type": "object", "properties": {"again": again}, "additionalProperties": False}
    return found | {"$defs": {"shared": shared}}
