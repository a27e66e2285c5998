"""Command R7B and A (Cohere 2): attention and MLP read one norm, which subtracts the mean; layers with windows turn,
those that see everything do not; neighbouring channels turn with each other."""

from __future__ import annotations

from dataclasses import replace

from exl.checkpoint.config_reader import ConfigReader
from exl.checkpoint.rope_config import NO_ROPE
from exl.families.common import (
    FULL,
    SLIDING,
    Source,
    norm,
    qkv_parts,
    read_layer_types,
    read_mlp,
    read_sizes,
    read_window,
    usual_linears,
    with_defaults,
)
from exl.families.specs import FamilySpec, LayerSpec, LogitsShape, NormShape

_DEFAULTS = {
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "bos_token_id": 5,
    "eos_token_id": 255_001,
}


def prepare_cohere2(read: ConfigReader) -> ConfigReader:
    return with_defaults(read, _DEFAULTS)


def cohere2(source: Source) -> FamilySpec:
    read = source.read
    sizes, bias = read_sizes(read), read.flag("attention_bias", False)
    turns = sizes.attention(source.rope(SLIDING))
    turning = int(turns.head_dim * turns.rope.partial_rotary_factor)
    layer = LayerSpec(
        replace(turns, rope=NO_ROPE),
        read_mlp(read, sizes.intermediate),
        (norm("attn_norm", "input_layernorm.weight", sizes.hidden),),
        # The order of channels changes nothing in layers where nothing turns: one order for all.
        usual_linears(sizes, turns, o_bias=bias) | {"qkv": qkv_parts(sizes.hidden, turns, bias=bias, turning=turning)},
        mlp_norm="attn_norm",
        parallel=True,
    )
    kinds = {FULL: layer, SLIDING: replace(layer, attention=replace(turns, window=read_window(read)))}
    every = read.integer("sliding_window_pattern", 4)
    default = [SLIDING if (i + 1) % every else FULL for i in range(sizes.num_layers)]
    return FamilySpec(
        tuple(kinds[kind] for kind in read_layer_types(read, sizes.num_layers, default)),
        NormShape(read.number("layer_norm_eps", above=False), kind="layer"),
        logits=LogitsShape(read.number("logit_scale")),
    )
