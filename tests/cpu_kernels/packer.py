"""Weights as the column layout holds them, from codes; written from the description in ``exl.layout.columns`` with
plain loops over bits, independently of the library's own packer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl.layout.columns import COLUMNS, ColumnLayout


def to_scale_dtype(scales: NDArray[np.float32], dtype: str) -> NDArray:
    """As stored: f16, f32, or the upper half of an f32 (bf16) as u16."""
    if dtype == "bf16":
        return (scales.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return scales.astype({"f16": np.float16, "f32": np.float32}[dtype])


def from_scale_dtype(stored: NDArray) -> NDArray[np.float32]:
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def pack_columns(
    layout: ColumnLayout, codes: NDArray[np.uint8], scales: NDArray, zeros: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """``codes`` [K, N] in sorted order, ``scales`` [groups, N] as stored, ``zeros`` u8 [groups, N] -> u8
    [blocks, records, record_bytes]."""
    source = layout.source_rows()
    padded = np.zeros((layout.padded_K, layout.num_blocks * COLUMNS), np.uint8)
    padded[source >= 0, : layout.N] = codes[source[source >= 0]]
    groups = layout.group_of_record()
    out = np.zeros((layout.num_blocks, layout.num_records, layout.record_bytes), np.uint8)
    for block in range(layout.num_blocks):
        columns = slice(block * COLUMNS, (block + 1) * COLUMNS)
        used = slice(columns.start, min(columns.stop, layout.N))
        for record in range(layout.num_records):
            rows = padded[record * layout.rows : (record + 1) * layout.rows, columns]
            to, group = out[block, record], groups[record]
            words = _words(rows.astype(np.uint32), layout.bits)
            to[: layout.scales_offset] = np.ascontiguousarray(words).view(np.uint8).reshape(-1)
            side = np.zeros(COLUMNS, scales.dtype)
            side[: used.stop - used.start] = scales[group, used]
            to[layout.scales_offset : layout.zeros_offset] = side.view(np.uint8)
            if not layout.symmetric:
                to[layout.zeros_offset :][: used.stop - used.start] = zeros[group, used]
    return out


def _words(codes: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """[rows, columns] -> [words, columns]"""
    if bits == 3:
        return np.concatenate([_three(codes[i : i + 32]) for i in range(0, len(codes), 32)])
    per = 32 // bits
    words = np.zeros((len(codes) // per, codes.shape[1]), np.uint32)
    for i, row in enumerate(codes):
        words[i // per] |= row << np.uint32(bits * (i % per))
    return words


def _three(codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """32 inputs as three words: the low two bits of 16, of the next 16, and all highest bits."""
    words = np.zeros((3, codes.shape[1]), np.uint32)
    for i, row in enumerate(codes):
        words[i // 16] |= (row & np.uint32(3)) << np.uint32(2 * (i % 16))
        a, b, j = i // 16, i % 16 // 4, i % 4
        words[2] |= (row >> np.uint32(2)) << np.uint32(8 * b + 4 * a + j)
    return words
