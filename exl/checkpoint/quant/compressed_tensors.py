"""compressed-tensors' configuration, as llm-compressor writes it (compressed-tensors ``quantization/quant_config.py``).

``config_groups`` have targets and what their weights are; a target is a module's name, ``re:`` and a regular expression
that matches from the name's start, or the name of a class. Names go before expressions, those before classes.
``ignore`` has targets that are dense. A group's own ``format`` goes before that of the whole; if neither says one, it
follows from the weights, as the library infers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from exl.checkpoint.header import shown
from exl.checkpoint.module_names import ModuleNames
from exl.checkpoint.module_pattern import ModulePattern
from exl.checkpoint.quant.base import QuantConfig
from exl.checkpoint.quant.foreign import TAKE_INSTEAD
from exl.checkpoint.quant.fp8 import ACTIVATIONS, Fp8Config, read_block
from exl.checkpoint.quant.values import (
    SUPPORTED_BITS,
    module_names,
    parse_pattern,
    read_bits,
    read_flag,
    read_group_size,
    read_names,
    read_object,
    read_text,
)
from exl.errors import ConfigError, UnsupportedModelError

_INT_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")
_READ = tuple(dict.fromkeys((*_INT_FORMATS, *_FLOAT_FORMATS)))
_UNSAID = ("mixed-precision", "dense")  # of the whole: says nothing of a group
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")


@dataclass(frozen=True, kw_only=True)
class IntConfig(QuantConfig):
    """Integers of one module, one in each byte."""

    group_size: int  # inputs that share a scale; -1: all
    symmetric: bool = True  # every zero is 0 of the signed codes that the files have

    method: ClassVar[str] = "compressed-tensors"

    @property
    def layout(self) -> str:
        return "int-quantized"

    def for_module(self, name: str) -> IntConfig:
        return self

    def for_quantized(self, name: str) -> IntConfig:
        return self


@dataclass(frozen=True, kw_only=True)
class PackedConfig(IntConfig):
    """Integers of one module, packed into words."""

    @property
    def layout(self) -> str:
        return "pack-quantized"


@dataclass(frozen=True)
class Target:
    """Modules by name, by pattern, or by class."""

    text: str
    pattern: ModulePattern | None = field(default=None, repr=False)

    def rank(self, names: ModuleNames) -> int | None:
        """How closely it names a module, 0 being its name; None: not at all."""
        if self.pattern is not None:
            return 1 if names.matches(self.pattern) else None
        if names.is_called(self.text):
            return 0
        kind = "Embedding" if names.name.rsplit(".", 1)[-1] in _EMBEDDINGS else "Linear"
        return 2 if self.text == kind else None


@dataclass(frozen=True)
class Group:
    """One of ``config_groups``: the parameters of the modules that its targets name."""

    name: str
    targets: tuple[Target, ...]
    config: QuantConfig


@dataclass(frozen=True, kw_only=True)
class CompressedTensorsConfig(QuantConfig):
    """A checkpoint's; its modules have ``PackedConfig``, ``IntConfig`` or ``Fp8Config``."""

    groups: tuple[Group, ...]
    ignore: tuple[Target, ...] = ()
    activations: bool = False  # the file wants inputs of linears or the KV cache quantized, too

    method: ClassVar[str] = "compressed-tensors"
    deciding: ClassVar[tuple[str, ...]] = ("groups", "ignore")

    @property
    def layout(self) -> str:
        return " and ".join(dict.fromkeys(group.config.layout for group in self.groups))

    @property
    def note(self) -> str | None:
        return f"{self.source}: {ACTIVATIONS}" if self.activations else None

    def for_module(self, name: str) -> QuantConfig | None:
        names = module_names(name)
        try:
            if any(target.rank(names) is not None for target in self.ignore):
                return None
            ranks = [(target.rank(names), group) for group in self.groups for target in group.targets]
        except ConfigError as error:
            raise ConfigError(f"{self.source}: {error}") from None
        fitting = [(rank, group) for rank, group in ranks if rank is not None]
        return min(fitting, key=lambda found: found[0])[1].config if fitting else None

    def for_quantized(self, name: str) -> QuantConfig:
        own = self.for_module(name)
        if own is None and len(self.groups) > 1:
            raise ConfigError(
                f"{self.source}: {name} is quantized in the file, but no target of config_groups names it alone, and "
                f"there are {len(self.groups)} groups"
            )
        return own or self.groups[0].config


def read_fields(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    top = read_text(values, "format", source)
    for key in ("sparsity_config", "transform_config"):
        found = read_object(values, key, source)
        if found and found.get("format") != "dense":
            raise UnsupportedModelError(f"{source}: {key}: found {shown(found)}, which exl does not have")
    stated = read_object(values, "config_groups", source)
    groups = None if stated is None else tuple(_read_group(key, own, source, top) for key, own in stated.items())
    ignore = read_names(values, "ignore", source)
    active = [read_object(own, "input_activations", source) for own in (stated or {}).values()]
    active.append(read_object(values, "kv_cache_scheme", source))
    fields = {
        "groups": groups or None,
        "ignore": None if ignore is None else _read_targets(ignore, f"{source}: ignore"),
        "activations": any(found is not None for found in active) or None,
    }
    return {key: value for key, value in fields.items() if value is not None}


def make(source: str, fields: Mapping[str, Any]) -> CompressedTensorsConfig:
    if "groups" not in fields:
        raise ConfigError(f"{source}: found no config_groups, which a compressed-tensors checkpoint needs")
    return CompressedTensorsConfig(source=source, bits=fields["groups"][0].config.bits, **fields)


def _read_group(key: str, values: Any, source: str, top: str | None) -> Group:
    where = f"{source}: config_groups: {shown(key)}"
    if not isinstance(values, Mapping):
        raise UnsupportedModelError(f"{where}: found {shown(values)}, exl reads groups that say what weights are")
    weights = read_object(values, "weights", where)
    if weights is None:
        raise UnsupportedModelError(f"{where}: found no weights, exl reads quantized weights")
    targets = _read_targets(read_names(values, "targets", where) or (), f"{where}: targets")
    active = read_object(values, "input_activations", where) is not None
    own = read_text(values, "format", where)
    stated = own if own is not None else None if top in _UNSAID else top
    return Group(key, targets, _read_weights(weights, f"{where}: weights", source, stated, active))


def _read_targets(texts: tuple[str, ...], where: str) -> tuple[Target, ...]:
    return tuple(
        Target(text, parse_pattern(text[3:], f"{where}: {shown(text)}")) if text.startswith("re:") else Target(text)
        for text in texts
    )


def _read_weights(weights: Mapping[str, Any], where: str, source: str, stated: str | None, active: bool) -> QuantConfig:
    """``stated``: the format that the file says, None if none; ``active``: activations are to be quantized, too."""
    kind = read_text(weights, "type", where) or "int"
    formats = {"int": _INT_FORMATS, "float": _FLOAT_FORMATS}.get(kind, ())
    if stated is not None and stated not in formats:
        raise UnsupportedModelError(
            f"{where}: found format {shown(stated)} of type {shown(kind)}, exl reads {', '.join(_READ)}; {TAKE_INSTEAD}"
        )
    bits, strategy = weights.get("num_bits", 8), read_text(weights, "strategy", where)
    if not formats or strategy in ("tensor_group", "token", "attn_head"):
        raise UnsupportedModelError(
            f"{where}: found type {shown(kind)}, strategy {shown(strategy)}, exl reads int and float by tensor, "
            f"channel, group or block; {TAKE_INSTEAD}"
        )
    if kind == "float":
        read_bits(bits, f"{where}: num_bits", (8,))
        group = read_group_size(weights.get("group_size"), f"{where}: group_size") if strategy == "group" else -1
        block = read_block(weights, "block_structure", where) if strategy == "block" else None
        block = block if group == -1 else (1, group)
        return Fp8Config(source=source, block=block)
    if strategy == "block":
        raise UnsupportedModelError(f"{where}: strategy: found 'block', exl reads blocks of float alone")
    group_size = weights.get("group_size")
    if strategy == "group" or (strategy is None and group_size is not None):
        group_size = read_group_size(group_size, f"{where}: group_size")
    else:
        group_size = -1
    packed = stated == "pack-quantized" or (stated is None and not active)
    return (PackedConfig if packed else IntConfig)(
        bits=read_bits(bits, f"{where}: num_bits", SUPPORTED_BITS),
        source=source,
        group_size=group_size,
        symmetric=read_flag(weights, "symmetric", where, True),
    )
