"""The one meaning of a weight, whatever file it came from. Lives only while packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# Twice the numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 of e2m1 (OCP Microscaling Formats 1.0, table 5), then the same below 0.
FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class QuantizedMatrix:
    """``W[k, n] = scales[g(k), n] * (code[k, n] - zeros[g(k), n])``, y = x W + bias.

    ``g(k)`` is ``k // group_size`` for rows in *sorted* order: with ``order`` given, sorted row ``i`` is the
    checkpoint's row ``order[i]`` and multiplies ``x[order[i]]``. ``codes`` returns sorted rows.
    A group size of K is one group.

    ``code_kind`` "fp4": codes of 4 bits stand for numbers of the format e2m1 instead, twice as large, which are
    integers: ``W[k, n] = scales[g(k), n] * FP4_VALUES[code[k, n]]``. There are no zeros; ``zeros`` are all 8.
    """

    bits: int  # 2, 3, 4 or 8
    group_size: int
    K: int
    N: int
    scales: NDArray[np.float16] | NDArray[np.float32]  # [G, N], G = ceil(K / group_size): the last may be shorter
    zeros: NDArray[np.uint8]  # [G, N]; true zeros: the file's offset is already applied and masked; 0..2**bits
    order: NDArray[np.int32] | None  # [K]; makes groups contiguous along K; None: they already are
    bias: NDArray | None  # [N]; f16, or f32 where the file has a type that f16 cannot hold
    read_codes: Callable[[int, int], NDArray[np.uint8]] = field(repr=False)
    # The codes as a GPTQ file has them, for packers that turn words into words: u32 [K * bits / 32, N], a column's bit
    # stream along axis 0, rows in the checkpoint's order, whatever ``order`` says.
    read_words: Callable[[], NDArray[np.uint32]] | None = field(default=None, repr=False)
    scale_dtype: str = "f16"  # type that the file has them in and that holds them exactly; f32 arrays: "bf16" or "f32"
    code_kind: str = "int"

    @property
    def num_groups(self) -> int:
        return -(-self.K // self.group_size)

    @property
    def read_eights(self) -> Callable[[], NDArray[np.uint32]] | None:
        """``read_words`` where a word is eight codes of sorted rows: at 4 bits, and where rows are in order already."""
        return self.read_words if self.bits == 4 and self.order is None else None

    def codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Codes of output columns ``start:stop``, u8 [K, stop - start], rows in sorted order.

        Unpacked block by block, so that peak memory is the caller's choice.
        """
        return self.read_codes(start, stop)


@dataclass(frozen=True)
class DenseMatrix:
    """``y = x W + bias`` with ``W`` stored as the file has it: ``rows(start, stop)`` is ``W.T[start:stop]``.

    ``dtype`` is "f32", "f16" or "bf16"; NumPy has no bf16, so its bits come as u16.
    """

    dtype: str
    K: int
    N: int
    bias: NDArray | None  # [N]; f32, f16 or (bf16 bits) u16, by bias_dtype
    bias_dtype: str | None
    read_rows: Callable[[int, int], NDArray] = field(repr=False)
    # All rows into a buffer u8 [N * K * bytes of dtype], block by block and without memory in between.
    read_into: Callable[[NDArray[np.uint8]], None] | None = field(default=None, repr=False)

    def rows(self, start: int, stop: int) -> NDArray:
        """Rows ``start:stop`` of the [N, K] matrix on disk, in the file's type (bf16 as u16)."""
        return self.read_rows(start, stop)
