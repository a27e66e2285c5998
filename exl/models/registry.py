"""Which checkpoint tensors make which weight: one table per family. Families differ in it and in ``ModelConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class NameTable:
    """Hugging Face names. Names in layers omit ``<layers>.<i>.``; names of matrices omit ``.weight`` and ``.bias``."""

    embed: str
    final_norm: str
    head: str
    layers: str
    norms: Mapping[str, str]
    linears: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...]  # suffixes of tensors that are not loaded, because exl computes them


_LLAMA = NameTable(
    embed="model.embed_tokens",
    final_norm="model.norm.weight",
    head="lm_head",
    layers="model.layers",
    norms=MappingProxyType(
        {
            "attn_norm": "input_layernorm.weight",
            "q_norm": "self_attn.q_norm.weight",
            "k_norm": "self_attn.k_norm.weight",
            "mlp_norm": "post_attention_layernorm.weight",
        }
    ),
    linears=MappingProxyType(
        {
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o": ("self_attn.o_proj",),
            "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
            "down": ("mlp.down_proj",),
        }
    ),
    ignored=("rotary_emb.inv_freq",),
)
NAME_TABLES: Mapping[str, NameTable] = MappingProxyType(
    {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}
)
