"""Writes a Llama of random weights as GGUF, in the types that llama.cpp's own quantization to Q4_0 gives a model:
matrices and embedding in Q4_0, the head in Q6_K, norms in f32. Speed does not depend on the weights' values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exl.planning.shapes import DENSE_BITS, ModelShape

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

HEADS = ("q6_k", "f16")
# Of a block's scale: weights of a standard deviation of about 0.02, as in benchmarks/synthetic.py.
_Q4_SCALES = (0.002, 0.006)
_Q6_SCALE = 1e-5


def write_gguf(path: Path, shape: ModelShape, *, head: str = "q6_k", seed: int = 0) -> None:
    """Writes a model of ``shape``, a Llama with a head of its own, without a tokenizer. ``head``: one of ``HEADS``.

    Raises ``ValueError`` for a width that is no multiple of the type's block: 32 weights in Q4_0, 256 in Q6_K.
    """
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_position)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("none")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, shape.num_layers)
    for i, (name, _, size) in enumerate(shape.tensors(DENSE_BITS, 0)):
        rng = np.random.default_rng([seed, i])
        target = names.get_name(name, try_suffixes=(".weight",))
        if len(size) == 1:
            writer.add_tensor(target, np.ones(size, np.float32))
        elif name == "lm_head.weight" and head == "f16":
            writer.add_tensor(target, (rng.random(size, np.float32) * 0.04 - 0.02).astype(np.float16))
        else:
            kind = GGMLQuantizationType.Q6_K if name == "lm_head.weight" else GGMLQuantizationType.Q4_0
            writer.add_tensor(target, random_blocks(rng, size, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def random_blocks(rng: np.random.Generator, size: Sequence[int], kind: GGMLQuantizationType) -> np.ndarray:
    """A matrix [N, K] of random codes: u8 [N, bytes of a row], blocks as ggml-common.h has them (``block_q4_0``: scale,
    codes; ``block_q6_K``: codes, 16 signed factors, scale)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    N, K = size
    length, num_bytes = GGML_QUANT_SIZES[kind]
    if K % length:
        raise ValueError(f"a row of {K} weights: expected a multiple of {length} for {kind.name}")
    blocks = np.frombuffer(rng.bytes(N * (K // length) * num_bytes), np.uint8).reshape(-1, num_bytes).copy()
    if kind == GGMLQuantizationType.Q4_0:
        scales = rng.uniform(*_Q4_SCALES, (len(blocks), 1))
        blocks[:, :2] = scales.astype(np.float16).view(np.uint8)
    else:
        blocks[:, -2:] = np.full((len(blocks), 1), _Q6_SCALE, np.float16).view(np.uint8)
    return blocks.reshape(N, -1)
