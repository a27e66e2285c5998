"""Typed access to the JSON objects that describe a checkpoint: every error names the file, the key and the value."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exl.checkpoint.lfs import lfs_pointer
from exl.errors import ConfigError
from exl.sampling_params import SamplingParams
from exl.user_text import decode_utf8

MAX_SIZE = 1 << 24  # far above any dimension of a real model; a product of two stays far below 64 bits
MAX_POSITION = 1 << 30
MAX_JSON_BYTES = 16 << 20


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises ``ConfigError``, which names the file, if that fails."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block forever
            raise ConfigError(f"{path}: not a regular file")
        if status.st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path}: {status.st_size} bytes, expected at most {MAX_JSON_BYTES}")
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_json(raw, str(path))


def parse_json(raw: bytes | bytearray, source: str) -> dict[str, Any]:
    """Like :func:`read_json`, from a file's bytes; ``source`` is its name in error messages."""
    if (pointer := lfs_pointer(raw)) is not None:
        raise ConfigError(f"{source}: {pointer}")
    try:
        value = json.loads(decode_utf8(raw))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: found a JSON {type(value).__name__}, expected an object")
    return value


class ConfigReader:
    """Typed access to a JSON object; every error names the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def error(self, key: str, expected: str) -> ConfigError:
        found = repr(self.values.get(key)) if key in self.values else "nothing"
        return ConfigError(f"{self.source}: {key}: found {found[:80]}, expected {expected}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "an integer")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0, above: bool = True) -> float:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "a number")
            return default
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
        if not good or math.isnan(value) or value < low or (above and value == low):
            raise self.error(key, f"a finite number {'above' if above else 'of at least'} {low:g}")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above 0."""
        value = self.values.get(key)
        if not isinstance(value, list) or not value:
            raise self.error(key, "a list of numbers")
        return tuple(ConfigReader({key: item}, self.source).number(key) for item in value)

    def integers(self, key: str, count: int) -> tuple[int, ...] | None:
        """A list of ``count`` integers of at least 0; None: there is none."""
        value = self.values.get(key)
        if value is None:
            return None
        good = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
        if not good or len(value) != count:
            raise self.error(key, f"{count} integers")
        return tuple(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def object(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """From an id, a list of ids, or nothing. Negative ids (some files say -1) are left out."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i > MAX_SIZE for i in ids):
            raise self.error(key, "a token id or a list of them")
        return tuple(i for i in ids if i >= 0)

    def sampling(self, key: str) -> float | int | None:
        """A parameter of ``SamplingParams``, in its range. A top_k of -1 is off, as in vLLM."""
        value = self.values.get(key)
        if value is None:
            return None
        if key == "top_k" and isinstance(value, int | float) and not isinstance(value, bool):
            value = 0 if value == -1 else int(value) if math.isfinite(value) and value == int(value) else value
        try:
            return getattr(SamplingParams(**{key: value}), key)
        except ConfigError as error:
            raise self.error(key, str(error).rpartition(", expected ")[2]) from None
