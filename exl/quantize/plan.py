"""Shapes in the source and in the output: which modules are quantized, and which are zero-padded so that groups fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, lcm, log2

from exl.errors import ConfigError
from exl.families.config import ModelConfig
from exl.layout.specs import MatrixSpec
from exl.models.manifest import ModelManifest
from exl.quantize.options import QuantizeOptions

_K_MULTIPLE = 32  # this many codes fill whole words of qweight at every number of bits
Entry = tuple[str, str, tuple[int, ...]]  # a tensor's name, dtype and shape


@dataclass(frozen=True)
class ModulePlan:
    """One linear module: its inputs K and outputs N in the source, out_K and out_N in the file that is written."""

    name: str
    K: int
    N: int
    out_K: int
    out_N: int
    has_bias: bool
    group_size: int  # out_K if there is one group
    bits: int

    def entries(self) -> list[Entry]:
        """The tensors that are written for this module, in order."""
        G = self.out_K // self.group_size
        entries = [
            (f"{self.name}.qweight", "i32", (self.out_K // 32 * self.bits, self.out_N)),
            (f"{self.name}.qzeros", "i32", (G, self.out_N * self.bits // 32)),
            (f"{self.name}.scales", "f16", (G, self.out_N)),
            (f"{self.name}.g_idx", "i32", (self.out_K,)),
        ]
        return [*entries, (f"{self.name}.bias", "f16", (self.out_N,))] if self.has_bias else entries


@dataclass(frozen=True)
class QuantizePlan:
    """``layers[i][name]``: the modules that share an input, side by side along N. Names are "qkv", "o", "gate_up" and
    "down", in the order of the forward pass."""

    intermediate_size: int  # in the output, padding included
    layers: tuple[Mapping[str, tuple[ModulePlan, ...]], ...]
    tied: bool  # the embedding is also the head
    unused: str | None  # module of the source that is left out: a head that is a copy of the embedding

    def layer_entries(self, layer_idx: int) -> list[Entry]:
        modules = [module for parts in self.layers[layer_idx].values() for module in parts]
        return [entry for module in modules for entry in module.entries()]


def make_plan(manifest: ModelManifest, config: ModelConfig, options: QuantizeOptions) -> QuantizePlan:
    """Raises ``ConfigError`` that names the size that bits or groups do not fit, and group sizes that do fit."""
    widths = {"hidden_size": config.hidden_size, "attention's width": config.attn_width}
    for name, size in widths.items():
        if size % _K_MULTIPLE:
            raise ConfigError(f"{name}: found {size}, expected a multiple of {_K_MULTIPLE}: GPTQ packs inputs by 32")
        if options.group_size != -1 and size % options.group_size:
            nearest = _workable_groups(gcd(*widths.values()), options.group_size)
            raise ConfigError(
                f"group_size: found {options.group_size}, which does not divide {name}, {size}; {nearest}"
            )
    per_word = 32 // gcd(options.bits, 32)
    for name, size in {**widths, "the width of keys and values": config.kv_width}.items():
        if size % per_word:
            raise ConfigError(
                f"{name}: found {size}, expected a multiple of {per_word}: {options.bits}-bit zeros fill whole words"
            )
    multiple = lcm(_K_MULTIPLE, 1 if options.group_size == -1 else options.group_size)
    intermediate = -(-config.intermediate_size // multiple) * multiple

    def module(spec: MatrixSpec, group: str) -> ModulePlan:
        out_K = intermediate if group == "down" else spec.K
        out_N = intermediate if group == "gate_up" else spec.N
        group_size = out_K if options.group_size == -1 else options.group_size
        return ModulePlan(spec.name, spec.K, spec.N, out_K, out_N, spec.has_bias, group_size, options.bits)

    layers = tuple(
        {
            group: tuple(module(part, group) for linear in linears for part in linear.parts)
            for group, linears in layer.linears
        }
        for layer in manifest.layers
    )
    embed_name = dict(manifest.embed.linears)["embed"][0].parts[0].name
    unused = manifest.names.head if manifest.tied and embed_name != manifest.names.head else None
    return QuantizePlan(intermediate, layers, manifest.tied, unused)


def _workable_groups(width: int, asked: int) -> str:
    sizes = [size for size in range(8, width + 1, 8) if width % size == 0]
    nearest = sorted(sizes, key=lambda size: abs(log2(size / asked)))[:3]
    return f"expected {', '.join(map(str, nearest))} or another divisor, or -1 for one group"
