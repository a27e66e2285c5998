"""What most families share: sizes by their usual names in ``config.json``, and the usual tensors of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exl.checkpoint.config_reader import ConfigReader
from exl.checkpoint.rope_config import RopeConfig
from exl.errors import UnsupportedModelError
from exl.families.specs import AttentionShape, MlpShape, PartSpec
from exl.layout.specs import NormSpec, Rows

FULL, SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


@dataclass(frozen=True)
class Source:
    """A config as families read it."""

    read: ConfigReader
    ropes: Mapping[str, RopeConfig]  # by type of layer; "": of all whose type is not there
    max_position: int

    def rope(self, layer_type: str = FULL) -> RopeConfig:
        """Of layers of a type. Of a type that no layer has: any."""
        return self.ropes.get(layer_type) or self.ropes.get("") or next(iter(self.ropes.values()))


@dataclass(frozen=True)
class Sizes:
    """Sizes that all layers of a model share."""

    hidden: int  # C
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # Hkv
    head_dim: int  # D
    intermediate: int  # F

    def attention(self, rope: RopeConfig, scale: float | None = None) -> AttentionShape:
        """Full attention. ``scale`` None: 1 / sqrt(D)."""
        scale = self.head_dim**-0.5 if scale is None else scale
        return AttentionShape(self.num_heads, self.num_kv_heads, self.head_dim, scale, rope)


def read_sizes(read: ConfigReader, head_dim: int | None = None) -> Sizes:
    """``head_dim``: where the file does not say; None: hidden size / heads."""
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads", high=4096)
    kv_heads = read.integer("num_key_value_heads", heads, high=4096)
    if heads % kv_heads:
        raise read.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    found = read.integer("head_dim", head_dim or max(1, hidden // heads), high=4096)
    if found % 2:
        derived = "" if read.has("head_dim") else f"; hidden_size / num_attention_heads is {found}"
        raise read.error("head_dim", f"an even number: rotary channels come in pairs{derived}")
    return Sizes(
        hidden=hidden,
        num_layers=read.integer("num_hidden_layers", high=4096),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=found,
        intermediate=read.integer("intermediate_size"),
    )


def read_mlp(read: ConfigReader, width: int, default: str = "silu", key: str = "hidden_act") -> MlpShape:
    """A gated MLP with the activation that ``key`` names."""
    name = read.text(key, default)
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{read.source}: {key}: found {name[:40]!r}, expected {' or '.join(map(repr, _ACTIVATIONS))}"
        )
    return MlpShape(width, _ACTIVATIONS[name])


def read_layer_types(read: ConfigReader, num_layers: int, default: Sequence[str]) -> tuple[str, ...]:
    """``layer_types``, each full or sliding attention; ``default`` where there are none."""
    found = read.values.get("layer_types")
    if found is None:
        return tuple(default)
    known = (FULL, SLIDING)
    if not isinstance(found, list) or len(found) != num_layers or set(map(str, found)) - {*known}:
        raise read.error("layer_types", f"{num_layers} times one of {known}")
    return tuple(found)


def read_window(read: ConfigReader, default: int = 4096) -> int | None:
    """``sliding_window``; None: null, no window. ``default``: where the file does not say."""
    if "sliding_window" in read.values and read.values["sliding_window"] is None:
        return None
    return read.integer("sliding_window", default, high=1 << 30)


def norm(name: str, tensor: str, width: int, offset: float = 0.0) -> NormSpec:
    return NormSpec(name, width, offset, tensor=tensor)


def qkv_parts(
    hidden: int, shape: AttentionShape, *, bias: bool = False, turning: int | None = None
) -> tuple[PartSpec, ...]:
    """q_proj, k_proj, v_proj. ``turning``: so many channels of a head turn, each with its neighbour."""

    def part(name: str, width: int, pairs: tuple[int, int] | None) -> PartSpec:
        rows = None if pairs is None else Rows(0, width, width, pairs)
        return PartSpec(f"self_attn.{name}", hidden, width, bias, rows)

    pairs = None if turning is None else (shape.head_dim, turning)
    q, k = (part(name, width, pairs) for name, width in (("q_proj", shape.width), ("k_proj", shape.kv_width)))
    return q, k, part("v_proj", shape.kv_width, None)


def fused_parts(module: str, hidden: int, widths: Sequence[int], *, bias: bool = False) -> tuple[PartSpec, ...]:
    """Matrices that the file has as one module, one after another along its outputs."""
    parts, first, total = [], 0, sum(widths)
    for width in widths:
        parts.append(PartSpec(module, hidden, width, bias, Rows(first, width, total)))
        first += width
    return tuple(parts)


def o_part(hidden: int, shape: AttentionShape, *, bias: bool = False) -> tuple[PartSpec, ...]:
    return (PartSpec("self_attn.o_proj", shape.width, hidden, bias),)


def gate_up_parts(hidden: int, width: int, *, bias: bool = False) -> tuple[PartSpec, ...]:
    return tuple(PartSpec(f"mlp.{name}", hidden, width, bias) for name in ("gate_proj", "up_proj"))


def down_part(hidden: int, width: int, *, bias: bool = False) -> tuple[PartSpec, ...]:
    return (PartSpec("mlp.down_proj", width, hidden, bias),)


def usual_linears(
    sizes: Sizes, shape: AttentionShape, *, qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False
) -> dict[str, tuple[PartSpec, ...]]:
    """Llama's names."""
    hidden, width = sizes.hidden, sizes.intermediate
    return {
        "qkv": qkv_parts(hidden, shape, bias=qkv_bias),
        "o": o_part(hidden, shape, bias=o_bias),
        "gate_up": gate_up_parts(hidden, width, bias=mlp_bias),
        "down": down_part(hidden, width, bias=mlp_bias),
    }


def usual_norms(hidden: int) -> tuple[NormSpec, ...]:
    """Llama's: before attention, and before the MLP."""
    return (
        norm("attn_norm", "input_layernorm.weight", hidden),
        norm("mlp_norm", "post_attention_layernorm.weight", hidden),
    )


def head_norms(shape: AttentionShape, offset: float = 0.0) -> tuple[NormSpec, ...]:
    """Of q and k, over each head's channels or over those of all heads, as ``shape.norms`` says."""
    q, k = (shape.head_dim,) * 2 if shape.norms == "head" else (shape.width, shape.kv_width)
    return (
        norm("q_norm", "self_attn.q_norm.weight", q, offset),
        norm("k_norm", "self_attn.k_norm.weight", k, offset),
    )


def with_defaults(read: ConfigReader, defaults: Mapping[str, Any]) -> ConfigReader:
    """Published files leave out what is the default of the family's class in transformers."""
    return ConfigReader({**defaults, **read.values}, read.source)
