"""What a device has no kernels for, asked by the plan before any byte is spent."""

from __future__ import annotations

from exl.families.config import ModelConfig
from exl.layout.specs import Target


def unsupported(config: ModelConfig, target: Target) -> str | None:
    """The first property of the model that ``target`` has no kernels for, in words that fit behind "found"; None:
    there is none. Operations refuse the same when they are called: this is only earlier."""
    if target.kind != "cuda":
        return None
    if config.mixtures:
        return f"mixtures of {config.mixtures[0].count} experts"
    if config.norm.kind != "rms" and any(layer.attention.norms == "head" for layer in config.layers):
        return "LayerNorm of each head's q and k"
    return None


def most_context(config: ModelConfig, target: Target) -> int:
    """Tokens up to which ``target`` computes what the model does; more than anyone has where it always does."""
    lengths = [rope.original_max_position for rope in config.ropes if rope.query_beta and target.kind == "cuda"]
    return min(lengths, default=1 << 40)
