"""Codes, scales and zeros -> the tensors of a GPTQ file, as AutoGPTQ lays them out (``docs/formats.md``)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl.quantize.gptq import QuantizedWeight
from exl.quantize.plan import ModulePlan

_BLOCK = 32  # this many codes fill whole words at every number of bits


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Codes u8 [K, N] -> words i32 [K * bits / 32, N]: each column is one bit stream, least significant bit first.

    K is a multiple of 32. Example, 4 bits: codes 0, 1, 2, ... 7 make the word 0x76543210.
    """
    K, N = codes.shape
    blocks = codes.reshape(K // _BLOCK, _BLOCK, N)
    words = np.zeros((K // _BLOCK, bits, N), dtype=np.uint32)
    for j in range(_BLOCK):
        word, shift = divmod(j * bits, 32)
        code = blocks[:, j].astype(np.uint32)
        words[:, word] |= code << np.uint32(shift)
        if shift + bits > 32:  # 3 bits: the code straddles two words
            words[:, word + 1] |= code >> np.uint32(32 - shift)
    return words.view(np.int32).reshape(K // _BLOCK * bits, N)


def pack_zeros(zeros: NDArray[np.uint8], bits: int, checkpoint_format: str) -> NDArray[np.int32]:
    """True zeros u8 [G, N] -> words i32 [G, N * bits / 32]. The v1 format stores zero - 1, modulo 2^bits."""
    stored = zeros
    if checkpoint_format == "gptq":
        stored = (zeros - np.uint8(1)) & np.uint8((1 << bits) - 1)
    G, N = stored.shape
    padded = np.zeros((-(-N // _BLOCK) * _BLOCK, G), dtype=np.uint8)
    padded[:N] = stored.T
    return np.ascontiguousarray(pack_codes(padded, bits)[: N * bits // 32].T)


def gptq_tensors(
    module: ModulePlan,
    result: QuantizedWeight,
    columns: NDArray[np.int64],
    bias: NDArray[np.float16] | None,
    checkpoint_format: str,
) -> dict[str, NDArray]:
    """A module's tensors by name. ``columns``: for each output of the module the column of ``result``, -1: padding.

    In padded outputs every code equals its zero, so that they are exactly 0.
    """
    bits = module.bits
    middle = 1 << (bits - 1)
    tensors = {
        f"{module.name}.qweight": pack_codes(_place(result.codes.numpy(), columns, middle), bits),
        f"{module.name}.qzeros": pack_zeros(_place(result.zeros.numpy(), columns, middle), bits, checkpoint_format),
        f"{module.name}.scales": _place(result.scales.numpy(), columns, 1),
        f"{module.name}.g_idx": result.g_idx.numpy(),
    }
    if bias is not None:
        tensors[f"{module.name}.bias"] = module.place_bias(bias)
    return tensors


def _place(values: NDArray, columns: NDArray[np.int64], padding: int) -> NDArray:
    placed = np.full((len(values), len(columns)), padding, values.dtype)
    placed[:, columns >= 0] = values[:, columns[columns >= 0]]
    return placed
