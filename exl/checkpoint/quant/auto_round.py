"""AutoRound's own configuration (``quant_method`` "auto-round"), as its ``export_to_autoround/export.py`` writes it.

AutoRound packs as other methods do, and ``packing_format`` says as which. ``extra_config`` has what single modules have
otherwise, by name or by a regular expression that is searched for anywhere in the name; a name goes before them, then
the first that fits. Modules outside of ``block_name_to_quantize`` are not quantized unless ``extra_config`` says so.
AutoRound also writes folders that say gptq or awq; those are read as what they say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from exl.checkpoint.header import shown
from exl.checkpoint.module_names import ModuleNames
from exl.checkpoint.module_pattern import ModulePattern
from exl.checkpoint.quant.awq import AWQ_BITS, AwqConfig
from exl.checkpoint.quant.base import QuantConfig
from exl.checkpoint.quant.foreign import TAKE_INSTEAD
from exl.checkpoint.quant.gptq import GptqConfig
from exl.checkpoint.quant.values import (
    SUPPORTED_BITS,
    module_names,
    parse_pattern,
    read_bits,
    read_flag,
    read_group_size,
    read_object,
    read_sizes,
    read_text,
    require_sizes,
)
from exl.errors import ConfigError, UnsupportedModelError

_DEFAULT_PACKING = "auto_round:auto_gptq"
_PLAIN = re.compile(r"[\w.]+")  # a name; anything else is a regular expression
DENSE_BITS = 16  # from here on a module is not quantized


@dataclass(frozen=True)
class ModuleValues:
    """One entry of ``extra_config``. ``pattern`` None: a name. Fields that are None: the file's value."""

    name: str
    pattern: ModulePattern | None
    bits: int | None = None  # DENSE_BITS: not quantized
    group_size: int | None = None
    sym: bool | None = None


@dataclass(frozen=True, kw_only=True)
class AutoRoundConfig(QuantConfig):
    """A checkpoint's; its modules have ``GptqConfig`` or ``AwqConfig``."""

    group_size: int  # inputs that share a scale; -1: all
    sym: bool = True
    packing: str = _DEFAULT_PACKING
    blocks: tuple[str, ...] | None = None  # beginnings of the names of modules that are quantized; None: all
    extra: tuple[ModuleValues, ...] = field(default=(), repr=False)

    method: ClassVar[str] = "auto-round"
    deciding: ClassVar[tuple[str, ...]] = ("bits", "group_size", "sym", "packing", "extra")

    @property
    def layout(self) -> str:
        return self.packing

    def for_module(self, name: str) -> QuantConfig | None:
        names = module_names(name)
        own = self._values_of(names)
        if own is None and self.blocks is not None and not any(names.is_in(block) for block in self.blocks):
            return None
        return None if own is not None and own.bits == DENSE_BITS else self._config(own)

    def for_quantized(self, name: str) -> QuantConfig:
        return self.for_module(name) or self._config(None)

    def _values_of(self, names: ModuleNames) -> ModuleValues | None:
        exact = next((own for own in self.extra if names.is_called(own.name)), None)
        try:
            return exact or next((own for own in self.extra if _fits(own, names)), None)
        except ConfigError as error:
            raise ConfigError(f"{self.source}: extra_config: {error}") from None

    def _config(self, own: ModuleValues | None) -> QuantConfig:
        bits = self.bits if own is None or own.bits is None else own.bits
        group_size = self.group_size if own is None or own.group_size is None else own.group_size
        sym = self.sym if own is None or own.sym is None else own.sym
        if _packed_as(self.packing) == "awq":
            return AwqConfig(bits=bits, source=self.source, group_size=group_size, zero_point=not sym)
        checkpoint_format = _packed_as(self.packing)
        return GptqConfig(
            bits=bits,
            source=self.source,
            group_size=group_size,
            sym=sym,
            checkpoint_format=checkpoint_format,
            borrowed=checkpoint_format == "gptq",
        )


def _packed_as(packing: str) -> str:
    """What "auto_round:auto_gptq" and the like stand for; suffixes are kernels, and all others take v2's zeros."""
    suffix = packing.partition(":")[2]
    if "awq" in suffix:
        return "awq"
    return "gptq" if suffix.split(":")[0] in ("gptq", "auto_gptq") else "gptq_v2"


def _fits(own: ModuleValues, names: ModuleNames) -> bool:
    return names.is_in(own.name) if own.pattern is None else names.found(own.pattern)


def read_fields(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    packing = read_text(values, "packing_format", source) or read_text(values, "backend", source)
    if packing is not None and (packing.split(":")[0] != "auto_round" or re.search("fp|llm_compressor|gguf", packing)):
        raise UnsupportedModelError(
            f"{source}: packing_format: found {shown(packing)}, exl reads auto_round with integers; {TAKE_INSTEAD}"
        )
    _refuse_types(values, source)
    bits = AWQ_BITS if packing is not None and _packed_as(packing) == "awq" else SUPPORTED_BITS
    extra = read_object(values, "extra_config", source)
    fields = read_sizes(values, source, bits) | {
        "sym": read_flag(values, "sym", source, None),
        "packing": packing,
        "blocks": _read_blocks(values, source),
        "extra": None if extra is None else _read_extra(extra, f"{source}: extra_config", bits),
    }
    return {key: value for key, value in fields.items() if value is not None}


def make(source: str, fields: Mapping[str, Any]) -> AutoRoundConfig:
    require_sizes(fields, source, "an AutoRound")
    return AutoRoundConfig(source=source, **fields)


def _refuse_types(values: Mapping[str, Any], where: str) -> None:
    data_type = read_text(values, "data_type", where)
    if data_type is not None and not data_type.startswith("int"):
        raise UnsupportedModelError(f"{where}: data_type: found {shown(data_type)}, exl reads int; {TAKE_INSTEAD}")
    for key in ("rotation_config", "super_bits"):
        if values.get(key):
            raise UnsupportedModelError(f"{where}: {key}: found {shown(values[key])}, which exl does not have")


def _read_blocks(values: Mapping[str, Any], source: str) -> tuple[str, ...] | None:
    """Names with commas between them, or a list of names, or of lists of the names of all blocks."""
    found = values.get("block_name_to_quantize")
    if found is None:
        return None
    names = found.split(",") if isinstance(found, str) else found
    flat = [n for item in names for n in (item if isinstance(item, list) else [item])] if type(names) is list else [0]
    if not all(isinstance(name, str) for name in flat):
        raise ConfigError(f"{source}: block_name_to_quantize: found {shown(found)}, expected names of blocks")
    return tuple(name.strip() for name in flat if name.strip()) or None


def _read_extra(extra: Mapping[str, Any], where: str, supported: tuple[int, ...]) -> tuple[ModuleValues, ...]:
    found = []
    for key, values in extra.items():
        here = f"{where}: {shown(key)}"
        if not isinstance(values, Mapping):
            raise ConfigError(f"{here}: found {shown(values)}, expected an object")
        if values:  # an empty one changes nothing, and AutoRound passes over it
            found.append(_read_module(key, values, here, supported))
    return tuple(found)


def _read_module(key: str, values: Mapping[str, Any], where: str, supported: tuple[int, ...]) -> ModuleValues:
    pattern = None if _PLAIN.fullmatch(key) else parse_pattern(key, where)
    bits, group_size = values.get("bits"), values.get("group_size")
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    if whole and bits >= DENSE_BITS:
        return ModuleValues(key, pattern, DENSE_BITS)
    _refuse_types(values, where)
    return ModuleValues(
        key,
        pattern,
        bits=None if bits is None else read_bits(bits, f"{where}: bits", supported),
        group_size=None if group_size is None else read_group_size(group_size, f"{where}: group_size"),
        sym=read_flag(values, "sym", where, None),
    )
