"""Llama, and Mistral, which differs in a window that all layers have."""

from __future__ import annotations

from dataclasses import replace

from exl.families.common import Source, read_mlp, read_sizes, read_window, usual_linears, usual_norms
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


def mistral(source: Source) -> FamilySpec:
    read = source.read
    sizes = read_sizes(read)
    shape = replace(sizes.attention(source.rope()), window=read_window(read))
    layer = LayerSpec(shape, read_mlp(read, sizes.intermediate), usual_norms(sizes.hidden), usual_linears(sizes, shape))
    return FamilySpec((layer,) * sizes.num_layers, NormShape(read.number("rms_norm_eps", 1e-6, above=False)))
