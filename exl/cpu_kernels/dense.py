"""Linear layers whose weights are floats: read as they lie in the checkpoint, widened in registers or in a tile.

Slots of a linear, here and in ``linear_f32``: 0 weight, 1 activations f32, 2 out f32, 3 out's stride, 4 K (records of a
quantized weight), 5 rows M, 6 columns N, 7 columns of a chunk (blocks of a quantized weight), 8 bias f32 [N] or 0,
9 residual f32 or 0, 10 residual's stride, 11 scale f32, 12 blocks of a chunk (quantized weights), 13 activations'
stride. Strides are elements from row to row. ``out = x @ weight.T + bias``; with a residual ``residual + scale * out``.

The order of the sum of one element: in each block of 768 inputs, lane j of 16 sums the products of inputs j, 16 + j,
32 + j, ... with fma; then lanes of blocks are added, block after block, and at last the lanes, by halves. Every tile
keeps to it, so a row's bits depend on nothing but that row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import F32, LANES, Kernel, Var, vec
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.linear_end import finish
from exl.cpu_kernels.vectors import Part, load_part
from exl.layout.fields import DTYPE_BYTES

_COLUMNS = 4  # of a tile
_BLOCK = 768  # inputs that are summed in one chain; as f32, those of a tile's columns stay in the nearest cache
_LINE = 64
_NEAR_BYTES = 20 << 10  # of a tile, that the nearest cache holds beside what is in use, for one row
_AHEAD = 512  # bytes of a column that are asked for out of the second cache before they are read


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
                sums = [k.var(k.splat(0.0)) for _ in range(_COLUMNS)]
                with k.loop(K, step=_BLOCK) as i:
                    accs = self._block(k, columns, k.at(x, k.mul(4, k.mul(row, x_stride))), i)
                    for total, acc in zip(sums, accs, strict=True):
                        total.set(k.b.fadd(total.get(), acc.get()))
                y = totals(k, [total.get() for total in sums])
                finish(k, y, row, first, k.b.sub(stop, first))

    def _block(self, k: Kernel, columns: Sequence[ir.Value], x: ir.Value, first: ir.Value) -> list[Var]:
        """The sums over a block's inputs, of each column."""
        accs = [k.var(k.splat(0.0)) for _ in columns]

        def add(i: ir.Value, count: ir.Value | None) -> None:
            value = load_part(k, x, Part(i, count))
            for column, acc in zip(columns, accs, strict=True):
                acc.set(k.fma(load_part(k, column, Part(i, count), self.dtype), value, acc.get()))

        _each_16(k, self.dtype, columns, first, k.smaller(k.size(4), k.add(first, _BLOCK)), _NEAR_BYTES, add)
        return accs


@dataclass(frozen=True)
class DenseRows(KernelSpec):
    """``out = x @ weight.T`` for more rows, at the speed of arithmetic. Slots, weight and chunks as ``DenseRow``'s.

    ``tile``: rows that are computed together (``row_tile``). A tile is ``tile`` rows and 4 columns, whose sums lie in
    registers: vectors of 16 lanes where the machine has them, else the lower 8 lanes and then the upper 8. Between
    blocks of inputs sums are in memory.
    """

    dtype: str
    tile: int

    TILES = 12  # of rows, for one conversion of the weights

    @property
    def name(self) -> str:
        return f"dense_rows_{self.dtype}_{self.tile}"

    def emit(self, k: Kernel) -> None:
        weight, K, M = k.pointer(0), k.size(4), k.size(5)
        start, stop = chunk_columns(k)
        tile_bytes = self.tile * _COLUMNS * _LINE
        wide, sums = k.memory(_BLOCK * _COLUMNS * 4), k.memory(self.TILES * tile_bytes)
        rows = self.TILES * self.tile
        with k.loop(M, step=rows) as row, k.loop(stop, start, _COLUMNS) as first:
            columns = _column_pointers(k, weight, first, stop, K, self.dtype)
            row_stop = k.smaller(M, k.add(row, rows))
            cleared = k.smaller(rows, k.add(k.b.sub(row_stop, row), self.tile - 1))
            with k.loop(k.mul(_COLUMNS * _LINE, cleared), step=_LINE) as i:
                k.store(k.splat(0.0), sums, i, _LINE)
            with k.loop(K, step=_BLOCK) as i:
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

        def store(i: ir.Value, count: ir.Value | None) -> None:
            out = k.mul(4 * _COLUMNS, k.b.sub(i, first))
            for c, column in enumerate(columns):
                k.store(load_part(k, column, Part(i, count), self.dtype), wide, k.add(out, _LINE * c), _LINE)

        _each_16(k, self.dtype, columns, first, k.smaller(k.size(4), k.add(first, _BLOCK)), 0, store)

    def _tile(self, k: Kernel, row: ir.Value, first: ir.Value, wide: ir.Value, sums: ir.Value) -> None:
        """Adds a block of inputs to the sums of a tile. Rows behind the last are the last again."""
        K, last, x, x_stride = k.size(4), k.b.sub(k.size(5), k.n(1)), k.pointer(1), k.size(13)
        rows = [
            k.at(x, k.mul(4, k.add(k.mul(k.smaller(k.add(row, r), last), x_stride), first))) for r in range(self.tile)
        ]
        count = k.smaller(k.b.sub(K, first), _BLOCK)
        full = k.b.and_(count, k.n(-LANES))
        lanes = LANES if wide_registers(k) else LANES // 2
        for part in range(0, LANES, lanes):
            places = [(r, c, _LINE * (r * _COLUMNS + c) + 4 * part) for r in range(self.tile) for c in range(_COLUMNS)]
            accs = {(r, c): k.var(k.splat(0.0, vec(F32, lanes))) for r, c, _ in places}
            with k.loop(full, step=LANES) as i:
                offset = k.mul(4, k.add(i, part))
                self._add(k, [k.load(vec(F32, lanes), row, offset) for row in rows], i, part, wide, accs)
            with k.loop(count, full, LANES) as i:
                offset, left = k.mul(4, k.add(i, part)), k.b.sub(k.b.sub(count, i), k.n(part))
                self._add(k, [k.load_first(vec(F32, lanes), left, row, offset) for row in rows], i, part, wide, accs)
            for r, c, place in places:
                total = k.b.fadd(k.load(vec(F32, lanes), sums, place, 4 * lanes), accs[r, c].get())
                k.store(total, sums, place, 4 * lanes)

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


def _each_16(
    k: Kernel,
    dtype: str,
    columns: Sequence[ir.Value],
    start: ir.Value,
    stop: ir.Value,
    near_bytes: int,
    use: Callable[[ir.Value, ir.Value | None], None],
) -> None:
    """Calls ``use`` with each 16 inputs' first and None, or the number that is left; asks for what is read next.
    ``start`` is a multiple of a line's inputs. ``near_bytes``: see ``_prefetcher``."""
    size = DTYPE_BYTES[dtype]
    per_line = _LINE // size
    ask = _prefetcher(k, columns, k.mul(size, k.size(4)), near_bytes)
    lines, full = (k.b.and_(stop, k.n(-count)) for count in (per_line, LANES))
    with k.loop(lines, start, per_line) as i:
        ask(k.mul(size, i))
        for part in range(0, per_line, LANES):
            use(k.add(i, part), None)
    with k.loop(full, lines, LANES) as i:
        use(i, None)
    with k.loop(stop, full, LANES) as i:
        use(i, k.b.sub(stop, i))


def _prefetcher(
    k: Kernel, columns: Sequence[ir.Value], column_bytes: ir.Value, near_bytes: int
) -> Callable[[ir.Value], None]:
    """A function to be called for each line of a column, with its offset.

    A tile's columns lie one after another, and so does the next tile. The lines of that one are asked for in the order
    of memory, which is what memory gives fastest: four columns side by side came at half the speed. Tiles of up to
    ``near_bytes`` go into the nearest cache at once, larger ones into the second and from there as they are read.
    """
    b, tile = k.b, k.mul(_COLUMNS, column_bytes)
    near = b.icmp_signed("<=", tile, k.n(near_bytes))
    step = b.select(near, k.n(_COLUMNS), k.n(1))
    following = k.at(columns[0], tile)
    soon = [b.select(near, k.at(following, _LINE * c), k.at(column, _AHEAD)) for c, column in enumerate(columns)]

    def ask(offset: ir.Value) -> None:
        for c, pointer in enumerate(soon):
            k.prefetch(following, k.add(k.mul(_COLUMNS, offset), _LINE * c), cache=2)
            k.prefetch(pointer, k.mul(step, offset))

    return ask


def _column_pointers(
    k: Kernel, weight: ir.Value, first: ir.Value, stop: ir.Value, K: ir.Value, dtype: str
) -> list[ir.Value]:
    """Of a tile's columns; those behind the last are the last again."""
    last = k.b.sub(stop, k.n(1))
    numbers = [k.smaller(k.add(first, c), last) for c in range(_COLUMNS)]
    return [k.at(weight, k.mul(DTYPE_BYTES[dtype], k.mul(number, K))) for number in numbers]
