"""The configuration of dense FP8 weights (``quant_method`` "fp8"), as DeepSeek, Qwen and vLLM write it.

``weight_block_size`` [rows, columns] says how many weights share a scale; without it there is one for each matrix or
each output, and the shape of the scales shows which. ``activation_scheme`` is about inputs, which exl does not round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from exl.checkpoint.header import shown
from exl.checkpoint.quant.base import QuantConfig
from exl.checkpoint.quant.values import MAX_GROUP_SIZE, module_names, read_names, read_text
from exl.errors import ConfigError, UnsupportedModelError

ACTIVATIONS = "asks for quantized activations or a quantized KV cache; exl computes with more exact ones"


@dataclass(frozen=True, kw_only=True)
class Fp8Config(QuantConfig):
    """FP8 parameters of a checkpoint, or of one module of it."""

    bits: int = 8
    block: tuple[int, int] | None = (
        None  # outputs and inputs that share a scale; None: all inputs, of all or one output
    )
    dense: tuple[str, ...] = field(default=(), repr=False)  # names of modules, or of what they are in, that are dense

    activations: bool = False  # the file wants inputs rounded, too

    method: ClassVar[str] = "fp8"
    deciding: ClassVar[tuple[str, ...]] = ("block",)

    @property
    def layout(self) -> str:
        return "e4m3" if self.block is None else f"e4m3 in blocks of {self.block[0]} x {self.block[1]}"

    @property
    def note(self) -> str | None:
        return f"{self.source}: {ACTIVATIONS}" if self.activations else None

    def for_module(self, name: str) -> Fp8Config | None:
        names = module_names(name)
        return None if any(names.is_in(part) for part in self.dense) else self.for_quantized(name)

    def for_quantized(self, name: str) -> Fp8Config:
        return replace(self, dense=(), activations=False, others=())


def read_fields(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    fmt = read_text(values, "fmt", source)
    if fmt not in (None, "e4m3", "float8_e4m3fn"):
        raise UnsupportedModelError(f"{source}: fmt: found {shown(fmt)}, exl reads e4m3")
    scheme = read_text(values, "activation_scheme", source)
    dense = [read_names(values, key, source) for key in ("modules_to_not_convert", "ignored_layers")]
    fields = {
        "activations": scheme is not None,
        "block": read_block(values, "weight_block_size", source),
        "dense": tuple(name for names in dense if names is not None for name in names),
    }
    return {key: value for key, value in fields.items() if value}


def make(source: str, fields: Mapping[str, Any]) -> Fp8Config:
    return Fp8Config(source=source, **fields)


def read_block(values: Mapping[str, Any], key: str, source: str) -> tuple[int, int] | None:
    """Two sizes; None if there is no such key."""
    found = values.get(key)
    if found is None:
        return None
    whole = isinstance(found, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in found)
    if not whole or len(found) != 2 or not all(0 < n <= MAX_GROUP_SIZE for n in found):
        raise ConfigError(f"{source}: {key}: found {shown(found)}, expected two numbers above 0")
    return found[0], found[1]
