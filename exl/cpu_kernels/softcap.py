"""What becomes of the head's products before they are logits."""

from __future__ import annotations

from dataclasses import dataclass

from exl.cpu_kernels.ir import Kernel
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.math import tanh
from exl.cpu_kernels.vectors import Part, columns_of_chunk, each_part, load_part, row_of, store_part


@dataclass(frozen=True)
class ScaleLogits(KernelSpec):
    """out = scale * x; if ``capped``, softcap * tanh(scale * x / softcap).

    Slots: 0 x f32, 1 x's stride, 2 out f32, 3 out's stride, 4 width, 5 columns a chunk, 6 chunks a row, 7 scale f32,
    8 softcap f32. Sizes in elements. Chunk c is the columns of number c mod slot 6 of row c / slot 6. ``out`` may be x
    where no chunk is run twice.
    """

    capped: bool

    @property
    def name(self) -> str:
        return f"scale_logits_{'capped' if self.capped else 'plain'}"

    def emit(self, k: Kernel) -> None:
        row, start, stop = columns_of_chunk(k, k.size(5), k.size(6), k.size(4))
        x, out = row_of(k, k.pointer(0), row, k.size(1)), row_of(k, k.pointer(2), row, k.size(3))
        scale, softcap = k.splat(k.number(7)), k.splat(k.number(8))

        def body(part: Part) -> None:
            y = k.b.fmul(load_part(k, x, part), scale)
            if self.capped:
                y = k.b.fmul(tanh(k, k.b.fdiv(y, softcap)), softcap)
            store_part(k, y, out, part)

        each_part(k, stop, body, start)
