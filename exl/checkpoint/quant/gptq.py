"""GPTQ's configuration, as AutoGPTQ and GPTQModel write and read it (``quantization/config.py`` of both).

GPTQModel's ``dynamic`` overrides parameters per module: its exclusions (``"-:"``) are tried first, the others in the
file's order, and the first pattern that ``re.match`` finds at the start of the module's name decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from exl.checkpoint.header import shown
from exl.checkpoint.module_pattern import ModulePattern
from exl.checkpoint.quant.base import QuantConfig
from exl.checkpoint.quant.foreign import TAKE_INSTEAD
from exl.checkpoint.quant.values import (
    module_names,
    parse_pattern,
    read_bits,
    read_flag,
    read_group_size,
    read_sizes,
    read_text,
    require_sizes,
)
from exl.errors import ConfigError, UnsupportedModelError

FORMATS = ("gptq", "gptq_v2", "gptq_p")
_OVERRIDES = frozenset({"bits", "group_size", "desc_act", "sym"})
_METHOD_KEYS = frozenset(
    {"quant_method", "method", "checkpoint_format", "format", "pack_dtype", "rotation", "adapter", "is_marlin_format"}
)
# Keys of an override that control how the quantizer works, but not what it writes. Ignored.
_QUANTIZER_KEYS = frozenset(
    {
        *("act_group_aware", "damp_auto_increment", "damp_percent", "failsafe", "fallback", "gptaq", "hessian"),
        *("hyb_act", "mock_quantization", "mse", "smooth", "static_groups", "true_sequential"),
    }
)

# Programs that turn zeros into v1's by subtracting 1 from every field of a packed word at once, with borrows.
_WHOLE_WORD_WRITERS = ("gptqmodel", "auto-round", "auto_round", "autoround")


@dataclass(frozen=True)
class ModuleRule:
    """One entry of ``dynamic``. ``excluded``: the module is not quantized. None: the file's value for all modules."""

    pattern: ModulePattern
    excluded: bool
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    sym: bool | None = None


@dataclass(frozen=True, kw_only=True)
class GptqConfig(QuantConfig):
    """GPTQ parameters of a checkpoint, or of one module of it."""

    group_size: int  # inputs that share a scale; -1: all
    desc_act: bool = False  # what the file claims; g_idx tells what was done
    sym: bool = True  # AutoGPTQ's and GPTQModel's default
    checkpoint_format: str = "gptq"  # "gptq" stores zero - 1, "gptq_v2" zero; "gptq_p": zero, in planes
    borrowed: bool = False  # "gptq": 1 was subtracted from every field of a word at once, with borrows between them
    lm_head: bool = False  # whether the head is quantized
    rules: tuple[ModuleRule, ...] = field(default=(), repr=False)  # in the order in which they are tried

    method: ClassVar[str] = "gptq"
    deciding: ClassVar[tuple[str, ...]] = ("bits", "group_size", "rules", "checkpoint_format", "sym")

    @property
    def layout(self) -> str:
        return self.checkpoint_format

    def for_module(self, name: str) -> GptqConfig | None:
        names = module_names(name)
        try:
            rule = next((rule for rule in self.rules if names.matches(rule.pattern)), None)
        except ConfigError as error:
            raise ConfigError(f"{self.source}: dynamic: {error}") from None
        if rule is None:
            is_head = name == "lm_head" or name.endswith(".lm_head")
            return replace(self, rules=(), others=()) if self.lm_head or not is_head else None
        if rule.excluded:
            return None
        return replace(
            self,
            bits=self.bits if rule.bits is None else rule.bits,
            group_size=self.group_size if rule.group_size is None else rule.group_size,
            desc_act=self.desc_act if rule.desc_act is None else rule.desc_act,
            sym=self.sym if rule.sym is None else rule.sym,
            rules=(),
            others=(),
        )

    def for_quantized(self, name: str) -> GptqConfig:
        return self.for_module(name) or replace(self, rules=(), others=())


def read_fields(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    _refuse_variants(values, source)
    checkpoint_format = _read_format(values, source, None)
    fields = read_sizes(values, source) | {
        "checkpoint_format": checkpoint_format,
        "borrowed": _read_borrowed(values),
        "rules": _read_rules(values.get("dynamic"), source, checkpoint_format or "gptq"),
    }
    fields |= {key: read_flag(values, key, source, None) for key in ("desc_act", "sym", "lm_head")}
    return {key: value for key, value in fields.items() if value is not None}


def make(source: str, fields: Mapping[str, Any]) -> GptqConfig:
    require_sizes(fields, source, "a GPTQ")
    return GptqConfig(source=source, **fields)


def _read_format(values: Mapping[str, Any], source: str, default: str | None) -> str | None:
    """Older files use ``checkpoint_format``, newer ones ``format``. If a file has both, they must agree."""
    formats = {key: read_text(values, key, source) for key in ("checkpoint_format", "format")}
    found = {key: value for key, value in formats.items() if value is not None}
    if len(set(found.values())) > 1:
        raise ConfigError(f"{source}: found {shown(found)}, expected names of one thing to agree")
    for key, value in found.items():
        if value not in FORMATS:
            raise UnsupportedModelError(
                f"{source}: {key}: found {shown(value)}, exl reads {' and '.join(FORMATS)}; {TAKE_INSTEAD}"
            )
        return value
    return default


def _read_borrowed(values: Mapping[str, Any]) -> bool | None:
    """By the program that wrote the file; None if it does not say. ``meta.quantizer`` is ``"gptqmodel:5.0.0"``, or a
    list of such; AutoRound names itself in ``provider``."""
    meta = values.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    writers = quantizer if isinstance(quantizer, list) else [quantizer]
    stated = [writer.lower() for writer in (*writers, values.get("provider")) if isinstance(writer, str)]
    return any(writer.startswith(_WHOLE_WORD_WRITERS) for writer in stated) if stated else None


def _refuse_variants(values: Mapping[str, Any], source: str) -> None:
    """What is GPTQ by its name, but whose tensors mean something else."""
    if read_flag(values, "is_marlin_format", source, False):
        raise UnsupportedModelError(f"{source}: is_marlin_format: found true, which exl does not read; {TAKE_INSTEAD}")
    pack_dtype = read_text(values, "pack_dtype", source)
    if pack_dtype not in (None, "int32", "torch.int32"):
        raise UnsupportedModelError(f"{source}: pack_dtype: found {shown(pack_dtype)}, exl reads int32")
    for key, what in (("rotation", "rotated weights"), ("adapter", "an adapter to add to the output")):
        if values.get(key) is not None:
            raise UnsupportedModelError(f"{source}: {key}: found {shown(values[key])}: {what}, which exl does not have")


def _read_rules(dynamic: Any, source: str, checkpoint_format: str) -> tuple[ModuleRule, ...] | None:
    if dynamic is None:
        return None
    if not isinstance(dynamic, Mapping):
        raise ConfigError(f"{source}: dynamic: found {shown(dynamic)}, expected an object")
    rules = [
        _read_rule(key, values, f"{source}: dynamic: {shown(key)}", checkpoint_format)
        for key, values in dynamic.items()
    ]
    return tuple(sorted(rules, key=lambda rule: not rule.excluded))  # stable: exclusions first, the rest in order


def _read_rule(key: str, values: Any, where: str, checkpoint_format: str) -> ModuleRule:
    excluded = key.startswith("-:")
    pattern = parse_pattern(key[2:] if key.startswith(("-:", "+:")) else key, where)
    if excluded:
        return ModuleRule(pattern, True)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: found {shown(values)}, expected an object")
    unknown = sorted(values.keys() - _OVERRIDES - _METHOD_KEYS - _QUANTIZER_KEYS)
    if unknown:
        raise UnsupportedModelError(f"{where}: {shown(unknown[0])}: an override that exl does not know")
    for name in ("quant_method", "method"):
        if (method := read_text(values, name, where)) not in (None, "gptq"):
            raise UnsupportedModelError(f"{where}: {name}: found {shown(method)} in a file of gptq")
    _refuse_variants(values, where)
    found_format = _read_format(values, where, checkpoint_format)
    if found_format != checkpoint_format:
        raise UnsupportedModelError(
            f"{where}: found {found_format} in a file of {checkpoint_format}, exl reads one format"
        )
    bits, group_size = values.get("bits"), values.get("group_size")
    return ModuleRule(
        pattern,
        False,
        bits=None if bits is None else read_bits(bits, f"{where}: bits"),
        group_size=None if group_size is None else read_group_size(group_size, f"{where}: group_size"),
        desc_act=read_flag(values, "desc_act", where, None),
        sym=read_flag(values, "sym", where, None),
    )
