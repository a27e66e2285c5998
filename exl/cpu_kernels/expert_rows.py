"""Rows on their way to experts and back: copied for each expert, added with their weights, and a shared expert's."""

from __future__ import annotations

from dataclasses import dataclass

from exl.cpu_kernels.ir import F32, I32, I64, Kernel
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.math import times_sigmoid
from exl.cpu_kernels.plan_experts import ENTRY
from exl.cpu_kernels.vectors import Part, columns_of_chunk, each_part, load_part, row_of, store_part


@dataclass(frozen=True)
class GatherPairs(KernelSpec):
    """out[p] = x[row of pair p], for the pairs of a wave.

    Slots: 0 x f32, 1 its stride in elements, 2 pairs of the wave, as ``plan_experts`` has them, 3 out f32 [P][C], 4 C.
    Chunk: a pair.
    """

    @property
    def name(self) -> str:
        return "gather_pairs"

    def emit(self, k: Kernel) -> None:
        b, width = k.b, k.size(4)
        row = b.sext(k.load(I32, k.pointer(2), k.mul(ENTRY, k.chunk)), I64)
        with b.if_then(b.icmp_signed(">=", row, I64(0))):
            x, out = row_of(k, k.pointer(0), row, k.size(1)), row_of(k, k.pointer(3), k.chunk, width)
            each_part(k, width, lambda part: store_part(k, load_part(k, x, part), out, part))


@dataclass(frozen=True)
class AddPairs(KernelSpec):
    """out = h; then, for those of a row's experts that are in the wave, one after another: out = weight * y + out,
    rounded once.

    Slots: 0 y f32 [P][C], 1 places i32 [T][k] as ``plan_experts`` has them, 2 weights f32 [T][k], 3 h f32, 4 its
    stride, 5 out f32, 6 its stride, 7 C, 8 k, 9 the wave's first pair, 10 the pair behind its last, 11 columns a chunk,
    12 chunks a row. Strides in elements. Chunk c: columns of number c mod slot 12 of row c / slot 12. ``out`` may be h.
    """

    @property
    def name(self) -> str:
        return "add_pairs"

    def emit(self, k: Kernel) -> None:
        b, width, count = k.b, k.size(7), k.size(8)
        row, start, stop = columns_of_chunk(k, k.size(11), k.size(12), width)
        h, out = row_of(k, k.pointer(3), row, k.size(4)), row_of(k, k.pointer(5), row, k.size(6))
        offset = k.mul(4, k.mul(row, count))
        places, weights = k.at(k.pointer(1), offset), k.at(k.pointer(2), offset)

        def body(part: Part) -> None:
            total = k.var(load_part(k, h, part))
            with k.loop(count) as j:
                place = b.sext(k.load(I32, places, k.mul(4, j)), I64)
                inside = b.and_(b.icmp_signed(">=", place, k.size(9)), b.icmp_signed("<", place, k.size(10)))
                with b.if_then(inside):
                    y = row_of(k, k.pointer(0), b.sub(place, k.size(9)), width)
                    weight = k.splat(k.load(F32, weights, k.mul(4, j)))
                    total.set(k.fma(weight, load_part(k, y, part), total.get()))
            store_part(k, total.get(), out, part)

        each_part(k, stop, body, start)


@dataclass(frozen=True)
class AddGatedRows(KernelSpec):
    """out = y / (1 + e^-s) + h, with a number s for each row.

    Slots: 0 y f32 [T][C], 1 s f32 [T], 2 h f32, 3 its stride, 4 out f32, 5 its stride, 6 C, 7 columns a chunk, 8 chunks
    a row. Strides in elements; chunks as ``AddPairs``'. ``out`` may be h.
    """

    @property
    def name(self) -> str:
        return "add_gated_rows"

    def emit(self, k: Kernel) -> None:
        width = k.size(6)
        row, start, stop = columns_of_chunk(k, k.size(7), k.size(8), width)
        y = row_of(k, k.pointer(0), row, width)
        h, out = row_of(k, k.pointer(2), row, k.size(3)), row_of(k, k.pointer(4), row, k.size(5))
        gate = times_sigmoid(k, k.splat(1.0), k.splat(k.load(F32, k.pointer(1), k.mul(4, row))))

        def body(part: Part) -> None:
            store_part(k, k.fma(gate, load_part(k, y, part), load_part(k, h, part)), out, part)

        each_part(k, stop, body, start)
