"""Mixtral: Mistral whose MLPs are mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from exl.checkpoint.config_reader import ConfigReader
from exl.families.common import Source, with_defaults
from exl.families.experts import expert_parts, read_mixture, router_part, stacked_parts, with_mixture
from exl.families.llama import mistral
from exl.families.specs import FamilySpec, RouteShape

_DEFAULTS = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "max_position_embeddings": 131_072,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def prepare_mixtral(read: ConfigReader) -> ConfigReader:
    return with_defaults(read, _DEFAULTS)


def mixtral(source: Source) -> FamilySpec:
    read, plain = source.read, mistral(source)
    first = plain.layers[0]
    hidden, width = read.integer("hidden_size"), first.mlp.width
    moe = read_mixture(read, "num_local_experts", width, RouteShape())
    module = "block_sparse_moe"
    layer = replace(
        first,
        mlp=moe,
        linears=with_mixture(first.linears, {"router": router_part(hidden, moe.count, f"{module}.gate")}),
        experts=(
            expert_parts(hidden, width, f"{module}.experts", ("w1", "w3", "w2")),
            stacked_parts(hidden, width, f"{module}.experts"),
        ),
    )
    return replace(plain, layers=(layer,) * len(plain.layers))
