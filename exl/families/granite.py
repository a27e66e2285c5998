"""Granite 3: Llama with four factors, of the embedding, the scores, what a block adds, and the logits."""

from __future__ import annotations

from dataclasses import replace

from exl.families.common import Source
from exl.families.llama import llama
from exl.families.specs import BranchShape, EmbedShape, FamilySpec, LogitsShape


def granite(source: Source) -> FamilySpec:
    read, plain = source.read, llama(source)
    branch = BranchShape(scale=read.number("residual_multiplier", 1.0))
    scale = read.number("attention_multiplier", 1.0)
    layers = (
        replace(layer, attention=replace(layer.attention, scale=scale), attn_branch=branch, mlp_branch=branch)
        for layer in plain.layers
    )
    return replace(
        plain,
        layers=tuple(layers),
        embed=EmbedShape(read.number("embedding_multiplier", 1.0)),
        logits=LogitsShape(1 / read.number("logits_scaling", 1.0)),
    )
