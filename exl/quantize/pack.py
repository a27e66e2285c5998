"""Codes, scales and zeros -> the tensors of a GPTQ file, as AutoGPTQ lays them out (``docs/formats.md``)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl.quantize.gptq import QuantizedWeight
from exl.quantize.options import QuantizeOptions
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
    start: int,
    bias: NDArray[np.float16] | None,
    options: QuantizeOptions,
) -> dict[str, NDArray]:
    """A module's tensors by name, from the columns of ``result`` that begin at ``start``.

    In padded outputs every code equals its zero, so that they are exactly 0.
    """
    columns = slice(start, start + module.N)
    middle = 1 << (options.bits - 1)
    pad = ((0, 0), (0, module.out_N - module.N))
    codes = np.pad(result.codes[:, columns].numpy(), pad, constant_values=middle)
    zeros = np.pad(result.zeros[:, columns].numpy(), pad, constant_values=middle)
    scales = np.pad(result.scales[:, columns].numpy(), pad, constant_values=1)
    tensors = {
        f"{module.name}.qweight": pack_codes(codes, options.bits),
        f"{module.name}.qzeros": pack_zeros(zeros, options.bits, options.checkpoint_format),
        f"{module.name}.scales": np.ascontiguousarray(scales),
        f"{module.name}.g_idx": result.g_idx.numpy(),
    }
    if bias is not None:
        tensors[f"{module.name}.bias"] = np.pad(bias, (0, module.out_N - module.N))
    return tensors
