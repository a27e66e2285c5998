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

``qparams``, scales and zero points, is u8 [tiles][blocks][bytes of a block]. A block serves one stage: its groups of
32, 64 or 128 inputs (*units*) together. Longer groups have a block each, which several stages read. In a block::

    scales   f16, bf16 or f32, as the file has them [8 (g)][units][2 (row g, row g + 8)]
    zeros    u8 [8 (g)][units], row g in the low bits and row g + 8 above (2 bits: both twice; 8 bits: u8 [...][2]);
             a symmetric matrix stores none

A kernel copies a stage's block in one group with its codes, so that both are asked for at the same time, 16 bytes a
lane or, where a block is an odd number of eights, 8. Blocks have an array of their own rather than a place behind each
stage's codes: there 40 bytes would have to become 48, codes would lose their alignment to cache lines, and long groups
would repeat in memory what now repeats in caches alone. So nothing is padded but K, and the last group may be shorter.

Bytes per weight of a 4-bit tile, of which codes are 0.5: groups of 128 take 40 bytes for 16 x 128 weights, 0.0195.

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
LONG_UNIT = 128  # inputs between two uses of a longer group's scale
SCALE_BYTES = {"f16": 2, "bf16": 2, "f32": 4}


@dataclass(frozen=True)
class TileLayout:
    """Sizes of one packed matrix, W [K, num_rows]; a pure function of its shape.

    ``group_size`` is 32, 64, a multiple of 128, or K; if it does not divide K, the last group is shorter.
    Raises ``KernelError`` for what no kernel takes.
    """

    bits: int
    K: int
    num_rows: int  # output rows, padding left out: N, or for gate and up interleaved twice the tiles' 8 rows
    group_size: int
    symmetric: bool  # every zero point is 2**(bits - 1), and none are stored
    scale_dtype: str = "f16"  # or "bf16", "f32"

    def __post_init__(self) -> None:
        if self.bits not in STAGE_INPUTS:
            raise KernelError(f"{self.bits} bits: the tile layout has 2, 3, 4 and 8")
        if self.K < 32 or self.K % 32 or self.num_rows < 1:
            raise KernelError(f"matrix [{self.K}, {self.num_rows}]: expected K a multiple of 32 and at least one row")
        known = self.group_size in (32, 64, self.K) or self.group_size % LONG_UNIT == 0
        if not known or not 1 <= self.group_size <= self.K:
            raise KernelError(f"group size {self.group_size}: expected 32, 64, a multiple of 128, or K ({self.K})")
        if self.scale_dtype not in SCALE_BYTES:
            raise KernelError(f"scales of {self.scale_dtype}: the tile layout has {', '.join(SCALE_BYTES)}")

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
        """Groups as stored: padding of K may add some, with scale 0."""
        return -(-self.num_stages * self.stage_inputs // self.group_size)

    @property
    def group_macro(self) -> int:
        """EXL_GROUP: a group size known to the compiler, or 0."""
        return self.group_size if self.group_size in UNIT_GROUPS else 0

    @property
    def group_units(self) -> int:
        """Runs of 128 inputs that share a scale, if ``group_macro`` is 0."""
        return -(-self.group_size // LONG_UNIT)

    @property
    def macros(self) -> dict[str, int]:
        """Of ``tile.cuh``."""
        return {
            "EXL_BITS": self.bits,
            "EXL_GROUP": self.group_macro,
            "EXL_SYM": int(self.symmetric),
            "EXL_SCALE": list(SCALE_BYTES).index(self.scale_dtype),
        }

    @property
    def planes(self) -> int:
        """16-byte loads per lane and stage."""
        return self.stage_inputs * self.bits * ROWS // 8 // 512

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """u32"""
        return (self.num_tiles, self.num_stages, self.planes, 32, 4)

    @property
    def codes_bytes(self) -> int:
        return self.num_tiles * self.num_stages * self.planes * 512

    @property
    def block_units(self) -> int:
        """Groups in a block of qparams."""
        return self.stage_inputs // self.group_macro if self.group_macro else 1

    @property
    def num_blocks(self) -> int:
        """Blocks per tile."""
        return self.num_stages if self.group_macro else self.num_groups

    @property
    def block_bytes(self) -> int:
        zeros = 0 if self.symmetric else 2 if self.bits == 8 else 1
        return 8 * self.block_units * (2 * SCALE_BYTES[self.scale_dtype] + zeros)

    @property
    def stage_qparam_bytes(self) -> int:
        """Bytes of qparams that a kernel reads per stage of one tile."""
        return self.block_bytes if self.group_macro else self.stage_inputs // LONG_UNIT * self.block_bytes

    @property
    def qparams_shape(self) -> tuple[int, ...]:
        """u8"""
        return (self.num_tiles, self.num_blocks, self.block_bytes)

    @property
    def qparams_bytes(self) -> int:
        return self.num_tiles * self.num_blocks * self.block_bytes


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
