"""Quantized matrices -> tiles, on the CPU (``exl/layout/tiles.py`` has the layout)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exl.errors import KernelError
from exl.formats.matrix import QuantizedMatrix
from exl.layout.tiles import BLOCK, ROWS, TileLayout, natural_rows

TILES_AT_ONCE = 64  # that the packer holds unpacked
_QPARAMS = ("scales", "zeros")


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix in tiles, on the CPU. ``bias`` is f32 [tiles * 16] in the order of the tiles' rows."""

    layout: TileLayout
    codes: NDArray[np.uint32]
    qparams: NDArray[np.uint8]
    bias: NDArray[np.float32] | None


def lane_words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Codes u8 [tiles, 16, K] (K a multiple of 64) -> the words of each lane, u32 [tiles, K / 64, 32, bits]."""
    tiles, _, K = codes.shape
    # row = 8 r + g; input = 64 block + 32 b + 8 t + 4 jl + 2 ph + second
    split = codes.reshape(tiles, 2, 8, K // 64, 2, 4, 2, 2, 2).transpose(0, 3, 2, 5, 4, 6, 7, 1, 8)
    pairs = split.reshape(tiles, K // 64, 32, 16, 2).astype(np.uint32)  # pair q = 4 j + p
    pair = pairs[..., 0] | pairs[..., 1] << 16
    words = np.zeros((tiles, K // BLOCK, 32, bits), np.uint32)  # 16 * 64 * bits / 32 lanes / 32
    for q in range(16):
        j, p = divmod(q, 4)
        v = pair[..., q]
        if bits == 4:
            words[..., j] |= v << 4 * p
        elif bits == 8:
            words[..., 2 * j + p // 2] |= (pairs[..., q, 0] | pairs[..., q, 1] << 8) << 16 * (p % 2)
        elif bits == 2:
            words[..., j // 2] |= v << (8 * (j % 2) + 2 * p)
        elif q < 15:
            words[..., q // 5] |= v << 3 * (q % 5)
        else:
            for b in range(3):
                words[..., b] |= (v >> b & 0x00010001) << 15
    return words


def stage_planes(words: NDArray[np.uint32], layout: TileLayout) -> NDArray[np.uint32]:
    """Words of each lane -> [tiles, stages, planes, 32, 4]."""
    tiles = words.shape[0]
    blocks = layout.stage_inputs // BLOCK
    by_lane = words.reshape(tiles, layout.num_stages, blocks, 32, layout.bits).transpose(0, 1, 3, 2, 4)
    planes = by_lane.reshape(tiles, layout.num_stages, 32, layout.planes, 4)
    return np.ascontiguousarray(planes.transpose(0, 1, 3, 2, 4))


def pack_codes(codes: NDArray[np.uint8], layout: TileLayout) -> NDArray[np.uint32]:
    """Codes u8 [K, 16 * tiles], rows of the tiles side by side -> u32 [tiles, stages, planes, 32, 4]."""
    K, num_rows = codes.shape
    padded = np.zeros((num_rows // ROWS, ROWS, layout.num_stages * layout.stage_inputs), np.uint8)
    padded[:, :, :K] = codes.T.reshape(num_rows // ROWS, ROWS, K)
    return stage_planes(lane_words(padded, layout.bits), layout)


def pack_words(words: NDArray[np.uint32], layout: TileLayout) -> NDArray[np.uint32]:
    """4-bit codes in eights, u32 [K / 8, 16 * tiles] (input 8 i + j in bits 4 j and up of word i), rows of the tiles
    side by side -> u32 [tiles, stages, planes, 32, 4]. Words stay words: no code is ever alone.

    A lane's word j is one half of word ``i`` of row g, its codes at bits 0, 16, 8 and 24, and of row g + 8, 4 bits up.
    """
    num_words, num_rows = words.shape
    tiles, blocks = num_rows // ROWS, layout.num_stages * layout.stage_inputs // BLOCK
    if num_words < blocks * BLOCK // 8:
        words = np.concatenate([words, np.zeros((blocks * BLOCK // 8 - num_words, num_rows), np.uint32)])
    # word 4 b + t of a block; row 8 r + g of a tile
    split = words.reshape(blocks, 2, 4, tiles, 2, 8)
    out = np.empty((tiles, blocks, 8, 4, 2, 2), np.uint32)  # tile, block, g, t, b, half
    low, high = np.uint32(0x0F0F), np.uint32(0x0F0F0000)
    for half in range(2):
        if half == 0:
            spread = (split & low) | ((split << np.uint32(12)) & high)
        else:
            spread = ((split >> np.uint32(16)) & low) | ((split >> np.uint32(4)) & high)
        both = spread[:, :, :, :, 0] | spread[:, :, :, :, 1] << np.uint32(4)  # block, b, t, tile, g
        out[..., half] = both.transpose(3, 0, 4, 2, 1)
    return out.reshape(tiles, layout.num_stages, layout.planes, 32, 4)


def _by_block(values: NDArray, layout: TileLayout) -> NDArray:
    """[G, 16 * tiles] -> [tiles, blocks, 8, units, 2], with zeros for groups that padding adds."""
    G, num_rows = values.shape
    out = np.zeros((num_rows // ROWS, layout.num_blocks * layout.block_units, 8, 2), values.dtype)
    out[:, :G] = values.reshape(G, num_rows // ROWS, 2, 8).transpose(1, 0, 3, 2)
    return out.reshape(num_rows // ROWS, layout.num_blocks, layout.block_units, 8, 2).transpose(0, 1, 3, 2, 4)


def pack_qparams(
    scales: NDArray[np.float16] | NDArray[np.float32], zeros: NDArray[np.uint8], layout: TileLayout
) -> NDArray[np.uint8]:
    """Scales and zero points [G, 16 * tiles] -> u8 [tiles, blocks, bytes of a block].

    Raises ``KernelError`` for scales that the layout's type does not hold exactly.
    """
    block = (*layout.qparams_shape[:2], -1)
    parts = [np.ascontiguousarray(_by_block(_stored_scales(scales, layout), layout)).view(np.uint8).reshape(block)]
    if not layout.symmetric:
        pairs = _by_block(zeros, layout)
        if layout.bits != 8:
            pairs = pairs[..., 0] | pairs[..., 1] << layout.bits
            pairs = pairs | pairs << 4 if layout.bits == 2 else pairs
        parts.append(pairs.reshape(block))
    return np.concatenate(parts, axis=2)


def _stored_scales(scales: NDArray, layout: TileLayout) -> NDArray:
    """As they lie in memory; bf16, which NumPy lacks, as u16."""
    wide = scales.astype(np.float32)
    if layout.scale_dtype == "bf16":
        stored = (wide.view(np.uint32) >> 16).astype("<u2")
        back = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(over="ignore"):
            stored = scales.astype("<f2" if layout.scale_dtype == "f16" else "<f4")
        back = stored.astype(np.float32)
    wrong = back != wide
    if wrong.any():
        raise KernelError(f"scale {float(wide[wrong][0])!r}: {layout.scale_dtype} does not hold it exactly")
    return stored


def is_symmetric(zeros: NDArray[np.uint8], bits: int) -> bool:
    return bool((zeros == 1 << (bits - 1)).all())


def matrix_layout(parts: Sequence[QuantizedMatrix], rows: NDArray[np.int64]) -> TileLayout:
    """Layout of matrices side by side along N, in the order that ``rows`` gives to their outputs."""
    first = parts[0]
    for part in parts[1:]:
        found, expected = ((matrix.bits, matrix.K, matrix.group_size, matrix.scale_dtype) for matrix in (part, first))
        if found != expected:
            raise KernelError(
                f"matrices of one launch must agree in bits, K, group size and type of scales: {expected} and {found}"
            )
    symmetric = all(is_symmetric(part.zeros, part.bits) for part in parts)
    num_rows = int(np.flatnonzero(rows >= 0)[-1]) + 1
    return TileLayout(first.bits, first.K, num_rows, first.group_size, symmetric, first.scale_dtype)


def pack_matrix(
    parts: Sequence[QuantizedMatrix], rows: NDArray[np.int64] | None = None, layout: TileLayout | None = None
) -> PackedMatrix:
    """Matrices side by side along N -> tiles. ``rows`` [16 * tiles]: the output of each row of the tiles, -1: none.

    ``layout``: decided before, from headers; by default from the matrices, without zeros where they are symmetric.
    Codes are unpacked for 64 tiles at a time. Raises ``KernelError`` for shapes that no kernel takes, for zero points
    beyond the codes' range and for ``rows`` that name no output.
    """
    starts = np.cumsum([0] + [part.N for part in parts])
    rows = natural_rows(int(starts[-1])) if rows is None else rows
    if rows.ndim != 1 or len(rows) % ROWS or rows.max() >= starts[-1] or rows.min() < -1:
        raise KernelError(f"row order of {len(rows)}: expected a multiple of {ROWS} values in -1..{starts[-1] - 1}")
    layout = matrix_layout(parts, rows) if layout is None else layout
    for part in parts:
        if part.zeros.max(initial=0) >= 1 << part.bits:
            raise KernelError(f"zero point {part.zeros.max()}: expected less than {1 << part.bits}")
    codes = np.empty(layout.codes_shape, np.uint32)
    for tile in range(0, layout.num_tiles, TILES_AT_ONCE):
        stop = min(tile + TILES_AT_ONCE, layout.num_tiles)
        wanted = rows[tile * ROWS : stop * ROWS]
        if layout.bits == 4:
            codes[tile:stop] = pack_words(_gather_words(parts, starts, wanted), layout)
        else:
            codes[tile:stop] = pack_codes(_gather_codes(parts, starts, wanted), layout)

    def gather(values: NDArray) -> NDArray:  # [..., N] by output -> by row of the tiles
        return np.where(rows >= 0, values[..., rows], values.dtype.type(0))

    bias = None
    if any(part.bias is not None for part in parts):
        zero = [np.zeros(part.N, np.float32) if part.bias is None else part.bias.astype(np.float32) for part in parts]
        bias = gather(np.concatenate(zero))
    scales, zeros = (gather(np.concatenate([getattr(part, name) for part in parts], axis=1)) for name in _QPARAMS)
    return PackedMatrix(layout, codes, pack_qparams(scales, zeros, layout), bias)


def _gather_words(parts: Sequence[QuantizedMatrix], starts: NDArray, rows: NDArray) -> NDArray[np.uint32]:
    """4-bit codes of outputs ``rows`` in eights along K, u32 [K / 8, len(rows)]."""
    if len(parts) == 1 and parts[0].read_eights is not None and rows[0] >= 0 and (np.diff(rows) == 1).all():
        return parts[0].read_eights()[:, rows[0] : rows[-1] + 1]
    words = np.zeros((parts[0].K // 8, len(rows)), np.uint32)
    for part, start in zip(parts, starts, strict=False):
        here = np.flatnonzero((rows >= start) & (rows < start + part.N))
        if not len(here):
            continue
        wanted = rows[here] - start
        low, high = int(wanted.min()), int(wanted.max()) + 1
        found = part.read_eights()[:, low:high] if part.read_eights is not None else _eights(part.codes(low, high))
        words[:, here] = found[:, wanted - low]
    return words


def _eights(codes: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """u8 [K, n] -> u32 [K / 8, n], as GPTQ files have them."""
    words = np.zeros((codes.shape[0] // 8, codes.shape[1]), np.uint32)
    for j in range(8):
        words |= codes[j::8].astype(np.uint32) << np.uint32(4 * j)
    return words


def _gather_codes(parts: Sequence[QuantizedMatrix], starts: NDArray, rows: NDArray) -> NDArray[np.uint8]:
    """Codes u8 [K, len(rows)] of outputs ``rows``: each part is read as one block from its first to its last output."""
    codes = np.zeros((parts[0].K, len(rows)), np.uint8)
    for part, start in zip(parts, starts, strict=False):
        here = np.flatnonzero((rows >= start) & (rows < start + part.N))
        if len(here):
            wanted = rows[here] - start
            low, high = int(wanted.min()), int(wanted.max()) + 1
            codes[:, here] = part.codes(low, high)[:, wanted - low]
    return codes
