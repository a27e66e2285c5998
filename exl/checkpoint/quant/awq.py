"""AWQ's configuration, as AutoAWQ, llm-awq, GPTQModel and AutoRound write it (AutoAWQ ``models/_config.py``).

AutoAWQ's ``modules_to_not_convert`` names modules by parts of their names. Older files say ``version``, GPTQModel's
``format`` or ``checkpoint_format``; llm-awq's files say ``backend``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from exl.checkpoint.header import shown
from exl.checkpoint.quant.base import QuantConfig
from exl.checkpoint.quant.foreign import TAKE_INSTEAD
from exl.checkpoint.quant.values import (
    first_of,
    module_names,
    read_flag,
    read_names,
    read_object,
    read_sizes,
    read_text,
    require_sizes,
)
from exl.errors import UnsupportedModelError

VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")
AWQ_BITS = (4,)  # its other widths have orders that no released model uses
_VERSION_KEYS = ("version", "checkpoint_format", "format")


@dataclass(frozen=True, kw_only=True)
class AwqConfig(QuantConfig):
    """AWQ parameters of a checkpoint, or of one module of it."""

    group_size: int  # inputs that share a scale; -1: all
    version: str = "gemm"  # one of VERSIONS
    zero_point: bool = True  # False: every zero is 2**(bits - 1)
    dense: tuple[str, ...] = field(default=(), repr=False)  # parts of names of modules that are not quantized

    method: ClassVar[str] = "awq"
    deciding: ClassVar[tuple[str, ...]] = ("bits", "group_size", "version", "zero_point")

    @property
    def layout(self) -> str:
        return self.version

    def for_module(self, name: str) -> AwqConfig | None:
        names = module_names(name)
        return None if any(names.has(part) for part in self.dense) else self.for_quantized(name)

    def for_quantized(self, name: str) -> AwqConfig:
        return replace(self, dense=(), others=())


def read_fields(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    for key in _VERSION_KEYS:
        version = read_text(values, key, source)
        if version is not None and version.replace("llm_awq", "llm-awq") not in VERSIONS:
            raise UnsupportedModelError(
                f"{source}: {key}: found {shown(version)}, exl reads AWQ's {', '.join(VERSIONS)}; {TAKE_INSTEAD}"
            )
    version = first_of({key: read_text(values, key, source) for key in _VERSION_KEYS}, source, *_VERSION_KEYS)
    if read_text(values, "backend", source) == "llm-awq":
        version = "llm-awq"
    _refuse_overrides(values, source)
    fields = read_sizes(values, source, AWQ_BITS) | {
        "version": None if version is None else version.replace("llm_awq", "llm-awq"),
        "zero_point": _read_zero_point(values, source),
        "dense": read_names(values, "modules_to_not_convert", source),
    }
    return {key: value for key, value in fields.items() if value is not None}


def make(source: str, fields: Mapping[str, Any]) -> AwqConfig:
    require_sizes(fields, source, "an AWQ")
    return AwqConfig(source=source, **fields)


def _read_zero_point(values: Mapping[str, Any], source: str) -> bool | None:
    """GPTQModel says ``sym`` instead."""
    zero_point, sym = (read_flag(values, key, source, None) for key in ("zero_point", "sym"))
    return zero_point if zero_point is not None or sym is None else not sym


def _refuse_overrides(values: Mapping[str, Any], source: str) -> None:
    """GPTQModel's ``dynamic``, of which AWQ files have exclusions: there the tensors decide."""
    for pattern, own in (read_object(values, "dynamic", source) or {}).items():
        changed = sorted(own.keys() & {"bits", "group_size", "sym"}) if isinstance(own, Mapping) else []
        if changed and not pattern.startswith("-:"):
            raise UnsupportedModelError(
                f"{source}: dynamic: {shown(pattern)}: found {changed[0]}, which exl reads in files of gptq alone"
            )
