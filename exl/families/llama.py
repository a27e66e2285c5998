"""Llama, and Mistral, which differs in a window that all layers have. Ministral 3 is Mistral with yarn and queries
that grow with the position, which is in its RoPE's parameters."""

from __future__ import annotations

from dataclasses import replace

from exl.checkpoint.config_reader import ConfigReader
from exl.families.common import (
    Source,
    read_mlp,
    read_sizes,
    read_window,
    usual_linears,
    usual_norms,
    with_defaults,
)
from exl.families.specs import FamilySpec, LayerSpec, NormShape


def llama(source: Source) -> FamilySpec:
    read = source.read
    sizes, bias = read_sizes(read), read.flag("attention_bias", False)
    shape = sizes.attention(source.rope())
    layer = LayerSpec(
        shape,
        read_mlp(read, sizes.intermediate),
        usual_norms(sizes.hidden),
        usual_linears(sizes, shape, qkv_bias=bias, o_bias=bias, mlp_bias=read.flag("mlp_bias", False)),
    )
    return FamilySpec((layer,) * sizes.num_layers, NormShape(read.number("rms_norm_eps", 1e-6, above=False)))


_MINISTRAL3 = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 262_144,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def prepare_ministral3(read: ConfigReader) -> ConfigReader:
    """What the class in transformers sets where a file says nothing."""
    rope = {} if read.has("rope_parameters") or read.has("rope_scaling") else {"rope_parameters": _MINISTRAL3_ROPE}
    return with_defaults(ConfigReader({**read.values, **rope}, read.source), _MINISTRAL3)


def prepare_mistral(read: ConfigReader) -> ConfigReader:
    return with_defaults(read, {"num_key_value_heads": 8, "max_position_embeddings": 131_072})


def mistral(source: Source) -> FamilySpec:
    read = source.read
    sizes = read_sizes(read)
    shape = replace(sizes.attention(source.rope()), window=read_window(read))
    layer = LayerSpec(shape, read_mlp(read, sizes.intermediate), usual_norms(sizes.hidden), usual_linears(sizes, shape))
    return FamilySpec((layer,) * sizes.num_layers, NormShape(read.number("rms_norm_eps", 1e-6, above=False)))
