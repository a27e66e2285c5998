"""GLM-4: neighbouring channels turn with each other, half of a head's; gate and up are one module. ``glm4``, of 2025,
has norms behind attention and MLP, ``glm`` has not."""

from __future__ import annotations

from exl.checkpoint.config_reader import ConfigReader
from exl.families.common import (
    Source,
    down_part,
    fused_parts,
    norm,
    o_part,
    qkv_parts,
    read_mlp,
    read_sizes,
    usual_norms,
    with_defaults,
)
from exl.families.specs import BranchShape, FamilySpec, LayerSpec, NormShape

_DEFAULTS = {
    "head_dim": 128,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
    "max_position_embeddings": 131_072,
    "eos_token_id": [151329, 151336, 151338],
}


def prepare_glm(read: ConfigReader) -> ConfigReader:
    return with_defaults(read, {**_DEFAULTS, "partial_rotary_factor": 0.5})


def glm(source: Source) -> FamilySpec:
    return _glm(source, post_norms=False)


def glm4(source: Source) -> FamilySpec:
    return _glm(source, post_norms=True)


def _glm(source: Source, post_norms: bool) -> FamilySpec:
    read = source.read
    sizes, bias = read_sizes(read), read.flag("attention_bias", True)
    shape, hidden, width = sizes.attention(source.rope()), sizes.hidden, sizes.intermediate
    turning = int(shape.head_dim * shape.rope.partial_rotary_factor)
    norms, branches = usual_norms(hidden), (BranchShape(), BranchShape())
    if post_norms:
        branches = BranchShape("attn_post_norm"), BranchShape("mlp_post_norm")
        norms += (
            norm("attn_post_norm", "post_self_attn_layernorm.weight", hidden),
            norm("mlp_post_norm", "post_mlp_layernorm.weight", hidden),
        )
    layer = LayerSpec(
        shape,
        read_mlp(read, width),
        norms,
        {
            "qkv": qkv_parts(hidden, shape, bias=bias, turning=turning),
            "o": o_part(hidden, shape),
            "gate_up": fused_parts("mlp.gate_up_proj", hidden, (width, width)),
            "down": down_part(hidden, width),
        },
        attn_branch=branches[0],
        mlp_branch=branches[1],
    )
    return FamilySpec((layer,) * sizes.num_layers, NormShape(read.number("rms_norm_eps", above=False)))
