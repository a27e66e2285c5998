"""gpt-oss: mixtures in all layers, routed by the logits of those that are chosen, with biases and a clamped activation;
attention with sinks, each second layer with a window; yarn."""

from __future__ import annotations

from dataclasses import replace

from exl.checkpoint.config_reader import ConfigReader
from exl.errors import UnsupportedModelError
from exl.families.common import (
    FULL,
    SLIDING,
    Source,
    norm,
    read_layer_types,
    read_sizes,
    read_window,
    usual_linears,
    usual_norms,
    with_defaults,
)
from exl.families.experts import read_mixture, router_part, stacked_parts, with_mixture
from exl.families.specs import FamilySpec, LayerSpec, NormShape, RouteShape

_ALPHA = 1.702  # of the activation
_DEFAULTS = {
    "head_dim": 64,
    "num_key_value_heads": 8,
    "rope_theta": 150_000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "num_experts_per_tok": 4,
    "num_local_experts": 128,
    "hidden_act": "silu",
}
_ROPE = {
    "rope_theta": 150_000.0,
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def prepare_gpt_oss(read: ConfigReader) -> ConfigReader:
    read = with_defaults(read, _DEFAULTS)
    if read.has("rope_parameters") or read.has("rope_scaling"):
        return read
    return with_defaults(read, {"rope_parameters": _ROPE})


def gpt_oss(source: Source) -> FamilySpec:
    read = source.read
    if (alpha := read.number("swiglu_alpha", _ALPHA)) != _ALPHA:
        raise UnsupportedModelError(f"{read.source}: swiglu_alpha: found {alpha:g}, expected {_ALPHA}")
    sizes, bias = read_sizes(read), read.flag("attention_bias", True)
    shape, hidden, width = replace(sizes.attention(source.rope()), sinks=True), sizes.hidden, sizes.intermediate
    moe = read_mixture(read, "num_local_experts", width, RouteShape("chosen"))
    moe = replace(moe, activation="swiglu_oai", limit=read.number("swiglu_limit", 7.0))
    linears = usual_linears(sizes, shape, qkv_bias=bias, o_bias=bias)
    layer = LayerSpec(
        shape,
        moe,
        (*usual_norms(hidden), norm("sinks", "self_attn.sinks", sizes.num_heads)),
        with_mixture(linears, {"router": router_part(hidden, moe.count, "mlp.router", bias=True)}),
        experts=(stacked_parts(hidden, width, "mlp.experts", transposed=True, interleaved=True, bias=True),),
    )
    kinds = {FULL: layer, SLIDING: replace(layer, attention=replace(shape, window=read_window(read, 128)))}
    default = [FULL if i % 2 else SLIDING for i in range(sizes.num_layers)]
    return FamilySpec(
        tuple(kinds[kind] for kind in read_layer_types(read, sizes.num_layers, default)),
        NormShape(read.number("rms_norm_eps", above=False)),
    )
