"""How the CPU's own kernels hold a quantized linear: blocks of 64 output columns, the codes as GPTQ packs them.

A block is a row of records, one after another; a record holds ``rows`` inputs of 64 columns:

    codes   [words][64] u32; word i of a column holds the codes of ``32 / bits`` inputs in a row, as in the checkpoint
    scales  [64] in the file's type
    zeros   [64] u8; left out if all are 2**(bits - 1)

At 2, 4 and 8 bits the words are the checkpoint's own: packing is a strided copy. At 3 bits, where codes straddle words,
32 inputs are three words: two with the low two bits of 16 inputs each, packed as at 2 bits, then one with the highest
bits: that of input 16 a + 4 b + j is bit 8 b + 4 a + j (a 0..1, b 0..3, j 0..3).

A lane of a load is some inputs of one column, which is what a dot product of four bytes takes: no shuffle, and no sum
across lanes. Machines of 16, 8 and 4 lanes read the same bytes. Inputs are in sorted order (act-order). Where groups
do not fill whole records (a shorter last group; a size that is no multiple of ``step``), missing inputs have code 0,
and the activations there are 0 (``source_rows`` says where).

A group that is longer than a record is several records with the same scales and zeros; a record is the unit in which
activations are quantized, and 128 inputs keep every integer sum within 32 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from exl.layout.fields import DTYPE_BYTES, align_up

COLUMNS = 64  # of a block
MAX_ROWS = 128  # inputs of a record


@dataclass(frozen=True)
class ColumnLayout:
    """Sizes and places, from shapes alone. ``group_size`` K: one group. ``symmetric``: without zeros."""

    bits: int
    K: int
    N: int
    group_size: int
    symmetric: bool = False
    scale_dtype: str = "f16"  # or "bf16", "f32"
    code_kind: str = "int"  # or "fp4", as ``exl.formats.matrix.QuantizedMatrix`` says: they lie as others of 4 bits do

    @property
    def step(self) -> int:
        """Inputs in a row that fill whole words of any width and a vector of activations."""
        return 32 if self.bits == 3 else 16

    @cached_property
    def rows(self) -> int:
        """Inputs of a record: the largest multiple of ``step``, 128 at most, that divides a padded group."""
        steps = align_up(self.group_size, self.step) // self.step
        most = MAX_ROWS // self.step
        return self.step * max(count for count in range(1, most + 1) if steps % count == 0)

    @property
    def num_groups(self) -> int:
        return -(-self.K // self.group_size)

    @property
    def records_per_group(self) -> int:
        return align_up(self.group_size, self.step) // self.rows

    @property
    def num_records(self) -> int:
        """Of a block. The last group may be shorter, and then has as many as its inputs need."""
        last = self.K - (self.num_groups - 1) * self.group_size
        return (self.num_groups - 1) * self.records_per_group + -(-last // self.rows)

    @property
    def padded_K(self) -> int:
        return self.num_records * self.rows

    @property
    def padded(self) -> bool:
        return self.padded_K != self.K

    @property
    def num_blocks(self) -> int:
        return -(-self.N // COLUMNS)

    @property
    def words(self) -> int:
        """u32 of a record's column."""
        return self.rows * self.bits // 32

    @property
    def scales_offset(self) -> int:
        return self.words * COLUMNS * 4

    @property
    def zeros_offset(self) -> int:
        return self.scales_offset + COLUMNS * DTYPE_BYTES[self.scale_dtype]

    @property
    def record_bytes(self) -> int:
        return self.zeros_offset + (0 if self.symmetric else COLUMNS)

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.num_records * self.record_bytes

    def source_rows(self) -> NDArray[np.int32]:
        """i32 [padded_K]: which input, in sorted order, each input of the records is; -1: none."""
        found = np.full((self.num_groups, self.records_per_group * self.rows), -1, np.int32)
        for group in range(self.num_groups):
            first = group * self.group_size
            size = min(self.group_size, self.K - first)
            found[group, :size] = np.arange(first, first + size)
        return found.reshape(-1)[: self.padded_K]

    def group_of_record(self) -> NDArray[np.int32]:
        return (np.arange(self.num_records) // self.records_per_group).astype(np.int32)


def activation_bytes(rows: int, parts: int) -> int:
    """One record of one row of quantized activations: ``parts`` times ``rows`` signed bytes, then the step f32, the sum
    of the integers i32, and 8 bytes of nothing. See ``exl/cpu_kernels/quantize.py``."""
    return parts * rows + 16
