"""EXAONE 4: no norm before attention and MLP, one behind each; norms of q and k. The large one has layers with windows,
and those that see everything do not turn."""

from __future__ import annotations

from dataclasses import replace

from exl.checkpoint.config_reader import ConfigReader
from exl.checkpoint.rope_config import NO_ROPE
from exl.families.common import (
    FULL,
    SLIDING,
    Source,
    head_norms,
    norm,
    read_layer_types,
    read_mlp,
    read_sizes,
    read_window,
    usual_linears,
    with_defaults,
)
from exl.families.specs import BranchShape, FamilySpec, LayerSpec, NormShape


def prepare_exaone4(read: ConfigReader) -> ConfigReader:
    return with_defaults(read, {"rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2})


def exaone4(source: Source) -> FamilySpec:
    read, window = source.read, read_window(source.read)
    sizes = read_sizes(read)
    turns = replace(sizes.attention(source.rope()), norms="head")
    layer = LayerSpec(
        turns if window is None else replace(turns, rope=NO_ROPE),
        read_mlp(read, sizes.intermediate),
        (
            norm("attn_post_norm", "post_attention_layernorm.weight", sizes.hidden),
            norm("mlp_post_norm", "post_feedforward_layernorm.weight", sizes.hidden),
            *head_norms(turns),
        ),
        usual_linears(sizes, turns),
        attn_norm=None,
        mlp_norm=None,
        attn_branch=BranchShape("attn_post_norm"),
        mlp_branch=BranchShape("mlp_post_norm"),
    )
    kinds = {FULL: layer, SLIDING: replace(layer, attention=replace(turns, window=window))}
    default = []
    if not read.has("layer_types"):  # beside which published files have a pattern "LLLG", which the class cannot read
        every = None if window is None else read.integer("sliding_window_pattern", 4)
        default = [SLIDING if every is not None and (i + 1) % every else FULL for i in range(sizes.num_layers)]
    types = read_layer_types(read, sizes.num_layers, default)
    return FamilySpec(tuple(kinds[kind] for kind in types), NormShape(read.number("rms_norm_eps", above=False)))
