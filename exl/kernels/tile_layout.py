"""The 16 x 64 tile: how quantized weights lie in device memory, as pure functions, and the packer for the CPU.

Weights are the A operand of the tensor cores' m16n8k16, activations its B operand. A tile is 16 output rows by 64
inputs; lane ``l = 4 g + t`` of a warp (g 0..7, t 0..3) holds rows g and g + 8. Of every 32 inputs lane t owns
``8t .. 8t+7``; the first mma takes ``8t .. 8t+3`` of them, the second ``8t+4 .. 8t+7``. So 64 inputs are four mma
(``j``), each fed by four pairs of codes: pair ``p`` is row ``g + 8 (p % 2)``, inputs
``32 (j // 2) + 8 t + 4 (j % 2) + 2 (p // 2) + {0, 1}``; the first of a pair lies 16 bits below the second.

A lane's 32-bit words for 64 inputs::

    4 bits   word j           pair p at bits 4p and 4p + 16
    8 bits   word 2j + p // 2 pair p at bits 16 (p % 2) and 16 (p % 2) + 8
    2 bits   word j // 2      pair p at bits 8 (j % 2) + 2p and + 16
    3 bits   16 pairs q = 4j + p in three words: q < 15 at bits 3 (q % 5) and + 16 of word q // 5;
             bit b of pair 15 at bits 15 and 31 of word b

A *stage* is what a kernel's ring holds at a time: 128 inputs (4 and 8 bits) or 256 (2 and 3 bits). The words of a
stage are cut into planes of four: ``codes`` is u32 [tiles][stages][planes][32 lanes][4]. K is padded to whole stages,
N to whole tiles, with zeros; kernels multiply padding with inputs that are zero.

``scales`` is f16 [tiles][groups][8 (g)][2 (row g, row g + 8)]. ``zeros`` is u8 [tiles][groups][8], row g in the low
bits and row g + 8 above (2 bits: both twice; 8 bits: u8 [...][2]); a symmetric matrix stores none.

Example: 4 bits, row 3, input 37. 37 = 32 + 5: t = 0, j = 3, p = 0, second of its pair. Lane 12, word 3, bit 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exl.errors import KernelError
from exl.formats.matrix import QuantizedMatrix

ROWS = 16  # output rows of a tile
BLOCK = 64  # inputs that four mma take
STAGE_INPUTS = {2: 256, 3: 256, 4: 128, 8: 128}
UNIT_GROUPS = (32, 64, 128)  # groups that a kernel is compiled for; longer ones are counted at run time
TILES_AT_ONCE = 64  # that the packer holds unpacked


@dataclass(frozen=True)
class TileLayout:
    """Sizes of one packed matrix, W [K, num_rows]; a pure function of its shape.

    ``group_size`` is 32, 64, a multiple of 128, or K (one group). Raises ``KernelError`` for what no kernel takes.
    """

    bits: int
    K: int
    num_rows: int  # output rows, padding left out: N, or for gate and up interleaved twice the tiles' 8 rows
    group_size: int
    symmetric: bool  # every zero point is 2**(bits - 1), and none are stored

    def __post_init__(self) -> None:
        if self.bits not in STAGE_INPUTS:
            raise KernelError(f"{self.bits} bits: the tile layout has 2, 3, 4 and 8")
        if self.K < 32 or self.K % 32 or self.num_rows < 1:
            raise KernelError(f"matrix [{self.K}, {self.num_rows}]: expected K a multiple of 32 and at least one row")
        if self.group_size < 1 or self.K % self.group_size:
            raise KernelError(f"K {self.K} is not a multiple of the group size {self.group_size}")
        if self.group_size not in (32, 64, self.K) and self.group_size % 128:
            raise KernelError(f"group size {self.group_size}: expected 32, 64, a multiple of 128, or K ({self.K})")

    @property
    def stage_inputs(self) -> int:
        return STAGE_INPUTS[self.bits]

    @property
    def num_stages(self) -> int:
        return -(-self.K // self.stage_inputs)

    @property
    def num_tiles(self) -> int:
        return -(-self.num_rows // ROWS)

    @property
    def num_groups(self) -> int:
        """Groups as stored: padding of K adds some, with scale 0."""
        return -(-self.num_stages * self.stage_inputs // self.group_size)

    @property
    def group_macro(self) -> int:
        """EXL_GROUP: a group size known to the compiler, or 0."""
        return self.group_size if self.group_size in UNIT_GROUPS and self.K % self.group_size == 0 else 0

    @property
    def group_units(self) -> int:
        """Runs of 128 inputs that share a scale, where ``group_macro`` is 0."""
        return -(-self.group_size // 128)

    @property
    def planes(self) -> int:
        """16-byte loads of a lane in one stage."""
        return self.stage_inputs * self.bits * ROWS // 8 // 512

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """u32"""
        return (self.num_tiles, self.num_stages, self.planes, 32, 4)

    @property
    def codes_bytes(self) -> int:
        return self.num_tiles * self.num_stages * self.planes * 512

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """f16"""
        return (self.num_tiles, self.num_groups, 8, 2)

    @property
    def zeros_shape(self) -> tuple[int, ...] | None:
        """u8"""
        if self.symmetric:
            return None
        return (self.num_tiles, self.num_groups, 8, 2) if self.bits == 8 else (self.num_tiles, self.num_groups, 8)


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix in tiles, on the CPU. ``bias`` is f32 [tiles * 16] in the order of the tiles' rows."""

    layout: TileLayout
    codes: NDArray[np.uint32]
    scales: NDArray[np.float16]
    zeros: NDArray[np.uint8] | None
    bias: NDArray[np.float32] | None


def natural_rows(N: int) -> NDArray[np.int64]:
    """Row i of the tiles is output i; -1 is padding."""
    rows = np.full(-(-N // ROWS) * ROWS, -1, np.int64)
    rows[:N] = np.arange(N)
    return rows


def gated_rows(F: int, order: NDArray | None = None) -> NDArray[np.int64]:
    """Gate (outputs 0..F-1) in rows 0..7 and up (outputs F..2F-1) in rows 8..15 of each tile; -1 is padding.

    ``order`` i32 [F]: tile column i computes channel ``order[i]``, so that ``down_proj`` finds its inputs sorted.
    """
    channels = np.full(-(-F // 8) * 8, -1, np.int64)
    channels[:F] = np.arange(F) if order is None else order
    by_tile = channels.reshape(-1, 8)
    return np.concatenate([by_tile, np.where(by_tile < 0, -1, by_tile + F)], axis=1).reshape(-1)


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


def _by_tile(values: NDArray, layout: TileLayout) -> NDArray:
    """[G, 16 * tiles] -> [tiles, groups, 8, 2], with zeros for groups that padding adds."""
    G, num_rows = values.shape
    out = np.zeros((num_rows // ROWS, layout.num_groups, 8, 2), values.dtype)
    out[:, :G] = values.reshape(G, num_rows // ROWS, 2, 8).transpose(1, 0, 3, 2)
    return out


def pack_scales(scales: NDArray[np.float16], layout: TileLayout) -> NDArray[np.float16]:
    """[G, 16 * tiles] -> [tiles, groups, 8, 2]."""
    return _by_tile(scales, layout)


def pack_zeros(zeros: NDArray[np.uint8], layout: TileLayout) -> NDArray[np.uint8]:
    """[G, 16 * tiles] -> [tiles, groups, 8], for 8 bits [tiles, groups, 8, 2]."""
    pairs = _by_tile(zeros, layout)
    if layout.bits == 8:
        return pairs
    low, high = pairs[..., 0], pairs[..., 1]
    both = low | high << {2: 2, 3: 3, 4: 4}[layout.bits]
    return both | both << 4 if layout.bits == 2 else both


def is_symmetric(zeros: NDArray[np.uint8], bits: int) -> bool:
    return bool((zeros == 1 << (bits - 1)).all())


def matrix_layout(parts: Sequence[QuantizedMatrix], rows: NDArray[np.int64]) -> TileLayout:
    """Layout of matrices side by side along N, in the order that ``rows`` gives to their outputs."""
    first = parts[0]
    for part in parts[1:]:
        if (part.bits, part.K, part.group_size) != (first.bits, first.K, first.group_size):
            raise KernelError(
                "matrices of one launch must agree in bits, K and group size: "
                f"{(first.bits, first.K, first.group_size)} and {(part.bits, part.K, part.group_size)}"
            )
    symmetric = all(is_symmetric(part.zeros, part.bits) for part in parts)
    return TileLayout(first.bits, first.K, int(np.flatnonzero(rows >= 0)[-1]) + 1, first.group_size, symmetric)


def pack_matrix(parts: Sequence[QuantizedMatrix], rows: NDArray[np.int64] | None = None) -> PackedMatrix:
    """Matrices side by side along N -> tiles. ``rows`` [16 * tiles]: the output of each row of the tiles, -1: none.

    Codes are unpacked for 64 tiles at a time. Raises ``KernelError`` for shapes that no kernel takes, for zero points
    beyond the codes' range and for ``rows`` that name no output.
    """
    starts = np.cumsum([0] + [part.N for part in parts])
    rows = natural_rows(int(starts[-1])) if rows is None else rows
    if rows.ndim != 1 or len(rows) % ROWS or rows.max() >= starts[-1] or rows.min() < -1:
        raise KernelError(f"row order of {len(rows)}: expected a multiple of {ROWS} values in -1..{starts[-1] - 1}")
    layout = matrix_layout(parts, rows)
    for part in parts:
        if part.zeros.max(initial=0) >= 1 << part.bits:
            raise KernelError(f"zero point {part.zeros.max()}: expected less than {1 << part.bits}")
    codes = np.empty(layout.codes_shape, np.uint32)
    for tile in range(0, layout.num_tiles, TILES_AT_ONCE):
        stop = min(tile + TILES_AT_ONCE, layout.num_tiles)
        codes[tile:stop] = pack_codes(_gather_codes(parts, starts, rows[tile * ROWS : stop * ROWS]), layout)

    def gather(values: NDArray) -> NDArray:  # [..., N] by output -> by row of the tiles
        return np.where(rows >= 0, values[..., rows], values.dtype.type(0))

    bias = None
    if any(part.bias is not None for part in parts):
        zero = [np.zeros(part.N, np.float32) if part.bias is None else part.bias.astype(np.float32) for part in parts]
        bias = gather(np.concatenate(zero))
    scales = pack_scales(gather(np.concatenate([part.scales for part in parts], axis=1)), layout)
    zeros = None
    if not layout.symmetric:
        zeros = pack_zeros(gather(np.concatenate([part.zeros for part in parts], axis=1)), layout)
    return PackedMatrix(layout, codes, scales, zeros, bias)


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
