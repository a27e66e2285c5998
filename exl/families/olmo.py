"""OLMo 2: no norm before attention and MLP, one behind each; norms of q and k over the channels of all heads."""

from __future__ import annotations

from dataclasses import replace

from exl.checkpoint.config_reader import ConfigReader
from exl.families.common import Source, head_norms, norm, read_mlp, read_sizes, usual_linears, with_defaults
from exl.families.specs import BranchShape, FamilySpec, LayerSpec, NormShape


def prepare_olmo2(read: ConfigReader) -> ConfigReader:
    return with_defaults(read, {"rms_norm_eps": 1e-5, "eos_token_id": 50279})


def olmo2(source: Source) -> FamilySpec:
    read = source.read
    sizes, bias = read_sizes(read), read.flag("attention_bias", False)
    shape = replace(sizes.attention(source.rope()), norms="row")
    layer = LayerSpec(
        shape,
        read_mlp(read, sizes.intermediate),
        (
            norm("attn_post_norm", "post_attention_layernorm.weight", sizes.hidden),
            norm("mlp_post_norm", "post_feedforward_layernorm.weight", sizes.hidden),
            *head_norms(shape),
        ),
        usual_linears(sizes, shape, qkv_bias=bias, o_bias=bias),
        attn_norm=None,
        mlp_norm=None,
        attn_branch=BranchShape("attn_post_norm"),
        mlp_branch=BranchShape("mlp_post_norm"),
    )
    return FamilySpec((layer,) * sizes.num_layers, NormShape(read.number("rms_norm_eps", above=False)))
