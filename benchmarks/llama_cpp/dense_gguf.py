"""Writes a dense Llama of a Hugging Face folder as GGUF in f32, for llama-quantize: the same weights for both programs.

Without a tokenizer: what is compared gets token ids. q and k change their order of rows, because llama.cpp rotates
neighbouring rows of a head and Hugging Face rows half a head apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from exl.checkpoint.checkpoint import Checkpoint
from exl.errors import UnsupportedModelError


def write_dense_gguf(folder: Path, path: Path) -> None:
    """``folder``: with one or more files of dense weights. Raises ``UnsupportedModelError`` for anything but a plain
    Llama without biases and scaled RoPE."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", "default")
    if config["model_type"] != "llama" or kind != "default" or "quantization_config" in config:
        raise UnsupportedModelError(
            f"{folder}: found {config['model_type']}, RoPE {kind}, expected a plain dense Llama"
        )
    num_heads, num_layers = config["num_attention_heads"], config["num_hidden_layers"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(num_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // num_heads)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, num_layers)
    heads = {"q_proj": num_heads, "k_proj": num_kv_heads}
    try:
        for name, values in _tensors(folder):
            target = names.get_name(name, try_suffixes=(".weight",))
            if target is None or name.endswith(".bias"):
                raise UnsupportedModelError(f"{folder}: found {name}, expected the tensors of a dense Llama")
            module = name.split(".")[-2]
            writer.add_tensor(target, interleave(values, heads[module]) if module in heads else values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Each name with its values in f32."""
    with Checkpoint.open(folder) as checkpoint:
        files = [folder / name for name in checkpoint.files]
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  no mapping
                yield name, np.ascontiguousarray(file.get_tensor(name).float().numpy())


def interleave(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows [N, K] of heads, each with its two halves row by row."""
    parts = values.reshape(num_heads, 2, -1, values.shape[-1])
    return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(values.shape))
