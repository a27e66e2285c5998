"""Phi-3, 3.5 and 4: q, k and v are one module, gate and up another; longrope."""

from __future__ import annotations

from dataclasses import replace

from exl.checkpoint.config_reader import ConfigReader
from exl.families.common import (
    Source,
    down_part,
    fused_parts,
    o_part,
    read_mlp,
    read_sizes,
    read_window,
    usual_norms,
    with_defaults,
)
from exl.families.specs import FamilySpec, LayerSpec, NormShape

_DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": None,
}
_KEYS = ("rope_parameters", "rope_scaling")


def prepare_phi3(read: ConfigReader) -> ConfigReader:
    """Earlier files call longrope "su", or "yarn", which it is not."""
    read = with_defaults(read, _DEFAULTS)
    values = dict(read.values)
    for key in _KEYS:
        scaling = dict(read.object(key))
        if scaling.get("rope_type", scaling.get("type")) in ("su", "yarn"):
            values[key] = {**scaling, "rope_type": "longrope", "type": "longrope"}
    return ConfigReader(values, read.source)


def phi3(source: Source) -> FamilySpec:
    read = source.read
    sizes = read_sizes(read)
    shape = replace(sizes.attention(source.rope()), window=read_window(read))
    hidden, width = sizes.hidden, sizes.intermediate
    layer = LayerSpec(
        shape,
        read_mlp(read, width),
        usual_norms(hidden),
        {
            "qkv": fused_parts("self_attn.qkv_proj", hidden, (shape.width, shape.kv_width, shape.kv_width)),
            "o": o_part(hidden, shape),
            "gate_up": fused_parts("mlp.gate_up_proj", hidden, (width, width)),
            "down": down_part(hidden, width),
        },
    )
    return FamilySpec((layer,) * sizes.num_layers, NormShape(read.number("rms_norm_eps", above=False)))
