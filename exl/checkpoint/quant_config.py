"""A checkpoint's quantization parameters, checked once and frozen.

Files and keys are those that AutoGPTQ and GPTQModel write and read (``quantization/config.py`` of both). GPTQModel's
``dynamic`` overrides parameters per module: its exclusions (``"-:"``) are tried first, the others in the file's order,
and the first pattern that ``re.match`` finds at the start of the module's name decides.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exl.checkpoint.config_reader import read_json
from exl.checkpoint.header import shown
from exl.checkpoint.module_pattern import ModuleMatcher, ModulePattern
from exl.errors import ConfigError, UnsupportedModelError

SUPPORTED_BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")
_FILES = ("quantize_config.json", "quant_config.json")  # AutoGPTQ's order; then config.json's quantization_config
_IN_CONFIG = "config.json: quantization_config"
_BITS_KEYS, _GROUP_KEYS = ("bits", "w_bit", "wbits"), ("group_size", "q_group_size")
DECIDING = ("bits", "group_size", "rules", "checkpoint_format", "sym")  # fields in which files must not disagree
_MAX_STEPS = 100_000  # limit for all patterns on one module; one pattern takes about 50
_MAX_GROUP_SIZE = 1 << 24

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


@dataclass(frozen=True)
class ModuleRule:
    """One entry of ``dynamic``. ``excluded``: the module is not quantized. None: the file's value for all modules."""

    pattern: ModulePattern
    excluded: bool
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    sym: bool | None = None


@dataclass(frozen=True)
class QuantConfig:
    """GPTQ parameters of a checkpoint, or of one module of it (:meth:`for_module`)."""

    bits: int  # 2, 3, 4 or 8
    group_size: int  # inputs that share a scale; -1: all
    desc_act: bool = False  # what the file claims; g_idx tells what was done
    sym: bool = True  # AutoGPTQ's and GPTQModel's default
    checkpoint_format: str = "gptq"  # "gptq" stores zero - 1, "gptq_v2" stores zero
    lm_head: bool = False  # whether the head is quantized
    source: str = "quantize_config.json"  # file, for error messages
    rules: tuple[ModuleRule, ...] = field(default=(), repr=False)  # in the order in which they are tried
    method: str = "gptq"
    others: tuple[QuantConfig, ...] = field(default=(), repr=False)  # other files of the folder, if they disagree

    def for_module(self, name: str) -> QuantConfig | None:
        """Parameters of one module, such as ``"model.layers.0.mlp.up_proj"``; None: the file says that it is dense.

        Raises ``ConfigError`` if the file's patterns need too many steps.
        """
        matcher = ModuleMatcher(name, _MAX_STEPS)
        try:
            rule = next((rule for rule in self.rules if matcher.matches(rule.pattern)), None)
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


def read_quant_config(folder: str | os.PathLike[str], config_json: Mapping[str, Any]) -> QuantConfig | None:
    """None: the checkpoint is not quantized. ``config_json``: the content of the folder's ``config.json``.

    Where several files describe the quantization, a value that one of them leaves out is taken from the others. If they
    disagree, ``others`` has what the other files say: ``exl.formats.settle_quant`` finds out which is true.
    Raises ``ConfigError``, which names file and key, for invalid values; ``UnsupportedModelError``, which names the
    method or format, for a quantization that exl does not have.
    """

    def read(name: str) -> Mapping[str, Any] | None:
        path = Path(folder) / name
        return read_json(path) if os.path.lexists(path) else None  # a broken link is an error

    return find_quant_config(read, config_json)


def find_quant_config(
    read: Callable[[str], Mapping[str, Any] | None], config_json: Mapping[str, Any]
) -> QuantConfig | None:
    """Like :func:`read_quant_config`; ``read`` returns a file's JSON object by name, None if there is no such file."""
    found = [(name, values) for name in _FILES if (values := read(name)) is not None]
    in_config = config_json.get("quantization_config")
    if in_config is not None:
        if not isinstance(in_config, Mapping):
            raise ConfigError(f"{_IN_CONFIG}: found {shown(in_config)}, expected an object")
        found.append((_IN_CONFIG, in_config))
    if not found:
        return None
    stated = _read_files(found)
    defaults = {key: value for _, values in reversed(stated) for key, value in values.items()}
    first, *others = (_make(source, defaults | values) for source, values in stated)
    return replace(first, others=tuple(other for other in others if not _agree(first, other)))


def _read_files(found: list[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """What each file says. One that exl does not read is an error, also beside others that it does."""
    stated: list[tuple[str, dict[str, Any]]] = []
    problems: list[ConfigError | UnsupportedModelError] = []
    for source, values in found:
        try:
            stated.append((source, _read_fields(values, source)))
        except (ConfigError, UnsupportedModelError) as error:
            problems.append(error)
    if problems and stated:
        raise type(problems[0])(
            f"{problems[0]}; {stated[0][0]} beside it describes a GPTQ checkpoint: correct the file that is wrong, "
            "or delete it"
        )
    if problems:
        raise problems[0]
    return stated


def parse_quant_config(values: Mapping[str, Any], source: str) -> QuantConfig:
    """One file's. Raises the errors of :func:`read_quant_config`."""
    return _make(source, _read_fields(values, source))


def _read_fields(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What a file says of ``QuantConfig``'s fields; one that it leaves out, or that is null, is missing."""
    _refuse_other_methods(values, source)
    bits, group_size = (_first(values, source, *keys) for keys in (_BITS_KEYS, _GROUP_KEYS))
    checkpoint_format = _read_format(values, source, None)
    fields = {
        "bits": None if bits is None else _read_bits(bits, f"{source}: bits"),
        "group_size": None if group_size is None else _read_group_size(group_size, f"{source}: group_size"),
        "checkpoint_format": checkpoint_format,
        "rules": _read_rules(values.get("dynamic"), source, checkpoint_format or "gptq"),
    }
    fields |= {key: _read_flag(values, key, source, None) for key in ("desc_act", "sym", "lm_head")}
    return {key: value for key, value in fields.items() if value is not None}


def _make(source: str, fields: Mapping[str, Any]) -> QuantConfig:
    for key in ("bits", "group_size"):
        if key not in fields:
            raise ConfigError(f"{source}: found no {key}, which a GPTQ checkpoint needs")
    return QuantConfig(source=source, **fields)


def _agree(one: QuantConfig, other: QuantConfig) -> bool:
    """In all that decides how weights are read. ``desc_act`` and ``lm_head`` do not: tensors always decide there."""
    return all(getattr(one, key) == getattr(other, key) for key in DECIDING)


def _first(values: Mapping[str, Any], source: str, *keys: str) -> Any:
    """The value under any of its names; None if none has any. ``ConfigError`` if two names have different values."""
    found = {key: values[key] for key in keys if values.get(key) is not None}
    if not found:
        return None
    first, *others = found.values()
    if any(other != first for other in others):
        raise ConfigError(f"{source}: found {shown(found)}, expected names of one thing to agree")
    return first


def _read_bits(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where}: found {shown(value)}, expected one of {SUPPORTED_BITS}")
    if value not in SUPPORTED_BITS:
        raise UnsupportedModelError(f"{where}: found {shown(value)}, exl has {SUPPORTED_BITS}")
    return value


def _read_group_size(value: Any, where: str) -> int:
    good = isinstance(value, int) and not isinstance(value, bool) and (value == -1 or 0 < value <= _MAX_GROUP_SIZE)
    if not good:
        raise ConfigError(f"{where}: found {shown(value)}, expected a number of inputs above 0, or -1 for all")
    return value


def _read_flag(values: Mapping[str, Any], key: str, source: str, default: Any) -> Any:
    """The boolean under ``key``; ``default`` if there is none."""
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{source}: {key}: found {shown(value)}, expected true or false")
    return value


def _read_text(values: Mapping[str, Any], key: str, source: str) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{source}: {key}: found {shown(value)}, expected a string")
    return None if value is None else value.lower()


def _read_format(values: Mapping[str, Any], source: str, default: str | None) -> str | None:
    """Older files use ``checkpoint_format``, newer ones ``format``. If a file has both, they must agree."""
    formats = {key: _read_text(values, key, source) for key in ("checkpoint_format", "format")}
    found = {key: value for key, value in formats.items() if value is not None}
    if len(set(found.values())) > 1:
        raise ConfigError(f"{source}: found {shown(found)}, expected names of one thing to agree")
    for key, value in found.items():
        if value not in _FORMATS:
            raise UnsupportedModelError(f"{source}: {key}: found {shown(value)}, exl reads {' and '.join(_FORMATS)}")
        return value
    return default


def _refuse_other_methods(values: Mapping[str, Any], source: str) -> None:
    for key in ("quant_method", "method"):
        method = _read_text(values, key, source)
        if method not in (None, "gptq"):
            raise UnsupportedModelError(f"{source}: {key}: found {shown(method)}, exl reads gptq")
    if _read_text(values, "version", source) is not None and "zero_point" in values:  # AutoAWQ's files name no method
        raise UnsupportedModelError(f"{source}: found an AWQ configuration (version, zero_point), exl reads gptq")
    if any(values.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        raise UnsupportedModelError(f"{source}: found a bitsandbytes configuration (load_in_...), exl reads gptq")
    if _read_flag(values, "is_marlin_format", source, False):
        raise UnsupportedModelError(f"{source}: is_marlin_format: found true, exl reads gptq, not marlin")
    _read_pack_dtype(values, source)
    for key, what in (("rotation", "rotated weights"), ("adapter", "an adapter to add to the output")):
        if values.get(key) is not None:
            raise UnsupportedModelError(f"{source}: {key}: found {shown(values[key])}: {what}, which exl does not have")


def _read_pack_dtype(values: Mapping[str, Any], source: str) -> None:
    pack_dtype = _read_text(values, "pack_dtype", source)
    if pack_dtype not in (None, "int32", "torch.int32"):
        raise UnsupportedModelError(f"{source}: pack_dtype: found {shown(pack_dtype)}, exl reads int32")


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
    try:
        pattern = ModulePattern.parse(key[2:] if key.startswith(("-:", "+:")) else key)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if excluded:
        return ModuleRule(pattern, True)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: found {shown(values)}, expected an object")
    unknown = sorted(values.keys() - _OVERRIDES - _METHOD_KEYS - _QUANTIZER_KEYS)
    if unknown:
        raise UnsupportedModelError(f"{where}: {shown(unknown[0])}: an override that exl does not know")
    _refuse_other_methods(values, where)
    found_format = _read_format(values, where, checkpoint_format)
    if found_format != checkpoint_format:
        raise UnsupportedModelError(
            f"{where}: found {found_format} in a file of {checkpoint_format}, exl reads one format"
        )
    bits, group_size = values.get("bits"), values.get("group_size")
    return ModuleRule(
        pattern,
        False,
        bits=None if bits is None else _read_bits(bits, f"{where}: bits"),
        group_size=None if group_size is None else _read_group_size(group_size, f"{where}: group_size"),
        desc_act=_read_flag(values, "desc_act", where, None),
        sym=_read_flag(values, "sym", where, None),
    )
