"""Packed words <-> codes, where codes lie in consecutive bits: what formats share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unpack_codes(packed: NDArray[np.int32] | NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Packed words i32 [R, N] -> codes u8 [R * 32 / bits, N]: consecutive codes lie in consecutive bits along axis 0.

    All widths are one bit stream, least significant bit first; at 3 bits codes 10 and 21 of every 32 straddle words.
    Example, 4 bits: the word 0x76543210 holds codes 0, 1, 2, ... 7.
    """
    num_words, codes_per_block = (3, 32) if bits == 3 else (1, 32 // bits)
    num_rows, N = packed.shape
    num_blocks, num_bytes = num_rows // num_words, 4 * num_words
    little = np.ascontiguousarray(packed, "<i4").view(np.uint8).reshape(num_blocks, num_words, N, 4)
    # Bytes of one significance side by side, so that the shifts below run over contiguous memory.
    stream = np.ascontiguousarray(little.transpose(0, 1, 3, 2)).reshape(num_blocks, num_bytes, N)
    codes = np.empty((num_blocks, codes_per_block, N), np.uint8)
    mask = (1 << bits) - 1
    for j in range(codes_per_block):
        byte, shift = divmod(j * bits, 8)
        code = stream[:, byte] >> shift
        if shift + bits > 8:
            code |= stream[:, byte + 1] << (8 - shift)
        np.bitwise_and(code, mask, out=codes[:, j])
    return codes.reshape(num_blocks * codes_per_block, N)


def unpack_planes(packed: NDArray[np.int32] | NDArray[np.uint32]) -> NDArray[np.uint8]:
    """GPTQModel's planes at 3 bits, i32 [R, N] -> codes u8 [R * 32 / 3, N]. (At 2, 4 and 8 bits planes are the bit
    stream of :func:`unpack_codes`.)

    Of 32 codes, two words hold the low two bits of 16 codes each, first to last from the low bits up; the third holds
    the top bits, that of code j in bit j.
    """
    num_rows, N = packed.shape
    words = np.ascontiguousarray(packed).view(np.uint32).reshape(num_rows // 3, 3, N)
    codes = np.empty((num_rows // 3, 32, N), np.uint8)
    for j in range(32):
        word, shift = divmod(2 * j, 32)
        low, top = words[:, word] >> np.uint32(shift), words[:, 2] >> np.uint32(j)
        codes[:, j] = (low & np.uint32(3)) | (top & np.uint32(1)) << np.uint32(2)
    return codes.reshape(num_rows // 3 * 32, N)
