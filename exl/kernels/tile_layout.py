"""The 16 x 64 tile: how quantized weights lie in device memory, as a pure function of shapes.

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

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exl.errors import KernelError

ROWS = 16  # output rows of a tile
BLOCK = 64  # inputs that four mma take
STAGE_INPUTS = {2: 256, 3: 256, 4: 128, 8: 128}
UNIT_GROUPS = (32, 64, 128)  # groups that a kernel is compiled for; longer ones are counted at run time


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
