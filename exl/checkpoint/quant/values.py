"""Values of quantization configurations, each checked for its type: what all methods need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exl.checkpoint.header import shown
from exl.checkpoint.module_names import ModuleNames
from exl.checkpoint.module_pattern import ModulePattern
from exl.errors import ConfigError, UnsupportedModelError

SUPPORTED_BITS = (2, 3, 4, 8)
BITS_KEYS, GROUP_KEYS = ("bits", "w_bit", "wbits"), ("group_size", "q_group_size")
MAX_GROUP_SIZE = 1 << 24
MAX_STEPS = 100_000  # limit for all patterns on one module; one pattern takes about 50


def first_of(values: Mapping[str, Any], source: str, *keys: str) -> Any:
    """The value under any of its names; None if none has any. ``ConfigError`` if two names have different values."""
    found = {key: values[key] for key in keys if values.get(key) is not None}
    if not found:
        return None
    first, *others = found.values()
    if any(other != first for other in others):
        raise ConfigError(f"{source}: found {shown(found)}, expected names of one thing to agree")
    return first


def read_bits(value: Any, where: str, supported: Sequence[int] = SUPPORTED_BITS) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where}: found {shown(value)}, expected one of {tuple(supported)}")
    if value not in supported:
        raise UnsupportedModelError(f"{where}: found {shown(value)}, exl has {tuple(supported)}")
    return value


def read_group_size(value: Any, where: str) -> int:
    good = isinstance(value, int) and not isinstance(value, bool) and (value == -1 or 0 < value <= MAX_GROUP_SIZE)
    if not good:
        raise ConfigError(f"{where}: found {shown(value)}, expected a number of inputs above 0, or -1 for all")
    return value


def read_sizes(values: Mapping[str, Any], source: str, supported: Sequence[int] = SUPPORTED_BITS) -> dict[str, Any]:
    """Bits and group size under all of their names, where there are any."""
    bits, group_size = (first_of(values, source, *keys) for keys in (BITS_KEYS, GROUP_KEYS))
    found: dict[str, Any] = {}
    if bits is not None:
        found["bits"] = read_bits(bits, f"{source}: bits", supported)
    if group_size is not None:
        found["group_size"] = read_group_size(group_size, f"{source}: group_size")
    return found


def require_sizes(fields: Mapping[str, Any], source: str, kind: str) -> None:
    for key in ("bits", "group_size"):
        if key not in fields:
            raise ConfigError(f"{source}: found no {key}, which {kind} checkpoint needs")


def read_flag(values: Mapping[str, Any], key: str, source: str, default: Any) -> Any:
    """The boolean under ``key``; ``default`` if there is none."""
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{source}: {key}: found {shown(value)}, expected true or false")
    return value


def read_text(values: Mapping[str, Any], key: str, source: str) -> str | None:
    """In lower case; None if there is none."""
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{source}: {key}: found {shown(value)}, expected a string")
    return None if value is None else value.lower()


def read_names(values: Mapping[str, Any], key: str, source: str) -> tuple[str, ...] | None:
    """A list of strings; None if there is none."""
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{source}: {key}: found {shown(value)}, expected a list of names")
    return tuple(value)


def read_object(values: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any] | None:
    value = values.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{source}: {key}: found {shown(value)}, expected an object")
    return value


def parse_pattern(text: str, where: str) -> ModulePattern:
    try:
        return ModulePattern.parse(text)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def module_names(name: str) -> ModuleNames:
    return ModuleNames(name, MAX_STEPS)
