"""``adapter_config.json`` of a LoRA adapter, as peft writes it: which modules it changes, and by what factor.

Source: ``LoraConfig`` of huggingface/peft (``src/peft/tuners/lora/config.py``), its matching of names
(``check_target_module_exists``, ``get_pattern_key``) and its factors (``lora_alpha / r``, with ``use_rslora``
``lora_alpha / sqrt(r)``). What changes the arithmetic in a way that exl does not compute is refused by name, and so is
a key that exl does not know, unless its value says that it is off.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl.checkpoint.config_reader import ConfigReader, read_json
from exl.checkpoint.header import shown
from exl.checkpoint.module_pattern import ModuleMatcher, ModulePattern
from exl.errors import ConfigError, UnsupportedModelError

CONFIG_NAME = "adapter_config.json"
MAX_RANK = 1 << 12
_MAX_STEPS = 1 << 18  # of all patterns against one name
_MAX_PATTERNS = 1 << 9
_parsed = functools.lru_cache(4 * _MAX_PATTERNS)(ModulePattern.parse)
_READ = {
    *("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("init_lora_weights", "fan_in_fan_out", "base_model_name_or_path"),
}
# Of training, or about how the adapter came to be: they say nothing about what it computes.
_WITHOUT_MEANING = {
    *("auto_mapping", "inference_mode", "revision", "peft_version", "lora_dropout", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying"),
}
# Ways to begin that leave the model's own weights as they are; the others change them, and peft does so on loading.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What the file says, checked."""

    source: str  # the file, for messages
    base: str  # the model that it was trained for, as the file names it; "": it does not say
    rank: int
    alpha: float
    use_rslora: bool
    ranks: Mapping[str, int]  # by pattern of module names
    alphas: Mapping[str, float]
    targets: tuple[str, ...] | str  # ends of module names, or a pattern of whole names
    excluded: tuple[str, ...] | str
    layers: frozenset[int] | None  # None: all

    @classmethod
    def from_folder(cls, folder: Path) -> AdapterConfig:
        """Raises ``ConfigError`` for an invalid value, ``UnsupportedModelError`` for what exl does not compute."""
        path = folder / CONFIG_NAME
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = CONFIG_NAME) -> AdapterConfig:
        read = ConfigReader(values, source)
        _refuse_others(read)
        if not read.has("target_modules"):
            raise read.error("target_modules", "names of modules")
        return cls(
            source=source,
            base=read.text("base_model_name_or_path", ""),
            rank=read.integer("r", 8, high=MAX_RANK),
            alpha=read.number("lora_alpha", 8.0, above=False),
            use_rslora=read.flag("use_rslora", False),
            ranks={key: sub.integer(key, high=MAX_RANK) for key, sub in _by_pattern(read, "rank_pattern")},
            alphas={key: sub.number(key, above=False) for key, sub in _by_pattern(read, "alpha_pattern")},
            targets=_names(read, "target_modules"),
            excluded=_names(read, "exclude_modules"),
            layers=_layers(read),
        )

    def changes(self, module: str, layer_idx: int) -> bool:
        """Whether the adapter changes this module of a layer. ``module``: its whole name."""
        if self._is_named(module, self.excluded) or not self._is_named(module, self.targets):
            return False
        # Patterns and whole names say it all: ``layers_to_transform`` is of ends of names.
        whole = isinstance(self.targets, str) or module in self.targets
        return whole or self.layers is None or layer_idx in self.layers

    def rank_of(self, module: str) -> int:
        return self._by_name(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of B A."""
        rank, alpha = self.rank_of(module), self._by_name(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _is_named(self, module: str, names: tuple[str, ...] | str) -> bool:
        if isinstance(names, str):
            return bool(names) and self._matches(f"({names})$", module)
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _by_name(self, values: Mapping[str, Any], module: str, default: Any) -> Any:
        """The value of the first pattern that the name, or its end behind a dot, matches."""
        return next((value for key, value in values.items() if self._matches(rf"(.*\.)?({key})$", module)), default)

    def _matches(self, pattern: str, module: str) -> bool:
        try:
            return ModuleMatcher(module, _MAX_STEPS).matches(_parsed(pattern))
        except ConfigError as error:
            raise ConfigError(f"{self.source}: {shown(pattern)}: {error}") from None


def _refuse_others(read: ConfigReader) -> None:
    """What this adapter is, or does, that exl does not compute."""
    wanted: Mapping[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "task_type": (None, "CAUSAL_LM"),
        "bias": (None, "none"),
        "fan_in_fan_out": (None, False),  # of Conv1D, which no family of exl's has
        "modules_to_save": (None, []),
        "init_lora_weights": (None, *_INITS),
    }
    for key, good in wanted.items():
        found = read.values.get(key)
        if not any(found is value or (isinstance(found, str | list) and found == value) for value in good):
            expected = " or ".join(repr(value) for value in good if value is not None and value != [])
            raise _unsupported(read, key, expected or "none")
    for key, found in read.values.items():
        if key not in _READ and key not in _WITHOUT_MEANING and found not in (None, False, [], {}, ""):
            raise _unsupported(read, key, "none: exl does not compute it")


def _unsupported(read: ConfigReader, key: str, expected: str) -> UnsupportedModelError:
    found = repr(read.values[key])[:60] if key in read.values else "nothing"
    return UnsupportedModelError(f"{read.source}: {key}: found {found}, expected {expected}")


def _names(read: ConfigReader, key: str) -> tuple[str, ...] | str:
    value = read.values.get(key)
    if isinstance(value, str):
        return value
    if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise read.error(key, "names of modules, or a pattern of them")
    return tuple(value or ())


def _by_pattern(read: ConfigReader, key: str) -> list[tuple[str, ConfigReader]]:
    found = read.object(key)
    if len(found) > _MAX_PATTERNS:
        raise ConfigError(f"{read.source}: {key}: found {len(found)} patterns, expected at most {_MAX_PATTERNS}")
    return [(pattern, ConfigReader(found, f"{read.source}: {key}")) for pattern in found]


def _layers(read: ConfigReader) -> frozenset[int] | None:
    value = read.values.get("layers_to_transform")
    if value is None or value == []:
        return None
    indices = value if isinstance(value, list) else [value]
    if not all(type(index) is int and index >= 0 for index in indices):
        raise read.error("layers_to_transform", "numbers of layers")
    pattern = read.values.get("layers_pattern")
    if pattern not in (None, "", [], "layers", ["layers"]):
        raise read.error("layers_pattern", "'layers', as exl's families call them")
    return frozenset(indices)
