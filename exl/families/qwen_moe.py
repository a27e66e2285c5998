"""Qwen 1.5, 2 and 3 with mixtures of experts: Qwen 2 and 3 with another MLP in all layers, or in some; Qwen 2's have a
shared expert."""

from __future__ import annotations

from dataclasses import replace

from exl.checkpoint.config_reader import ConfigReader
from exl.families.common import FULL, SLIDING, Source, with_defaults
from exl.families.experts import (
    expert_parts,
    read_mixture,
    router_part,
    shared_parts,
    stacked_parts,
    with_mixture,
)
from exl.families.qwen import qwen2, qwen3
from exl.families.specs import FamilySpec, LayerSpec, MoeShape, PartSpec, RouteShape, SharedShape

_POSITIONS = {"max_position_embeddings": 32_768}
_QWEN2 = {**_POSITIONS, "num_experts": 60, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632}
_QWEN3 = {**_POSITIONS, "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4, "layer_types": None}


def prepare_qwen2_moe(read: ConfigReader) -> ConfigReader:
    read = with_defaults(read, _QWEN2)
    if read.has("layer_types") or not read.flag("use_sliding_window", False):
        return read
    # Windows are those of the lower layers here, each second one; in the dense models those of the upper.
    num_layers, most = read.integer("num_hidden_layers", high=4096), read.integer("max_window_layers", 28, low=0)
    types = [SLIDING if i % 2 == 0 and i < most else FULL for i in range(num_layers)]
    return ConfigReader({**read.values, "layer_types": types}, read.source)


def prepare_qwen3_moe(read: ConfigReader) -> ConfigReader:
    """All layers have the window, if there is one."""
    count = read.values.get("num_local_experts")  # what transformers 5 writes
    read = with_defaults(read, _QWEN3 if count is None else {**_QWEN3, "num_experts": count})
    types = [SLIDING] * read.integer("num_hidden_layers", high=4096)
    return ConfigReader({**read.values, "layer_types": types}, read.source)


def qwen2_moe(source: Source) -> FamilySpec:
    read, plain = source.read, qwen2(source)
    hidden, width = read.integer("hidden_size"), read.integer("moe_intermediate_size", 1408)
    shared = SharedShape(read.integer("shared_expert_intermediate_size"), gated=True)
    moe = _mixture(read, width, shared)
    more = shared_parts(hidden, shared, "mlp.shared_expert", "mlp.shared_expert_gate")
    if not read.flag("qkv_bias", True):
        plain = replace(plain, layers=tuple(_without_qkv_bias(layer) for layer in plain.layers))
    return _with_mixtures(read, plain, moe, more)


def qwen3_moe(source: Source) -> FamilySpec:
    read = source.read
    return _with_mixtures(read, qwen3(source), _mixture(read, read.integer("moe_intermediate_size", 768)), {})


def _mixture(read: ConfigReader, width: int, shared: SharedShape | None = None) -> MoeShape:
    route = RouteShape(normalize=read.flag("norm_topk_prob", False))
    return read_mixture(read, "num_experts", width, route, shared)


def _without_qkv_bias(layer: LayerSpec) -> LayerSpec:
    qkv = tuple(replace(part, has_bias=False) for part in layer.linears["qkv"])
    return replace(layer, linears={**layer.linears, "qkv": qkv})


def _with_mixtures(
    read: ConfigReader, plain: FamilySpec, moe: MoeShape, more: dict[str, tuple[PartSpec, ...]]
) -> FamilySpec:
    """``decoder_sparse_step``: each so many-th layer is a mixture, unless ``mlp_only_layers`` names it."""
    hidden = read.integer("hidden_size")
    every, dense = read.integer("decoder_sparse_step", 1), read.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise read.error("mlp_only_layers", "a list of layers")
    linears = {"router": router_part(hidden, moe.count, "mlp.gate"), **more}
    experts = expert_parts(hidden, moe.width, "mlp.experts"), stacked_parts(hidden, moe.width, "mlp.experts")
    layers = (
        layer
        if i in dense or (i + 1) % every
        else replace(layer, mlp=moe, linears=with_mixture(layer.linears, linears), experts=experts)
        for i, layer in enumerate(plain.layers)
    )
    return replace(plain, layers=tuple(layers))
