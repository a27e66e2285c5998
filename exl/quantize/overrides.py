"""Settings of single modules: what a user asks for, and the ``dynamic`` of a configuration that says so.

A module gets its settings by the reader of the file that is written (``exl.checkpoint.quant_config``), so that both
always mean the same.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from exl.checkpoint.header import shown
from exl.checkpoint.module_pattern import ModulePattern
from exl.checkpoint.quant.values import SUPPORTED_BITS
from exl.checkpoint.quant_config import parse_quant_config
from exl.errors import ConfigError

_EXPECTED = "expected PATTERN=bits:8,group_size:32,sym:true, some of these, or PATTERN=dense"
_FLAGS = {"true": True, "false": False}


@dataclass(frozen=True)
class Settings:
    """How a module is quantized."""

    bits: int
    group_size: int  # -1: all inputs
    sym: bool


@dataclass(frozen=True)
class Override:
    """``pattern`` is a regular expression that matches from the start of a module's name, as in ``dynamic``."""

    pattern: str
    values: Mapping[str, int | bool] | None  # of ``Settings``; None: the module stays dense

    @classmethod
    def parse(cls, text: str) -> Override:
        """``"PATTERN=bits:8,group_size:32"`` or ``"PATTERN=dense"``. Raises ``ConfigError``."""
        where = f"override: {shown(text)}"
        pattern, equals, values = text.rpartition("=")
        if not equals or not pattern:
            raise ConfigError(f"{where}: {_EXPECTED}")
        try:
            ModulePattern.parse(pattern)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if values == "dense":
            return cls(pattern, None)
        found: dict[str, int | bool] = {}
        for item in values.split(","):
            key, _, value = item.partition(":")
            if key in found:
                raise ConfigError(f"{where}: {key} is there twice")
            found[key] = _parse_value(key, value, where)
        return cls(pattern, found)

    @property
    def entry(self) -> tuple[str, dict[str, Any]]:
        """Of ``dynamic``."""
        return (f"-:{self.pattern}", {}) if self.values is None else (f"+:{self.pattern}", dict(self.values))


def _parse_value(key: str, value: str, where: str) -> int | bool:
    if key == "sym" and value in _FLAGS:
        return _FLAGS[value]
    number = int(value) if value.removeprefix("-").isdecimal() and value.isascii() else None
    if key == "bits" and number in SUPPORTED_BITS:
        return number
    if key == "group_size" and number is not None and (number == -1 or number >= 2):
        return number
    known = {
        "bits": f"one of {', '.join(map(str, SUPPORTED_BITS))}",
        "group_size": "a whole number of at least 2, or -1 for one group",
        "sym": "true or false",
    }
    if key in known:
        raise ConfigError(f"{where}: {key}: found {shown(value)}, expected {known[key]}")
    raise ConfigError(f"{where}: found {shown(key)}; {_EXPECTED}")


def dynamic(overrides: Iterable[Override]) -> dict[str, dict[str, Any]]:
    """Exclusions first: readers that try all patterns in turn and those that try exclusions first then agree."""
    return dict(x.entry for x in sorted(overrides, key=lambda override: override.values is not None))


def settings_of(names: Sequence[str], base: Settings, overrides: Sequence[Override]) -> dict[str, Settings | None]:
    """The settings of each module; None: it stays dense. Raises ``ConfigError`` for a pattern that matches none of
    them."""
    values = asdict(base)
    for override in overrides:
        alone = parse_quant_config({**values, "dynamic": {f"-:{override.pattern}": {}}}, "override")
        if all(alone.for_module(name) is not None for name in names):
            raise ConfigError(
                f"override: {shown(override.pattern)} matches the name of no linear of a layer; one is {names[0]}"
            )
    config = parse_quant_config({**values, "dynamic": dynamic(overrides)}, "override")
    found = {name: config.for_module(name) for name in names}
    return {name: x and Settings(x.bits, x.group_size, x.sym) for name, x in found.items()}


_PATTERN_LAYERS = 64  # in one pattern, whose length is limited


@dataclass(frozen=True)
class Assignment:
    """The settings of all linears' modules, by name, and what a configuration has to say so."""

    settings: Mapping[str, Settings | None]
    base: Settings
    overrides: tuple[Override, ...]

    @classmethod
    def make(cls, names: Sequence[str], base: Settings, overrides: Sequence[Override]) -> Assignment:
        return cls(settings_of(names, base, overrides), base, tuple(overrides))

    def without_bits(self) -> set[str]:
        """Modules whose bits no override says."""
        other = replace(self.base, bits=next(bits for bits in SUPPORTED_BITS if bits != self.base.bits))
        changed = settings_of(list(self.settings), other, self.overrides)
        return {name for name, found in self.settings.items() if found and found.bits != changed[name].bits}

    def with_bits(self, bits: Mapping[str, int]) -> Assignment:
        """With these bits for the modules named. What most of them have is what the configuration says for all that it
        does not name."""
        counts = Counter(bits.values())
        most = max(counts, key=lambda width: (counts[width], width))
        settings = {name: x and replace(x, bits=bits.get(name, x.bits)) for name, x in self.settings.items()}
        base = replace(self.base, bits=most)
        dense = [override for override in self.overrides if override.values is None]
        return Assignment(settings, base, (*dense, *_by_name(settings, base)))


def _by_name(settings: Mapping[str, Settings | None], base: Settings) -> list[Override]:
    """Overrides for exactly the modules that differ from ``base``, as few as modules of many layers allow."""
    layers: dict[tuple[str, str, Settings], list[str]] = defaultdict(list)
    for name, found in settings.items():
        if found not in (None, base):
            before, layer, after = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name).groups()
            layers[before, after, found].append(layer)
    overrides = []
    for (before, after, found), numbers in layers.items():
        values = {key: value for key, value in asdict(found).items() if value != asdict(base)[key]}
        for start in range(0, len(numbers), _PATTERN_LAYERS):
            chosen = "|".join(numbers[start : start + _PATTERN_LAYERS])
            overrides.append(Override(f"{re.escape(before)}({chosen}){re.escape(after)}$", values))
    return overrides
