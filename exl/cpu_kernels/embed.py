"""Rows of an embedding as the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from exl.cpu_kernels.ir import I32, I64, Kernel
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.vectors import Part, each_part, load_part, row_of, store_part
from exl.layout.fields import DTYPE_BYTES


@dataclass(frozen=True)
class Embed(KernelSpec):
    """out = scale * table[id], one rounding.

    ``dtype``: "f32", "f16" or "bf16". Slots: 0 table [V][width], 1 ids i32 [T], all from 0 to V - 1, 2 out f32,
    3 out's stride, 4 width, 5 scale f32. Sizes in elements. A chunk is a row of out.
    """

    dtype: str

    @property
    def name(self) -> str:
        return f"embed_{self.dtype}"

    def emit(self, k: Kernel) -> None:
        width, scale, out = k.size(4), k.splat(k.number(5)), row_of(k, k.pointer(2), k.chunk, k.size(3))
        token = k.b.sext(k.load(I32, k.pointer(1), k.mul(k.chunk, 4)), I64)
        row = k.at(k.pointer(0), k.mul(k.mul(token, width), DTYPE_BYTES[self.dtype]))

        def body(part: Part) -> None:
            store_part(k, k.b.fmul(load_part(k, row, part, self.dtype), scale), out, part)

        each_part(k, width, body)
