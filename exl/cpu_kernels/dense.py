"""Linear layers whose weights are floats: read as they lie in the checkpoint, widened in registers or in a tile.

Slots of a linear, here and in ``linear_f32``: 0 weight, 1 activations f32, 2 out f32, 3 out's stride, 4 K (records of a
quantized weight), 5 rows M, 6 columns N, 7 columns of a chunk (blocks of a quantized weight), 8 bias f32 [N] or 0,
9 residual f32 or 0, 10 residual's stride, 11 scale f32, 12 blocks of a chunk (quantized weights), 13 activations'
stride. Strides are elements from row to row. ``out = x @ weight.T + bias``; with a residual ``residual + scale * out``.

The order of the sum of one element: lane j of 16 sums the products of inputs j, 16 + j, 32 + j, ... with fma, and lanes
are added by halves. Every tile keeps to it, so a row's bits depend on nothing but that row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import F16, F32, I16, I32, LANES, Kernel, Var, vec
from exl.cpu_kernels.kernel import KernelSpec
from exl.layout.fields import DTYPE_BYTES

_COLUMNS = 4  # of a tile
_AHEAD = 2048  # bytes of a column that are asked for before they are read
_LINE = 64


@dataclass(frozen=True)
class DenseRow(KernelSpec):
    """``out = x @ weight.T``, one row after another, at the speed of memory for one row. Slots: see the module.

    weight [N][K] of ``dtype`` "f32", "f16" or "bf16". Chunk: slot 7's number of columns.
    """

    dtype: str

    @property
    def name(self) -> str:
        return f"dense_row_{self.dtype}"

    def emit(self, k: Kernel) -> None:
        weight, x, K, M = k.pointer(0), k.pointer(1), k.size(4), k.size(5)
        x_stride = k.size(13)
        start, stop = chunk_columns(k)
        with k.loop(stop, start, _COLUMNS) as first:
            columns = _column_pointers(k, weight, first, stop, K, self.dtype)
            with k.loop(M) as row:
                accs = [k.var(k.splat(0.0)) for _ in range(_COLUMNS)]
                self._sum(k, columns, k.at(x, k.mul(4, k.mul(row, x_stride))), accs)
                y = totals(k, [acc.get() for acc in accs])
                finish(k, y, row, first, k.b.sub(stop, first))

    def _sum(self, k: Kernel, columns: Sequence[ir.Value], x: ir.Value, accs: Sequence[Var]) -> None:
        K, size = k.size(4), DTYPE_BYTES[self.dtype]
        per_line = _LINE // size
        lines = k.b.and_(K, k.n(-per_line))
        with k.loop(lines, step=per_line) as i:
            ahead = _ahead(k, i, K, size)
            for column in columns:
                k.prefetch(column, ahead)
            for part in range(0, per_line, LANES):
                _accumulate(k, columns, x, accs, k.add(i, part), self.dtype)
        full = k.b.and_(K, k.n(-LANES))
        with k.loop(full, lines, LANES) as i:
            _accumulate(k, columns, x, accs, i, self.dtype)
        with k.loop(K, full, LANES) as i:
            count = k.b.sub(K, i)
            value = k.load_first(vec(F32), count, x, k.mul(4, i))
            for column, acc in zip(columns, accs, strict=True):
                acc.set(k.fma(widen_first(k, self.dtype, count, column, k.mul(size, i)), value, acc.get()))


@dataclass(frozen=True)
class DenseRows(KernelSpec):
    """``out = x @ weight.T`` for more rows, at the speed of arithmetic. Slots, weight and chunks as ``DenseRow``'s.

    ``tile``: rows that are computed together (``row_tile``). A tile is ``tile`` rows and 4 columns, whose sums lie in
    registers: vectors of 16 lanes where the machine has them, else the lower 8 lanes and then the upper 8. Inputs are
    taken in blocks for which the tile's weights, as f32, stay in the nearest cache; between blocks sums are in memory.
    """

    dtype: str
    tile: int

    K_BLOCK = 768
    TILES = 12  # of rows, for one conversion of the weights

    @property
    def name(self) -> str:
        return f"dense_rows_{self.dtype}_{self.tile}"

    def emit(self, k: Kernel) -> None:
        weight, K, M = k.pointer(0), k.size(4), k.size(5)
        start, stop = chunk_columns(k)
        tile_bytes = self.tile * _COLUMNS * _LINE
        wide, sums = k.memory(self.K_BLOCK * _COLUMNS * 4), k.memory(self.TILES * tile_bytes)
        rows = self.TILES * self.tile
        with k.loop(M, step=rows) as row, k.loop(stop, start, _COLUMNS) as first:
            columns = _column_pointers(k, weight, first, stop, K, self.dtype)
            row_stop = k.smaller(M, k.add(row, rows))
            cleared = k.smaller(rows, k.add(k.b.sub(row_stop, row), self.tile - 1))
            with k.loop(k.mul(_COLUMNS * _LINE, cleared), step=_LINE) as i:
                k.store(k.splat(0.0), sums, i, _LINE)
            with k.loop(K, step=self.K_BLOCK) as i:
                self._widen(k, columns, i, wide)
                with k.loop(row_stop, row, self.tile) as tile_row:
                    tile_sums = k.at(sums, k.mul(_COLUMNS * _LINE, k.b.sub(tile_row, row)))
                    self._tile(k, tile_row, i, wide, tile_sums)
            with k.loop(row_stop, row) as r:
                accs = k.at(sums, k.mul(_COLUMNS * _LINE, k.b.sub(r, row)))
                y = totals(k, [k.load(vec(F32), accs, _LINE * c, _LINE) for c in range(_COLUMNS)])
                finish(k, y, r, first, k.b.sub(stop, first))

    def _widen(self, k: Kernel, columns: Sequence[ir.Value], first: ir.Value, wide: ir.Value) -> None:
        """A block of the columns' inputs -> f32 [inputs / 16][columns][16], zeros behind the last."""
        K, size = k.size(4), DTYPE_BYTES[self.dtype]
        stop = k.smaller(K, k.add(first, self.K_BLOCK))
        full = k.b.and_(stop, k.n(-LANES))
        with k.loop(full, first, LANES) as i:
            out, ahead = k.mul(4 * _COLUMNS, k.b.sub(i, first)), _ahead(k, i, K, size)
            for c, column in enumerate(columns):
                k.prefetch(column, ahead)
                k.store(k.widen(self.dtype, LANES, column, k.mul(size, i)), wide, k.add(out, _LINE * c), _LINE)
        with k.loop(stop, full, LANES) as i:
            out, count = k.mul(4 * _COLUMNS, k.b.sub(i, first)), k.b.sub(stop, i)
            for c, column in enumerate(columns):
                value = widen_first(k, self.dtype, count, column, k.mul(size, i))
                k.store(value, wide, k.add(out, _LINE * c), _LINE)

    def _tile(self, k: Kernel, row: ir.Value, first: ir.Value, wide: ir.Value, sums: ir.Value) -> None:
        """Adds a block of inputs to the sums of a tile. Rows behind the last are the last again."""
        K, last, x, x_stride = k.size(4), k.b.sub(k.size(5), k.n(1)), k.pointer(1), k.size(13)
        rows = [
            k.at(x, k.mul(4, k.add(k.mul(k.smaller(k.add(row, r), last), x_stride), first))) for r in range(self.tile)
        ]
        count = k.smaller(k.b.sub(K, first), self.K_BLOCK)
        full = k.b.and_(count, k.n(-LANES))
        lanes = LANES if wide_registers(k) else LANES // 2
        for part in range(0, LANES, lanes):
            places = [(r, c, _LINE * (r * _COLUMNS + c) + 4 * part) for r in range(self.tile) for c in range(_COLUMNS)]
            accs = {(r, c): k.var(k.load(vec(F32, lanes), sums, place, 4 * lanes)) for r, c, place in places}
            with k.loop(full, step=LANES) as i:
                offset = k.mul(4, k.add(i, part))
                self._add(k, [k.load(vec(F32, lanes), row, offset) for row in rows], i, part, wide, accs)
            with k.loop(count, full, LANES) as i:
                offset, left = k.mul(4, k.add(i, part)), k.b.sub(k.b.sub(count, i), k.n(part))
                self._add(k, [k.load_first(vec(F32, lanes), left, row, offset) for row in rows], i, part, wide, accs)
            for r, c, place in places:
                k.store(accs[r, c].get(), sums, place, 4 * lanes)

    def _add(self, k: Kernel, values: list[ir.Value], i: ir.Value, part: int, wide: ir.Value, accs: dict) -> None:
        """One vector of each row (``values``) times one of each column, of which one at a time is in a register."""
        for c in range(_COLUMNS):
            place = k.add(k.mul(4 * _COLUMNS, i), _LINE * c + 4 * part)
            column = k.load(values[0].type, wide, place, 4 * values[0].type.count)
            for r, value in enumerate(values):
                accs[r, c].set(k.fma(column, value, accs[r, c].get()))


def wide_registers(k: Kernel) -> bool:
    """Whether a vector of 16 lanes is one register, of 32."""
    return k.isa == "avx512vnni"


def row_tile(M: int, isa: str) -> int:
    """How many of ``M`` rows, 2 or more, a tile takes: few rows computed in vain, then large tiles."""
    tiles = (6, 4, 2) if isa == "avx512vnni" else (3, 2)
    return min(tiles, key=lambda tile: -(-M // tile) * (tile + 1))


def dense_kernel(dtype: str, M: int, isa: str) -> KernelSpec:
    """The kernel for a dense linear of ``M`` rows."""
    return DenseRow(dtype) if M == 1 else DenseRows(dtype, row_tile(M, isa))


def chunk_columns(k: Kernel) -> tuple[ir.Value, ir.Value]:
    """The chunk's first column and its end."""
    span = k.size(7)
    start = k.mul(k.chunk, span)
    return start, k.smaller(k.size(6), k.add(start, span))


def finish(k: Kernel, y: ir.Value, row: ir.Value, column: ir.Value, count: ir.Value) -> None:
    """Bias, residual and scale, then stores: the first ``count`` lanes of ``y``, columns from ``column`` on."""
    with k.b.if_else(k.b.icmp_signed(">=", count, k.n(y.type.count))) as (whole, some):
        with whole:
            _finish(k, y, row, column, None)
        with some:
            _finish(k, y, row, column, count)


def _finish(k: Kernel, y: ir.Value, row: ir.Value, column: ir.Value, count: ir.Value | None) -> None:
    """``count`` None: all lanes."""
    b, offset = k.b, k.mul(4, column)

    def load(pointer: ir.Value, offset: ir.Value) -> ir.Value:
        return k.load(y.type, pointer, offset) if count is None else k.load_first(y.type, count, pointer, offset)

    result = k.var(y)
    with b.if_then(b.icmp_signed("!=", k.size(8), k.n(0))):
        result.set(b.fadd(result.get(), load(k.pointer(8), offset)))
    with b.if_then(b.icmp_signed("!=", k.size(9), k.n(0))):
        h = load(k.pointer(9), k.add(k.mul(4, k.mul(row, k.size(10))), offset))
        result.set(k.fma(k.splat(k.number(11), y.type), result.get(), h))
    place = k.add(k.mul(4, k.mul(row, k.size(3))), offset)
    if count is None:
        k.store(result.get(), k.pointer(2), place)
    else:
        k.store_first(result.get(), count, k.pointer(2), place)


def totals(k: Kernel, vectors: Sequence[ir.Value]) -> ir.Value:
    """Each vector's ``k.total`` by addition, one a lane. A power of two of vectors, which share their shuffles."""
    segments, lanes = 1, vectors[0].type.count
    while lanes > 1:
        half = lanes // 2
        low = [lanes * s + i for s in range(segments) for i in range(half)]
        high = [i + half for i in low]
        if len(vectors) > 1:
            width = segments * lanes
            low, high = low + [i + width for i in low], high + [i + width for i in high]
            pairs, segments = list(zip(vectors[::2], vectors[1::2], strict=True)), 2 * segments
        else:
            pairs = [(vectors[0], vectors[0])]
        vectors = [k.b.fadd(k.shuffle(a, b, low), k.shuffle(a, b, high)) for a, b in pairs]
        lanes = half
    return vectors[0]


def widen_first(k: Kernel, dtype: str, count: ir.Value, pointer: ir.Value, offset: ir.Value) -> ir.Value:
    """``Kernel.widen`` of the first ``count`` of 16 lanes; the others are zero and their memory is not touched."""
    if dtype == "f32":
        return k.load_first(vec(F32), count, pointer, offset)
    bits = k.load_first(vec(I16), count, pointer, offset)
    if dtype == "f16":
        return k.b.fpext(k.b.bitcast(bits, vec(F16)), vec(F32))
    return k.b.bitcast(k.b.shl(k.b.zext(bits, vec(I32)), k.splat(16, vec(I32))), vec(F32))


def _accumulate(
    k: Kernel, columns: Sequence[ir.Value], x: ir.Value, accs: Sequence[Var], i: ir.Value, dtype: str
) -> None:
    value = k.load(vec(F32), x, k.mul(4, i))
    for column, acc in zip(columns, accs, strict=True):
        acc.set(k.fma(k.widen(dtype, LANES, column, k.mul(DTYPE_BYTES[dtype], i)), value, acc.get()))


def _column_pointers(
    k: Kernel, weight: ir.Value, first: ir.Value, stop: ir.Value, K: ir.Value, dtype: str
) -> list[ir.Value]:
    """Of a tile's columns; those behind the last are the last again."""
    last = k.b.sub(stop, k.n(1))
    numbers = [k.smaller(k.add(first, c), last) for c in range(_COLUMNS)]
    return [k.at(weight, k.mul(DTYPE_BYTES[dtype], k.mul(number, K))) for number in numbers]


def _ahead(k: Kernel, i: ir.Value, K: ir.Value, size: int) -> ir.Value:
    """Offset in a column of what is read some time after input ``i``: behind a column's end, of the next tile's."""
    there = k.add(i, _AHEAD // size)
    beyond = k.b.icmp_signed(">=", there, K)
    return k.mul(size, k.b.select(beyond, k.add(there, k.mul(_COLUMNS - 1, K)), there))
