"""Which checkpoint tensors make which weight: a table a family. Families differ by this and by ``ModelConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class NameTable:
    """Hugging Face names. Layer names are relative to ``<layers>.<i>.``; matrices lack ``.weight`` and ``.bias``."""

    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head"
    layers: str = "model.layers"
    norms: Mapping[str, str] = MappingProxyType(
        {
            "attn_norm": "input_layernorm.weight",
            "q_norm": "self_attn.q_norm.weight",
            "k_norm": "self_attn.k_norm.weight",
            "mlp_norm": "post_attention_layernorm.weight",
        }
    )
    linears: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o": ("self_attn.o_proj",),
            "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
            "down": ("mlp.down_proj",),
        }
    )
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # endings of tensors that carry nothing: computed anew


_LLAMA = NameTable()
NAME_TABLES: Mapping[str, NameTable] = MappingProxyType(
    {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}
)
