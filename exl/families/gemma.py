"""Gemma 2 and 3 (the text part): norms of 1 + w, behind attention and MLP, too; GELU; layers with windows between those
that see everything. Gemma 2 caps scores and logits; Gemma 3 has norms of q and k, and two RoPEs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from exl.checkpoint.config_reader import ConfigReader
from exl.errors import UnsupportedModelError
from exl.families.common import (
    FULL,
    SLIDING,
    Sizes,
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
from exl.families.specs import (
    AttentionShape,
    BranchShape,
    EmbedShape,
    FamilySpec,
    LayerSpec,
    LogitsShape,
    NormShape,
)
from exl.layout.specs import NormSpec

# What the classes of both families in transformers set; published files leave much of it out.
_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def prepare_gemma2(read: ConfigReader) -> ConfigReader:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # null in a file: none
    return with_defaults(read, {**_DEFAULTS, **caps, "vocab_size": 256000, "max_position_embeddings": 8192})


def prepare_gemma3(read: ConfigReader) -> ConfigReader:
    """Earlier files have one theta for each kind of layer, and a scaling that is for full attention alone."""
    values = {**_DEFAULTS, "vocab_size": 262_208, "max_position_embeddings": 131_072, **read.values}
    if values.get("layer_types") is None:
        every = ConfigReader(values, read.source).integer("sliding_window_pattern", 6)
        num_layers = ConfigReader(values, read.source).integer("num_hidden_layers", high=4096)
        values["layer_types"] = _alternating(num_layers, every)
    nested = read.object("rope_parameters")
    if FULL not in nested and SLIDING not in nested:
        full = {"rope_theta": values.get("rope_theta") or 1e6, **read.object("rope_scaling"), **nested}
        values["rope_parameters"] = {FULL: full, SLIDING: {"rope_theta": values.get("rope_local_base_freq") or 1e4}}
    return ConfigReader(values, read.source)


def gemma2(source: Source) -> FamilySpec:
    read = source.read
    sizes = read_sizes(read)
    types = read_layer_types(read, sizes.num_layers, _alternating(sizes.num_layers, 2))
    return _gemma(source, sizes, types, norms=None)


def gemma3(source: Source) -> FamilySpec:
    sizes = read_sizes(source.read)
    if source.read.flag("use_bidirectional_attention", False):
        raise UnsupportedModelError(
            f"{source.read.source}: use_bidirectional_attention: found true, exl has models that generate text"
        )
    return _gemma(source, sizes, read_layer_types(source.read, sizes.num_layers, ()), norms="head")


def _alternating(num_layers: int, every: int) -> list[str]:
    """Each ``every``-th layer sees everything."""
    return [SLIDING if (i + 1) % every else FULL for i in range(num_layers)]


def _gemma(source: Source, sizes: Sizes, types: Sequence[str], norms: str | None) -> FamilySpec:
    read, window = source.read, read_window(source.read)
    bias = read.flag("attention_bias", False)
    full = replace(
        sizes.attention(source.rope(), read.number("query_pre_attn_scalar") ** -0.5),
        softcap=read.number("attn_logit_softcapping") if read.has("attn_logit_softcapping") else None,
        norms=norms,
    )
    layer = LayerSpec(
        full,
        read_mlp(read, sizes.intermediate, "gelu_pytorch_tanh", "hidden_activation"),
        _norms(sizes.hidden, full),
        usual_linears(sizes, full, qkv_bias=bias, o_bias=bias),
        attn_branch=BranchShape("attn_post_norm"),
        mlp_branch=BranchShape("mlp_post_norm"),
    )
    kinds = {FULL: layer, SLIDING: replace(layer, attention=replace(full, rope=source.rope(SLIDING), window=window))}
    cap = read.number("final_logit_softcapping") if read.has("final_logit_softcapping") else None
    return FamilySpec(
        tuple(kinds[kind] for kind in types),
        NormShape(read.number("rms_norm_eps", above=False), offset=1.0),
        embed=EmbedShape(sizes.hidden**0.5, in_file_type=True),
        logits=LogitsShape(softcap=cap),
    )


def _norms(hidden: int, shape: AttentionShape) -> tuple[NormSpec, ...]:
    found = (
        norm("attn_norm", "input_layernorm.weight", hidden, 1.0),
        norm("attn_post_norm", "post_attention_layernorm.weight", hidden, 1.0),
        norm("mlp_norm", "pre_feedforward_layernorm.weight", hidden, 1.0),
        norm("mlp_post_norm", "post_feedforward_layernorm.weight", hidden, 1.0),
    )
    return found if shape.norms is None else (*found, *head_norms(shape, 1.0))
