"""Quantized linears in integers: 2, 3, 4 and 8 bits, weights as ``exl.layout.columns`` holds them.

A row's result, over the records in their order, from y = 0:

    I = sum code * q          exact, in 32 bits; of two parts 256 * high + low
    y = fma(f32(I - zero * X), scale * d, y)

with q, d and X of ``exl.cpu_kernels.quantize``; then y + bias, and fma(slot 11, y, residual). Integer sums have no
order, so every kind, tile and instruction set gives the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from llvmlite import binding as llvm
from llvmlite import ir

from exl.cpu_kernels.ir import F32, I8, I32, I64, LANES, Kernel, vec
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.linear_codes import FP4_ZERO, ByteSource, CodeForm, WordSource, code_form
from exl.cpu_kernels.linear_end import ROW_BLOCK, each_block, finish_block
from exl.cpu_kernels.linear_sums import Tile, integer_sums
from exl.cpu_kernels.quantize import ActivationForm, form_of
from exl.layout.columns import COLUMNS, ColumnLayout
from exl.layout.fields import DTYPE_BYTES

MOST_ROWS = 32  # of "rows"
_PANEL_FROM = {"avx512vnni": 33}  # rows from which "panel" is quicker; on other machines:
_PANEL_FROM_ELSEWHERE = 17
_AHEAD = 4096  # bytes that are asked for ahead, about

# Tiles (rows, vectors) by kind and parts, largest first: what fits in the registers, as measured where it could be.
_TILES = {
    "avx512vnni": {  # 32 registers of 16 lanes
        "row": (((1, 4),), ((1, 4),)),
        "rows": (((4, 4), (2, 4), (1, 4)), ((6, 2), (2, 4), (1, 4))),
        "panel": (((4, 4), (1, 4)), ((4, 4), (1, 4))),
    },
    "avx2": {  # 16 of 8
        "row": (((1, 8),), ((1, 8),)),
        "rows": (((4, 2), (2, 2), (1, 4)), ((2, 2), (1, 4))),
        "panel": (((4, 2), (1, 4)), ((2, 2), (1, 4))),
    },
    "avxvnni": {  # 16 of 8, a sum in each
        "row": (((1, 4),), ((1, 4),)),
        "rows": (((4, 2), (2, 2), (1, 4)), ((2, 2), (1, 4))),
        "panel": (((4, 2), (1, 4)), ((4, 2), (1, 4))),
    },
}


@dataclass(frozen=True)
class Linear(KernelSpec):
    """``rows``: inputs of a record. ``scale_dtype``: "f16", "bf16" or "f32". ``parts``: of the activations.
    ``code_kind``: as ``ColumnLayout`` has it.
    ``prefetches``: asks for weights ahead of their use; the bits are the same.

    Kinds: "row": M = 1. "rows": M to 32; codes are taken out of words for each few rows. "panel": any M; chunks have
    128 rows, for which the codes of a record are unpacked once, into the nearest cache.

    Slots: 0 weight, 1 records of activations [R][M], 2 out f32, 3 stride of out in elements, 4 R, 5 M, 6 N, 7 blocks of
    64 columns, 8 bias f32 [N] or 0, 9 residual f32 or 0, 10 its stride in elements, 11 f32 scale of what is added to
    the residual, 12 blocks in a chunk. Chunk c: columns chunk c mod ceil(slot 7 / slot 12); "panel": of rows block
    c / ceil(slot 7 / slot 12), too.
    """

    bits: int
    rows: int
    symmetric: bool
    scale_dtype: str
    parts: int
    kind: str
    prefetches: bool = True
    code_kind: str = "int"

    @property
    def name(self) -> str:
        zeros = "symmetric" if self.symmetric else "zeros"
        zeros += "" if self.code_kind == "int" else f"_{self.code_kind}"
        how = f"{self.kind}{'' if self.prefetches else '_plain'}"
        return f"linear_{how}_{self.bits}_{self.rows}_{zeros}_{self.scale_dtype}_{8 * self.parts}"

    @property
    def layout(self) -> ColumnLayout:
        """Of one record."""
        sizes = self.bits, self.rows, COLUMNS, self.rows
        return ColumnLayout(*sizes, self.symmetric, self.scale_dtype, self.code_kind)

    def emit(self, k: Kernel) -> None:
        _Emitter(self, k).chunk()


def linear(layout: ColumnLayout, parts: int, kind: str) -> Linear:
    """The kernel for a linear's weights."""
    prefetches = kind != "row" or _row_prefetches()
    found = layout.bits, layout.rows, layout.symmetric, layout.scale_dtype
    return Linear(*found, parts, kind, prefetches, layout.code_kind)


@functools.cache
def _row_prefetches() -> bool:
    """Whether one row is quicker for it. Zen 4's own prefetching keeps up with one stream: it reads 10 to 15 % more a
    second without. Zen 5 reads 15 to 25 % less. Kernels of a few rows, which read in bursts, need it on Zen 4, too."""
    return llvm.get_host_cpu_name() != "znver4"


def best_kind(isa: str, num_rows: int) -> str:
    """The quickest kind for ``num_rows`` rows, of those that can."""
    if num_rows == 1:
        return "row"
    return "rows" if num_rows < _PANEL_FROM.get(isa, _PANEL_FROM_ELSEWHERE) else "panel"


class _Emitter:
    def __init__(self, spec: Linear, k: Kernel) -> None:
        self.k, self.spec, self.layout = k, spec, spec.layout
        self.form: ActivationForm = form_of(self.layout, spec.parts)
        self.codes: CodeForm = code_form(spec.bits, k.isa, spec.code_kind)
        self.lanes = {"avx512vnni": LANES, "neon": 4}.get(k.isa, 8)
        tiles = _TILES.get(k.isa, _TILES["avxvnni"])[spec.kind][spec.parts - 1]
        together = spec.kind != "panel" or k.isa == "avx2"
        self.tiles = [Tile(rows, vectors, self.lanes, together) for rows, vectors in tiles]
        most = {"row": 1, "rows": MOST_ROWS, "panel": ROW_BLOCK}[spec.kind]
        self.sums = k.memory(4 * COLUMNS * most)  # f32 [rows][64]: the results so far
        self.unpacks = spec.kind == "panel" and spec.bits * len(self.codes.weights) != 8
        self.bytes = k.memory(COLUMNS * spec.rows * len(self.codes.weights)) if self.unpacks else None
        records_ahead = max(1, round(_AHEAD / self.layout.record_bytes)) if spec.prefetches else 0
        self.ahead = self.layout.record_bytes * records_ahead  # the same place of a later record

    def chunk(self) -> None:
        with each_block(self.k, self.spec.kind) as (block, first, count):
            self._block(block, first, count)

    def _block(self, block: ir.Value, first: ir.Value, count: ir.Value) -> None:
        """64 columns of rows ``first`` to ``first + count - 1``."""
        k, num_records = self.k, self.k.size(4)
        num_rows = I64(1) if self.spec.kind == "row" else k.size(5)
        with k.loop(k.mul(count, 4 * COLUMNS), step=64) as i:
            k.store(k.splat(0.0), self.sums, i, 64)
        base = k.at(k.pointer(0), k.mul(k.mul(block, num_records), self.layout.record_bytes))
        with k.loop(num_records) as r:
            record = k.at(base, k.mul(r, self.layout.record_bytes))
            x = k.at(k.pointer(1), k.mul(self.form.num_bytes, k.add(k.mul(r, num_rows), first)))
            self._record(record, x, count)
        finish_block(k, self.sums, block, first, count)

    def _record(self, record: ir.Value, x: ir.Value, count: ir.Value) -> None:
        k = self.k
        if self.unpacks:
            self._unpack(record)
        if self.spec.kind == "row":  # without loops of one turn: LLVM would read the scales before them
            (tile,) = self.tiles
            for column in range(0, COLUMNS, tile.vectors * tile.lanes):
                self._tile(record, x, I64(column), self.sums, tile)
            return
        start = I64(0)
        for tile in self.tiles:
            stop = k.b.sub(count, k.b.srem(k.b.sub(count, start), I64(tile.rows)))
            with k.loop(stop, start, tile.rows) as row, k.loop(COLUMNS, step=tile.vectors * tile.lanes) as column:
                xs = k.at(x, k.mul(row, self.form.num_bytes))
                self._tile(record, xs, column, k.at(self.sums, k.mul(row, 4 * COLUMNS)), tile)
            start = stop

    def _unpack(self, record: ir.Value) -> None:
        """All codes of a record, as ``ByteSource`` takes them."""
        k = self.k
        source = WordSource(self.codes, record, self.ahead)
        inputs, columns = max(16, self.codes.inputs), list(range(0, COLUMNS, LANES))
        planes = len(self.codes.weights)
        with k.loop(self.spec.rows, step=inputs) as i:
            to = k.at(self.bytes, k.mul(i, COLUMNS * planes))
            for step, codes in enumerate(source.steps(k, i, inputs, columns, LANES)):
                for plane, vectors in enumerate(codes):
                    for column, values in zip(columns, vectors, strict=True):
                        k.store(values, to, 4 * ((step * planes + plane) * COLUMNS + column), 64)

    def _tile(self, record: ir.Value, x: ir.Value, column: ir.Value, sums: ir.Value, tile: Tile) -> None:
        """Adds a record's part to some rows' and columns' results."""
        k, b = self.k, self.k.b
        fv, iv, offset = vec(F32, self.lanes), vec(I32, self.lanes), k.mul(4, column)
        if self.spec.kind == "panel":
            source = ByteSource(self.codes, k.at(self.bytes if self.unpacks else record, offset))
        else:
            source = WordSource(self.codes, k.at(record, offset), self.ahead)

        found = integer_sums(k, source, x, self.form, tile)
        k.barrier()  # or LLVM reads scales before the codes, where loops let it
        for v in range(tile.vectors):
            # Read behind the codes, as it lies: reads that jump confuse the processor's own prefetching.
            scale, zeros = self._side(record, k.add(column, v * self.lanes))
            for row in range(tile.rows):
                step = k.splat(k.load(F32, x, row * self.form.num_bytes + self.form.step_offset), fv)
                total = k.splat(k.load(I32, x, row * self.form.num_bytes + self.form.step_offset + 4), iv)
                value = b.sitofp(b.sub(found[row][v], b.mul(zeros, total)), fv)
                where = k.at(sums, k.add(offset, 4 * (row * COLUMNS + v * self.lanes)))
                k.store(k.fma(value, b.fmul(scale, step), k.load(fv, where)), where)

    def _side(self, record: ir.Value, column: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Scales f32 and zeros i32 of a vector of columns."""
        k, layout = self.k, self.layout
        scale_bytes = DTYPE_BYTES[layout.scale_dtype]
        scales = k.at(record, k.add(layout.scales_offset, k.mul(column, scale_bytes)))
        if self.ahead:
            k.prefetch(scales, self.ahead)
        scale = k.widen(layout.scale_dtype, self.lanes, scales)
        if layout.symmetric:
            zero = FP4_ZERO if layout.code_kind == "fp4" else 1 << (layout.bits - 1)
            return scale, k.splat(zero, vec(I32, self.lanes))
        zeros = k.load(vec(I8, self.lanes), record, k.add(layout.zeros_offset, column))
        return scale, k.b.zext(zeros, vec(I32, self.lanes))
