"""Packs AWQ, AutoRound, compressed-tensors and FP8 files one value at a time, from the formats' descriptions alone;
shares no code with exl. GPTQ's own layout is in ``plain_packer.py``.

Codes [K, N] and zeros [G, N] are unsigned, ``W[k, n] = scales[g, n] * (code[k, n] - zero[g, n])``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.reference.plain_packer import pack_values

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word of AWQ's gemm holds value AWQ_ORDER[i] of eight


def _signed(word: int, bits: int = 32) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word


def _word(values: Sequence[int], bits: int) -> int:
    word = 0
    for i, value in enumerate(values):
        word |= int(value) << (bits * i)
    return word


# --- GPTQ's variants -----------------------------------------------------------------------------------------------


def borrowed_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:  # [G, N] -> qzeros
    """v1 zeros as GPTQModel writes them: words of zeros, then 1 subtracted from every field of the word as a whole."""
    per_word = 32 // bits
    ones = _word([1] * per_word, bits)
    rows = [
        [_signed((_word(row[i : i + per_word], bits) - ones) % (1 << 32)) for i in range(0, len(row), per_word)]
        for row in zeros.tolist()
    ]
    return np.array(rows, np.int32)


def pack_plane_values(values: Sequence[int]) -> list[int]:
    """3 bits as ``gptq_p`` has them: of each 32 codes the low two bits in two words, 16 codes each, then the top bits
    in one."""
    words = []
    for start in range(0, len(values), 32):
        block = [int(value) for value in values[start : start + 32]]
        words += [_word([code % 4 for code in block[:16]], 2), _word([code % 4 for code in block[16:]], 2)]
        words.append(_word([code // 4 for code in block], 1))
    return [_signed(word) for word in words]


def pack_gptq_p(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    def pack(values: Sequence[int]) -> list[int]:
        return pack_plane_values(values) if bits == 3 else pack_values([int(value) for value in values], bits)

    return {
        "qweight": np.ascontiguousarray(np.array([pack(column) for column in codes.T], np.int32).T),
        "qzeros": np.array([pack(row) for row in zeros], np.int32),
        "scales": scales,
    }


# --- AWQ -----------------------------------------------------------------------------------------------------------


def _awq_words(row: Sequence[int]) -> list[int]:
    return [_signed(_word([row[start + AWQ_ORDER[i]] for i in range(8)], 4)) for start in range(0, len(row), 8)]


def pack_awq_gemm(codes: np.ndarray, zeros: np.ndarray | None, scales: np.ndarray) -> dict[str, np.ndarray]:
    """qweight [K, N / 8] and qzeros [G, N / 8], both along N, zeros as they are."""
    tensors = {"qweight": np.array([_awq_words(row) for row in codes.tolist()], np.int32), "scales": scales}
    if zeros is not None:
        tensors["qzeros"] = np.array([_awq_words(row) for row in zeros.tolist()], np.int32)
    return tensors


def pack_awq_gemv(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """qweight [N, K / 8] along K, qzeros [N, width] along the groups, scales [N, 8 width]; what no group has is 0."""
    G, N = zeros.shape
    padded = np.zeros((8 * width, N), np.int64)
    padded[:G] = zeros
    wide = np.zeros((N, 8 * width), scales.dtype)
    wide[:, :G] = scales.T
    return {
        "qweight": np.array([pack_values([int(c) for c in column], 4) for column in codes.T], np.int32),
        "qzeros": np.array([pack_values([int(z) for z in column], 4) for column in padded.T], np.int32),
        "scales": wide,
    }


def pack_awq_fast(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """qweight i16 [N / 4, K]; scales and ``-scale * zero`` f16, both [8 width, N].

    The [N / 4, K] array is read by 64 columns, which belong to 64 inputs of 4 outputs: output after output, each has
    16 words of 4 inputs. In a run of 32 inputs (8 words) word w holds, from the low nibble up, inputs of
    ``s = sequence[4 w : 4 w + 4]``, where the sequence visits 0, 8, 16, 24 with their neighbours as below.
    """
    K, N = codes.shape
    sequence = []
    for pair in range(4):  # 2 * pair is the first of two neighbours in each of four runs of eight
        eight = [8 * run + 2 * pair + odd for run in range(4) for odd in (0, 1)]
        sequence += eight[0::2] + eight[1::2]
    qweight = np.zeros((N // 4, K), np.int64)
    for four in range(N // 4):
        for block in range(K // 64):
            values = [
                int(codes[64 * block + 32 * half + sequence[i], 4 * four + out])
                for out in range(4)
                for half in range(2)
                for i in range(32)
            ]
            for word in range(64):
                qweight[four, 64 * block + word] = _signed(_word(values[4 * word : 4 * word + 4], 4), 16)
    G = zeros.shape[0]
    wide, scaled = np.zeros((8 * width, N), np.float16), np.zeros((8 * width, N), np.float16)
    wide[:G] = scales
    scaled[:G] = -(scales.astype(np.float32) * zeros.astype(np.float32)).astype(np.float16)
    return {"qweight": qweight.astype(np.int16), "qzeros": scaled, "scales": wide}


# --- compressed-tensors --------------------------------------------------------------------------------------------


def _stream_words(values: Sequence[int], bits: int) -> list[int]:
    """One stream of bits in as many words as it takes: compressed-tensors from 0.17.0 on."""
    stream = _word(values, bits)
    return [_signed(stream >> (32 * i) & 0xFFFFFFFF) for i in range(-(-len(values) * bits // 32))]


def _padded_words(values: Sequence[int], bits: int) -> list[int]:
    """Whole values in a word, the rest of its bits unused: before 0.17.0."""
    per_word = 32 // bits
    return [_signed(_word(values[i : i + per_word], bits)) for i in range(0, len(values), per_word)]


def pack_compressed(
    codes: np.ndarray,
    zeros: np.ndarray | None,
    scales: np.ndarray,
    bits: int,
    *,
    dense: bool = True,
    g_idx: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """weight_packed [N, words] along K, weight_scale [N, G], weight_zero_point [words, G] along N, weight_shape."""
    K, N = codes.shape
    words = _stream_words if dense else _padded_words
    tensors = {
        "weight_packed": np.array([words([int(c) for c in column], bits) for column in codes.T], np.int32),
        "weight_scale": np.ascontiguousarray(scales.T),
        "weight_shape": np.array([N, K], np.int64),
    }
    if zeros is not None:
        packed = np.array([words([int(z) for z in row], bits) for row in zeros], np.int32)
        tensors["weight_zero_point"] = np.ascontiguousarray(packed.T)
    if g_idx is not None:
        tensors["weight_g_idx"] = np.array(g_idx, np.int32)
    return tensors


# --- FP8 -----------------------------------------------------------------------------------------------------------


def e4m3(byte: int) -> float:
    """The value of float8_e4m3fn: 1 sign, 4 exponent and 3 mantissa bits, bias 7, no infinities, nan with all ones."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -value if sign else value


def dequantize_fp8(raw: np.ndarray, scales: np.ndarray, rows: int, columns: int) -> np.ndarray:  # [N, K] f64
    """``raw`` u8 [N, K]; one of ``scales`` for ``rows`` x ``columns`` weights."""
    N, K = raw.shape
    return np.array(
        [[e4m3(int(raw[n, k])) * float(scales[n // rows, k // columns]) for k in range(K)] for n in range(N)]
    )
