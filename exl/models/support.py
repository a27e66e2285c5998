"""What a device has no kernels for, asked by the plan before any byte is spent."""

from __future__ import annotations

from collections.abc import Iterator

from exl.families.config import ModelConfig
from exl.families.specs import EmbedShape, LayerSpec, LogitsShape, MoeShape
from exl.layout.specs import Target


def unsupported(config: ModelConfig, target: Target) -> str | None:
    """The first property of the model that ``target`` has no kernels for, in words that fit behind "found"; None:
    there is none. Operations refuse the same when they are called: this is only earlier."""
    if target.kind != "cuda":
        return None
    return next(_missing(config), None)


def _missing(config: ModelConfig) -> Iterator[str]:
    if config.embed != EmbedShape():
        yield f"a factor of the embedding, {config.embed.scale:g}"
    if config.logits != LogitsShape():
        yield "a factor or a softcap of the logits"
    if len(config.ropes) > 1:
        yield f"{len(config.ropes)} different RoPEs"
    if config.norm.kind != "rms":
        yield "norms that subtract the mean"
    for layer in config.layers:
        yield from _missing_of(layer)


def _missing_of(layer: LayerSpec) -> Iterator[str]:
    if isinstance(layer.mlp, MoeShape):
        yield f"mixtures of {layer.mlp.count} experts"
    if layer.mlp.activation != "silu":
        yield f"an MLP with {layer.mlp.activation}"
    if layer.attn_branch.norm or layer.mlp_branch.norm:
        yield "norms behind attention or MLP"
    if layer.attn_norm is None or layer.mlp_norm is None:
        yield "no norm before attention or MLP"
    if layer.attention.norms == "row":
        yield "norms of q and k over all heads together"
    if layer.attention.sinks:
        yield "attention sinks"
