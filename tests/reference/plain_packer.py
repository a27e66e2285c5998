"""Packs GPTQ tensors one bit at a time, from the description of the format alone; shares no code with exl.

    qweight i32 [K / 32 * bits, N]   packed along K, least significant bits first
    qzeros  i32 [G, N / 32 * bits]   packed along N; stores zero - 1 ("gptq") or zero ("gptq_v2")
    W[k, n] = scales[g, n] * (code[k, n] - zero[g, n]), g = g_idx[k], or k // group_size without g_idx; G is
    ceil(K / group_size), so that the last group may have fewer inputs

3 bits: 32 values in 3 words. Word 0: values 0-9 at bit 3j, the low 2 bits of value 10 at bit 30. Word 1: its top bit at
bit 0, values 11-20 at bits 3j + 1, the low bit of value 21 at bit 31. Word 2: its top 2 bits at bit 0, values 22-31 at
bits 3j + 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bit_places(bits: int) -> list[list[tuple[int, int]]]:
    """Per value of a block of words: the (word, bit) of each of its bits, lowest first."""
    if bits != 3:
        return [[(0, bits * j + b) for b in range(bits)] for j in range(32 // bits)]
    first = [[(0, 3 * j), (0, 3 * j + 1), (0, 3 * j + 2)] for j in range(10)]
    tenth = [[(0, 30), (0, 31), (1, 0)]]
    second = [[(1, 3 * j + 1), (1, 3 * j + 2), (1, 3 * j + 3)] for j in range(10)]
    twenty_first = [[(1, 31), (2, 0), (2, 1)]]
    third = [[(2, 3 * j + 2), (2, 3 * j + 3), (2, 3 * j + 4)] for j in range(10)]
    return first + tenth + second + twenty_first + third


def pack_values(values: Sequence[int], bits: int) -> list[int]:
    """Packs one column of codes, or one row of zeros, into signed 32-bit words."""
    places = bit_places(bits)
    num_words = 3 if bits == 3 else 1
    words = []
    for start in range(0, len(values), len(places)):
        block = [0] * num_words
        for value, where in zip(values[start : start + len(places)], places, strict=True):
            for b, (word, bit) in enumerate(where):
                if value >> b & 1:
                    block[word] |= 1 << bit
        words += [word - (1 << 32) if word >> 31 else word for word in block]
    return words


def pack_layer(
    codes: np.ndarray,  # [K, N]
    zeros: np.ndarray,  # [G, N], true zeros
    scales: np.ndarray,  # [G, N]
    bits: int,
    checkpoint_format: str = "gptq",
    g_idx: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """Tensors of one layer by the ends of their names. v1 stores zero - 1, so a zero of 0 wraps to 2^bits - 1."""
    offset = {"gptq": 1, "gptq_v2": 0}[checkpoint_format]
    columns = [pack_values([int(code) for code in column], bits) for column in codes.T]
    rows = [pack_values([(int(zero) - offset) % 2**bits for zero in row], bits) for row in zeros]
    tensors = {
        "qweight": np.ascontiguousarray(np.array(columns, np.int32).T),
        "qzeros": np.array(rows, np.int32),
        "scales": np.asarray(scales, np.float16),
    }
    if g_idx is not None:
        tensors["g_idx"] = np.array(g_idx, np.int32)
    return tensors


def dequantize(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, g_idx: Sequence[int]
) -> np.ndarray:  # [K, N] f64
    """The formula above, one element at a time."""
    K, N = codes.shape
    weights = np.empty((K, N))
    for k in range(K):
        g = g_idx[k]
        for n in range(N):
            weights[k, n] = float(scales[g, n]) * (int(codes[k, n]) - int(zeros[g, n]))
    return weights
