"""RoPE's cos and sin for the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from exl.cpu_kernels.ir import F32, I32, I64, Kernel
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.math import cos_sin
from exl.cpu_kernels.vectors import Part, each_part, load_part, row_of, store_part


@dataclass(frozen=True)
class RopeTables(KernelSpec):
    """cos and sin of ``position * frequency``, times a factor; the angle is rounded to f32, as in transformers.

    Slots: 0 positions i32 [T], below 2^24 (larger ones round), 1 frequencies f32 [n][half], 2 cos f32 [T][half], 3 sin
    f32 [T][half], 4 half, 5 factor f32, 6 T, 7 rows a chunk, 8 i32 [T]: each row's row of frequencies (not read unless
    ``chosen``: all rows take the first). Chunk c is the rows from c times slot 7 on.
    """

    chosen: bool = False

    @property
    def name(self) -> str:
        return f"rope_tables{'_chosen' if self.chosen else ''}"

    def emit(self, k: Kernel) -> None:
        b, half, factor = k.b, k.size(4), k.splat(k.number(5))
        first = k.mul(k.chunk, k.size(7))
        with k.loop(k.smaller(k.add(first, k.size(7)), k.size(6)), first) as t:
            position = k.splat(b.sitofp(k.load(I32, k.pointer(0), k.mul(t, 4)), F32))
            which = b.sext(k.load(I32, k.pointer(8), k.mul(t, 4)), I64) if self.chosen else I64(0)
            frequencies, cos, sin = (
                row_of(k, k.pointer(slot), row, half) for slot, row in ((1, which), (2, t), (3, t))
            )

            def body(part: Part, position=position, frequencies=frequencies, cos=cos, sin=sin) -> None:
                angle = b.fmul(position, load_part(k, frequencies, part))
                for value, out in zip(cos_sin(k, angle), (cos, sin), strict=True):
                    store_part(k, b.fmul(value, factor), out, part)

            each_part(k, half, body)
