"""SmolLM3: Llama in which each fourth layer does not turn; windows, where they are asked for, are those layers'."""

from __future__ import annotations

from dataclasses import replace

from exl.checkpoint.config_reader import ConfigReader
from exl.checkpoint.rope_config import NO_ROPE
from exl.families.common import FULL, SLIDING, Source, read_layer_types, read_window, with_defaults
from exl.families.llama import llama
from exl.families.specs import FamilySpec

_DEFAULTS = {
    "num_key_value_heads": 4,
    "rope_theta": 2e6,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}


def prepare_smollm3(read: ConfigReader) -> ConfigReader:
    return with_defaults(read, _DEFAULTS)


def smollm3(source: Source) -> FamilySpec:
    read, plain = source.read, llama(source)
    num_layers = len(plain.layers)
    every = read.integer("no_rope_layer_interval", 4)
    turns = read.integers("no_rope_layers", num_layers)  # 1: the layer turns
    turns = [(i + 1) % every != 0 for i in range(num_layers)] if turns is None else turns
    windowed = read.flag("use_sliding_window", False) and read.has("sliding_window")
    default = [FULL if turn or not windowed else SLIDING for turn in turns]
    types = read_layer_types(read, num_layers, default)
    layers = (
        replace(
            layer,
            attention=replace(
                layer.attention,
                rope=layer.attention.rope if turn else NO_ROPE,
                window=read_window(read) if windowed and kind == SLIDING else None,
            ),
        )
        for layer, turn, kind in zip(plain.layers, turns, types, strict=True)
    )
    return replace(plain, layers=tuple(layers))
