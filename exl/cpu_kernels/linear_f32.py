"""Quantized linears in f32: 2, 3, 4 and 8 bits, weights as ``exl.layout.columns`` holds them, activations as they are.

A row's result, over the records in their order, from y = 0:

    t = a chain of fma from 0 over the record's inputs: t = fma(code - zero, x, t)
    y = fma(t, scale, y)

then y + bias, and fma(slot 11, y, residual). ``code - zero`` is exact. The chain takes inputs in their order; at 3
bits, of each 16, in the order 0 4 8 12, 1 5 9 13, 2 6 10 14, 3 7 11 15, as words give them. Every kind, tile and
instruction set keeps to that order, and so gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.dense import wide_registers
from exl.cpu_kernels.ir import F32, I8, I32, I64, LANES, F, Kernel, vec
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.linear_codes import FP4_ZERO, fp4_numbers
from exl.cpu_kernels.linear_end import ROW_BLOCK, each_block, finish_block
from exl.layout.columns import COLUMNS, ColumnLayout

MOST_ROWS = 8  # of "rows"
_AHEAD = 4096  # bytes that are asked for ahead, about
_LINE = 64
_OTHER_BYTES = 0x80808000 - (1 << 32)  # which mean nothing, as i32
# Of each kind: tiles (rows, vectors), largest first, that fit in the registers.
_WIDE = {
    "row": ((1, 4),),
    "rows": ((4, 4), (3, 4), (2, 4), (1, 4)),
    "panel": ((6, 4), (2, 4), (1, 4)),
}
_NARROW = {
    "row": ((1, 4),),
    "rows": ((4, 2), (3, 2), (2, 4), (1, 4)),
    "panel": ((4, 2), (1, 4)),
}


@dataclass(frozen=True)
class _Codes:
    """How codes are taken out of the words of ``inputs`` inputs: in ``steps`` loops, each of which makes a word that
    has a code every ``pitch`` bits, of inputs that are ``stride`` apart. Two codes are used where they lie, then the
    word is shifted."""

    bits: int
    words: int
    inputs: int
    steps: int
    pitch: int
    stride: int = 1

    @property
    def places(self) -> tuple[int, int]:
        return 0, self.pitch

    def word(self, k: Kernel, words: ir.Value, step: ir.Value, type_: ir.Type) -> ir.Value:
        """A step's word, of columns from ``words`` on."""
        count = k.b.trunc(step, I32)
        if self.bits != 3:
            count = k.b.mul(count, I32(32 // self.steps))
            return k.b.lshr(k.load(type_, words), k.splat(count, type_))
        half, j = k.b.lshr(step, I64(2)), k.b.and_(count, I32(3))  # see exl.layout.columns, where ``half`` is a
        low = k.b.lshr(k.load(type_, words, k.mul(4 * COLUMNS, half)), k.splat(k.b.shl(j, I32(1)), type_))
        high = k.b.shl(k.b.lshr(k.load(type_, words, 8 * COLUMNS), k.splat(count, type_)), k.splat(2, type_))
        return k.b.or_(k.b.and_(low, k.splat(0x03030303, type_)), k.b.and_(high, k.splat(0x04040404, type_)))

    def first_input(self, k: Kernel, step: ir.Value) -> ir.Value:
        if self.bits != 3:
            return k.mul(self.inputs // self.steps, step)
        return k.add(k.mul(16, k.b.lshr(step, I64(2))), k.b.and_(step, I64(3)))


_CODES = {
    2: _Codes(2, words=1, inputs=16, steps=2, pitch=2),
    3: _Codes(3, words=3, inputs=32, steps=8, pitch=8, stride=4),
    4: _Codes(4, words=1, inputs=8, steps=1, pitch=4),
    8: _Codes(8, words=1, inputs=4, steps=1, pitch=8),
}


@dataclass(frozen=True)
class LinearF32(KernelSpec):
    """``rows``: inputs of a record. ``scale_dtype``: "f16", "bf16" or "f32". ``code_kind``: as ``ColumnLayout`` has it.

    Kinds: "row": M = 1. "rows": M to 8; codes are taken out of words for each few rows. "panel": any M; chunks have 128
    rows, for which a record's codes are unpacked once.

    Slots: see ``exl.cpu_kernels.dense``. Activations f32 [M] in the order of the records, zero where a record has no
    input (``GatherRows``). Chunk c: columns chunk c mod ceil(slot 7 / slot 12); "panel": of rows block
    c / ceil(slot 7 / slot 12), too.
    """

    bits: int
    rows: int
    symmetric: bool
    scale_dtype: str
    kind: str
    code_kind: str = "int"

    @property
    def name(self) -> str:
        zeros = "symmetric" if self.symmetric else "zeros"
        zeros += "" if self.code_kind == "int" else f"_{self.code_kind}"
        return f"linear_f32_{self.kind}_{self.bits}_{self.rows}_{zeros}_{self.scale_dtype}"

    @property
    def layout(self) -> ColumnLayout:
        """Of one record."""
        sizes = self.bits, self.rows, COLUMNS, self.rows
        return ColumnLayout(*sizes, self.symmetric, self.scale_dtype, self.code_kind)

    def emit(self, k: Kernel) -> None:
        _Emitter(self, k).chunk()


def linear_f32(layout: ColumnLayout, kind: str) -> LinearF32:
    """The kernel for a linear's weights."""
    return LinearF32(layout.bits, layout.rows, layout.symmetric, layout.scale_dtype, kind, layout.code_kind)


def best_f32_kind(num_rows: int) -> str:
    """The quickest kind for ``num_rows`` rows, of those that can."""
    return "row" if num_rows == 1 else "rows" if num_rows <= MOST_ROWS else "panel"


@dataclass(frozen=True)
class GatherRows(KernelSpec):
    """Activations as records take them: out[m][i] = x[m][source[i]], zero where ``source`` is -1.

    Slots: 0 x f32 [M], 1 source i32 [slot 4], 2 out f32 [M], 3 out's stride, 4 inputs of the records, 5 M, 7 inputs of
    a chunk, 13 x's stride. Strides in elements. Chunk c: of row c / ceil(slot 4 / slot 7) piece c mod that number.
    """

    @property
    def name(self) -> str:
        return "gather_rows"

    def emit(self, k: Kernel) -> None:
        b, size, span = k.b, k.size(4), k.size(7)
        pieces = b.sdiv(k.add(size, span, -1), span)
        row, start = b.sdiv(k.chunk, pieces), k.mul(b.srem(k.chunk, pieces), span)
        x = k.at(k.pointer(0), k.mul(4, k.mul(row, k.size(13))))
        source, out = k.pointer(1), k.at(k.pointer(2), k.mul(4, k.mul(row, k.size(3))))
        with k.loop(k.smaller(size, k.add(start, span)), start) as i:
            place = k.load(I32, source, k.mul(4, i))
            missing = b.icmp_signed("<", place, I32(0))
            there = b.sext(b.select(missing, I32(0), place), I64)
            k.store(b.select(missing, F32(0.0), k.load(F32, x, k.mul(4, there))), out, k.mul(4, i))


class _Emitter:
    def __init__(self, spec: LinearF32, k: Kernel) -> None:
        self.k, self.spec, self.layout = k, spec, spec.layout
        self.lanes = LANES if wide_registers(k) else LANES // 2
        self.panel = spec.kind == "panel"
        self.tiles = (_WIDE if wide_registers(k) else _NARROW)[spec.kind]
        most = {"row": 1, "rows": MOST_ROWS, "panel": ROW_BLOCK}[spec.kind]
        self.sums = k.memory(4 * COLUMNS * most)  # f32 [rows][64]: the results so far
        self.scales = k.memory(4 * COLUMNS)  # f32 [64], of a record
        self.offsets = [k.memory(4 * COLUMNS) for _ in _CODES[spec.bits].places]  # f32 [64], see _code
        self.unpacked = k.memory(4 * COLUMNS * spec.rows) if self.panel else None  # f32 [inputs][64]: code - zero
        self.ahead = self.layout.record_bytes * max(1, round(_AHEAD / self.layout.record_bytes))

    def chunk(self) -> None:
        with each_block(self.k, self.spec.kind) as (block, first, count):
            self._block(block, first, count)

    def _block(self, block: ir.Value, first: ir.Value, count: ir.Value) -> None:
        """64 columns of rows ``first`` to ``first + count - 1``."""
        k, num_records = self.k, self.k.size(4)
        with k.loop(k.mul(count, 4 * COLUMNS), step=_LINE) as i:
            k.store(k.splat(0.0), self.sums, i, _LINE)
        base = k.at(k.pointer(0), k.mul(k.mul(block, num_records), self.layout.record_bytes))
        x = k.at(k.pointer(1), k.mul(4, k.mul(first, k.size(13))))
        with k.loop(num_records) as r:
            record = k.at(base, k.mul(r, self.layout.record_bytes))
            self._record(record, k.at(x, k.mul(r, 4 * self.spec.rows)), count)
        finish_block(k, self.sums, block, first, count)

    def _record(self, record: ir.Value, x: ir.Value, count: ir.Value) -> None:
        k = self.k
        self._widen_scales(record)
        if self.panel:
            self._unpack(record)
        start = I64(0)
        for rows, vectors in self.tiles:
            stop = k.b.sub(count, k.b.srem(k.b.sub(count, start), I64(rows)))
            with k.loop(stop, start, rows) as row, k.loop(COLUMNS, step=vectors * self.lanes) as column:
                xs = [k.at(x, k.mul(4, k.mul(k.add(row, r), k.size(13)))) for r in range(rows)]
                sums = k.at(self.sums, k.mul(4, k.add(k.mul(row, COLUMNS), column)))
                self._tile(record, xs, column, sums, vectors)
            start = stop

    def _widen_scales(self, record: ir.Value) -> None:
        """A record's scales, and what is subtracted from its codes, into memory."""
        k, layout = self.k, self.layout
        scale_bytes = (layout.zeros_offset - layout.scales_offset) // COLUMNS
        for column in range(0, COLUMNS, LANES):
            scales = k.widen(layout.scale_dtype, LANES, record, layout.scales_offset + scale_bytes * column)
            k.store(scales, self.scales, 4 * column, _LINE)
            fp4 = layout.code_kind == "fp4"
            if layout.symmetric:
                zeros = k.splat(float(FP4_ZERO if fp4 else 1 << (layout.bits - 1)))
            else:
                zeros = k.b.uitofp(k.load(vec(I8), record, layout.zeros_offset + column), F)
            for place, offsets in zip(_CODES[layout.bits].places, self.offsets, strict=True):
                k.store(k.b.fadd(zeros, k.splat(2.0 ** (23 - (0 if fp4 else place)))), offsets, 4 * column, _LINE)
        for line in range(layout.scales_offset, layout.record_bytes, _LINE):
            k.prefetch(record, line + self.ahead)

    def _tile(self, record: ir.Value, xs: list[ir.Value], column: ir.Value, sums: ir.Value, vectors: int) -> None:
        """Adds a record's part to some rows' and columns' results."""
        k, type_ = self.k, vec(F32, self.lanes)
        chains = [[k.var(k.splat(0.0, type_)) for _ in range(vectors)] for _ in xs]

        def add(i: ir.Value, weights: Iterable[ir.Value]) -> None:
            values = [k.splat(k.load(F32, x, k.mul(4, i)), type_) for x in xs]
            for v, weight in enumerate(weights):
                for r, value in enumerate(values):
                    chains[r][v].set(k.fma(weight, value, chains[r][v].get()))

        if self.panel:
            self._in_order(lambda i: add(i, self._unpacked_vectors(i, column, vectors)))
        else:
            self._from_words(record, column, vectors, self.lanes, add)
        for v in range(vectors):
            offset = 4 * v * self.lanes
            scale = k.load(type_, self.scales, k.add(k.mul(4, column), offset), 4 * self.lanes)
            for r, chain in enumerate(chains):
                where = k.at(sums, 4 * r * COLUMNS + offset)
                k.store(k.fma(chain[v].get(), scale, k.load(type_, where, 0, 4 * self.lanes)), where, 0, 4 * self.lanes)

    def _in_order(self, add: Callable[[ir.Value], None]) -> None:
        """Calls ``add`` with each input of a record, in the order of the chain."""
        k, rows = self.k, self.spec.rows
        if self.spec.bits == 3:
            with k.loop(rows, step=16) as i, k.loop(4) as j:
                for b in range(4):
                    add(k.add(i, j, 4 * b))
        else:
            with k.loop(rows, step=4) as i:
                for j in range(4):
                    add(k.add(i, j))

    def _unpacked_vectors(self, i: ir.Value, column: ir.Value, vectors: int) -> Iterator[ir.Value]:
        k, type_ = self.k, vec(F32, self.lanes)
        for v in range(vectors):
            place = k.add(k.mul(4, k.add(k.mul(COLUMNS, i), column)), 4 * v * self.lanes)
            yield k.load(type_, self.unpacked, place, 4 * self.lanes)

    def _unpack(self, record: ir.Value) -> None:
        k = self.k

        def store(i: ir.Value, weights: Iterable[ir.Value]) -> None:
            for v, weight in enumerate(weights):
                k.store(weight, self.unpacked, k.add(k.mul(4 * COLUMNS, i), 4 * LANES * v), _LINE)

        self._from_words(record, I64(0), COLUMNS // LANES, LANES, store)

    def _from_words(
        self,
        record: ir.Value,
        column: ir.Value,
        vectors: int,
        lanes: int,
        use: Callable[[ir.Value, Iterable[ir.Value]], None],
    ) -> None:
        """Calls ``use`` with each input of a record, in the order of the chain, and its ``code - zero`` in columns
        from ``column`` on, ``vectors`` of ``lanes``."""
        k, type_, codes = self.k, vec(F32, lanes), _CODES[self.spec.bits]
        offsets = [
            [k.load(type_, o, k.mul(4, k.add(column, v * lanes)), 4 * lanes) for v in range(vectors)]
            for o in self.offsets
        ]
        with k.loop(self.spec.rows // codes.inputs) as group:
            row = k.at(record, k.mul(4, k.add(k.mul(COLUMNS * codes.words, group), column)))
            for word in range(codes.words):
                for line in range(0, 4 * lanes * vectors, _LINE):
                    k.prefetch(row, 4 * COLUMNS * word + line + self.ahead)
            with k.loop(codes.steps) as step:
                words = [codes.word(k, k.at(row, 4 * lanes * v), step, vec(I32, lanes)) for v in range(vectors)]
                first = k.add(k.mul(codes.inputs, group), codes.first_input(k, step))
                for i in range(codes.inputs // codes.steps):
                    place = i % 2
                    if i and not place:
                        words = [k.b.lshr(word, k.splat(2 * codes.pitch, word.type)) for word in words]
                    bit, zeros = codes.places[place], offsets[place]
                    number = _fp4_number if self.spec.code_kind == "fp4" else _code
                    numbers = [number(k, codes.bits, bit, *pair) for pair in zip(words, zeros, strict=True)]
                    use(k.add(first, i * codes.stride), numbers)


def _code(k: Kernel, bits: int, place: int, word: ir.Value, offset: ir.Value) -> ir.Value:
    """``code - zero`` as f32, exact. The code lies at bit ``place`` of the word: with the exponent of 2**(23 - place)
    above it, the word is the f32 of 2**(23 - place) + code; ``offset`` is 2**(23 - place) + zero."""
    code = k.b.and_(word, k.splat(((1 << bits) - 1) << place, word.type))
    number = k.b.or_(code, k.splat((127 + 23 - place) << 23, word.type))
    return k.b.fsub(k.b.bitcast(number, offset.type), offset)


def _fp4_number(k: Kernel, bits: int, place: int, word: ir.Value, offset: ir.Value) -> ir.Value:
    """The same of codes that stand for other numbers: of the code at bit ``place``; ``offset`` is as for place 0."""
    shifted = k.b.lshr(word, k.splat(place, word.type)) if place else word
    code = k.b.and_(shifted, k.splat((1 << bits) - 1, word.type))
    number = fp4_numbers(k, k.b.or_(code, k.splat(_OTHER_BYTES, word.type)))
    return k.b.fsub(k.b.bitcast(k.b.or_(number, k.splat((127 + 23) << 23, word.type)), offset.type), offset)
