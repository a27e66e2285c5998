"""Qwen 2 and 2.5 (biases of q, k and v), Qwen 3 (norms of q and k). Windows, of the upper layers, where they are asked
for."""

from __future__ import annotations

from dataclasses import replace

from exl.checkpoint.config_reader import ConfigReader
from exl.families.common import (
    FULL,
    SLIDING,
    Source,
    head_norms,
    read_layer_types,
    read_mlp,
    read_sizes,
    read_window,
    usual_linears,
    usual_norms,
    with_defaults,
)
from exl.families.specs import FamilySpec, LayerSpec, NormShape


def prepare_qwen(read: ConfigReader) -> ConfigReader:
    return with_defaults(read, {"max_position_embeddings": 32_768})


def qwen2(source: Source) -> FamilySpec:
    read = source.read
    sizes = read_sizes(read)
    shape = sizes.attention(source.rope())
    layer = LayerSpec(
        shape,
        read_mlp(read, sizes.intermediate),
        usual_norms(sizes.hidden),
        usual_linears(sizes, shape, qkv_bias=True),
    )
    return _with_windows(read, source, layer, sizes.num_layers)


def qwen3(source: Source) -> FamilySpec:
    read = source.read
    sizes, bias = read_sizes(read, head_dim=128), read.flag("attention_bias", False)
    shape = replace(sizes.attention(source.rope()), norms="head")
    layer = LayerSpec(
        shape,
        read_mlp(read, sizes.intermediate),
        (*usual_norms(sizes.hidden), *head_norms(shape)),
        usual_linears(sizes, shape, qkv_bias=bias, o_bias=bias),
    )
    return _with_windows(read, source, layer, sizes.num_layers)


def _with_windows(read: ConfigReader, source: Source, layer: LayerSpec, num_layers: int) -> FamilySpec:
    window = read_window(read) if read.flag("use_sliding_window", False) else None
    first = read.integer("max_window_layers", 28, low=0)
    kinds = read_layer_types(read, num_layers, [SLIDING if i >= first else FULL for i in range(num_layers)])
    layers = tuple(
        replace(
            layer,
            attention=replace(
                layer.attention, rope=source.rope(kind), window=window if window and kind == SLIDING else None
            ),
        )
        for kind in kinds
    )
    return FamilySpec(layers, NormShape(read.number("rms_norm_eps", 1e-6, above=False)))
