"""GLM-4.5 to 4.7 (``glm4_moe``): the first layers have a dense MLP, the others a mixture of experts that is routed by
sigmoids, chosen with a correction, and a shared expert. Half of each head turns."""

from __future__ import annotations

from dataclasses import replace

from exl.checkpoint.config_reader import ConfigReader
from exl.families.common import (
    Source,
    head_norms,
    norm,
    read_mlp,
    read_sizes,
    usual_linears,
    usual_norms,
    with_defaults,
)
from exl.families.experts import (
    expert_parts,
    read_mixture,
    router_part,
    shared_parts,
    stacked_parts,
    with_mixture,
)
from exl.families.specs import FamilySpec, LayerSpec, ModelNames, NormShape, RouteShape, SharedShape

_DEFAULTS = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "partial_rotary_factor": 0.5,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
}
_EPS = 1e-20  # of the sum of a token's weights


def prepare_glm4_moe(read: ConfigReader) -> ConfigReader:
    return with_defaults(read, _DEFAULTS)


def glm4_moe(source: Source) -> FamilySpec:
    read = source.read
    sizes, bias = read_sizes(read), read.flag("attention_bias", False)
    has_norms = read.flag("use_qk_norm", False)
    shape, hidden = sizes.attention(source.rope()), sizes.hidden
    shape = replace(shape, norms="head") if has_norms else shape
    dense = LayerSpec(
        shape,
        read_mlp(read, sizes.intermediate),
        (*usual_norms(hidden), *(head_norms(shape) if has_norms else ())),
        usual_linears(sizes, shape, qkv_bias=bias),
    )
    width = read.integer("moe_intermediate_size", 1408)
    route = RouteShape(
        "sigmoid",
        read.flag("norm_topk_prob", True),
        _EPS,
        read.number("routed_scaling_factor", 1.0),
        read.integer("n_group", 1),
        read.integer("topk_group", 1),
    )
    if route.top_groups > route.groups:
        raise read.error("topk_group", f"at most n_group, {route.groups}")
    num_shared = read.integer("n_shared_experts", 1, low=0)
    shared = SharedShape(width * num_shared) if num_shared else None
    moe = read_mixture(read, "n_routed_experts", width, route, shared)
    if moe.count // route.groups < 2:
        raise read.error("n_group", "groups of two experts or more")
    more = {} if shared is None else shared_parts(hidden, shared, "mlp.shared_experts")
    sparse = replace(
        dense,
        mlp=moe,
        norms=(*dense.norms, norm("router_bias", "mlp.gate.e_score_correction_bias", moe.count)),
        linears=with_mixture(dense.linears, {"router": router_part(hidden, moe.count, "mlp.gate"), **more}),
        experts=(expert_parts(hidden, width, "mlp.experts"), stacked_parts(hidden, width, "mlp.experts")),
    )
    first = read.integer("first_k_dense_replace", 1, low=0)
    names = ModelNames()
    further = read.integer("num_nextn_predict_layers", 1, low=0)
    unread = tuple(f"{names.layers}.{sizes.num_layers + i}." for i in range(further))
    return FamilySpec(
        tuple(dense if i < first else sparse for i in range(sizes.num_layers)),
        NormShape(read.number("rms_norm_eps", above=False)),
        names=replace(names, unread=unread),
    )
