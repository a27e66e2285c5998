"""Packing: a checkpoint's codes -> records, as ``exl/layout/columns.py`` says.

Both kernels share their slots; a chunk is what one block of 64 columns holds of one matrix, whose columns may begin and
end anywhere in the linear:

    0 source: words u32 [rows][N] as a GPTQ file has them, or codes u8 [rows][N]
    1 scales [groups][scale row] in the layout's type    2 zeros u8 [groups][scale row]; not read where symmetric
    3 rows i32: of each input of the records the row of its code in the file, -1: code 0. Only read by
      ``gathered`` and ``codes``
    4 out: the linear's records        5 bytes from a row of the source to the next
    6 records of a block               7 records of a group
    8 elements from a group's scales and zeros to the next
    9 the linear's column that the matrix begins at      10 columns of the matrix
    11 words of a record's column      12 the block of chunk 0, the one that holds the first column
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import I8, I16, I32, I64, LANES, I, Kernel, vec
from exl.cpu_kernels.kernel import KernelSpec
from exl.layout.columns import COLUMNS

_SCALES = {"f16": I16, "bf16": I16, "f32": I32}  # copied as bits
_WORD_BYTES = COLUMNS * 4  # from one word of a record's columns to the next


@dataclass(frozen=True)
class PackColumns(KernelSpec):
    """``form`` says how the codes come:

    - ``words``: GPTQ's words of 2, 4 or 8 bits in the order of the records: they are copied
    - ``stream``: GPTQ's words of 3 bits in that order: 32 codes in three words, of which codes 10 and 21 straddle two
    - ``gathered``: GPTQ's words of any width, each code from the row that slot 3 says
    - ``codes``: a byte each, also from such rows
    """

    form: str
    bits: int
    scale_dtype: str
    symmetric: bool

    @property
    def name(self) -> str:
        return f"pack_{self.form}_{self.bits}_{self.scale_dtype}{'_sym' if self.symmetric else ''}"

    def emit(self, k: Kernel) -> None:
        b = k.b
        block = k.add(k.chunk, k.size(12))
        begins, first = k.size(9), k.mul(block, COLUMNS)
        start = b.select(b.icmp_signed(">", begins, first), begins, first)  # of the linear's columns
        stop = k.smaller(k.add(begins, k.size(10)), k.add(first, COLUMNS))
        count, at, column = b.sub(stop, start), b.sub(start, first), b.sub(start, begins)
        source = _Source(k.pointer(0), k.size(5), k.pointer(3))
        with b.if_else(b.icmp_signed("==", count, I64(COLUMNS))) as (whole, cut):
            with whole:
                self._records(k, block, source, _Columns(k, count, at, column, whole=True))
            with cut:
                self._records(k, block, source, _Columns(k, count, at, column, whole=False))

    def _records(self, k: Kernel, block: ir.Value, source: _Source, columns: _Columns) -> None:
        words, records, in_group, in_row = k.size(11), k.size(6), k.size(7), k.size(8)
        scales, zeros = k.pointer(1), k.pointer(2)
        scale = _SCALES[self.scale_dtype]
        codes_bytes, scales_bytes = k.mul(words, _WORD_BYTES), COLUMNS * scale.width // 8
        record_bytes = k.add(codes_bytes, scales_bytes, 0 if self.symmetric else COLUMNS)
        first = k.at(k.pointer(4), k.mul(k.mul(block, records), record_bytes))
        with k.loop(records) as record:
            out = k.at(first, k.mul(record, record_bytes))
            self._codes(k, source, columns, record, out, words)
            group = k.mul(k.b.sdiv(record, in_group), in_row)
            columns.copy(scale, k.at(scales, k.mul(group, scale.width // 8)), k.at(out, codes_bytes))
            if not self.symmetric:
                columns.copy(I8, k.at(zeros, group), k.at(out, k.add(codes_bytes, scales_bytes)))

    def _codes(
        self, k: Kernel, source: _Source, columns: _Columns, record: ir.Value, out: ir.Value, words: ir.Value
    ) -> None:
        """Those of one record: all its words, one row of 64 after another."""
        step = 3 if self.bits == 3 else 1
        with k.loop(words, step=step) as word:
            row, here = k.add(k.mul(record, words), word), k.at(out, k.mul(word, _WORD_BYTES))
            if self.form == "words":
                columns.copy(I32, source.row(k, row), here)
            elif self.form == "stream":
                self._stream(k, source, columns, row, here)
            elif self.bits == 3:
                self._gather_planes(k, source, columns, k.mul(k.b.sdiv(row, I64(3)), 32), here)
            else:
                self._gather(k, source, columns, k.mul(row, 32 // self.bits), here)

    def _stream(self, k: Kernel, source: _Source, columns: _Columns, row: ir.Value, out: ir.Value) -> None:
        """Three words of 32 codes of 3 bits."""
        b = k.b
        rows = [source.row(k, k.add(row, i)) for i in range(3)]
        with columns.loop(together=False) as (piece,):
            stream = [columns.load(I32, piece, row) for row in rows]
            words = [k.splat(0, I)] * 3
            for i in range(32):
                place, shift = divmod(3 * i, 32)
                code = b.lshr(stream[place], k.splat(shift, I))
                if shift > 29:
                    code = b.or_(code, b.shl(stream[place + 1], k.splat(32 - shift, I)))
                low, high = b.and_(code, k.splat(3, I)), b.and_(b.lshr(code, k.splat(2, I)), k.splat(1, I))
                half, j = divmod(i, 16)
                words[half] = b.or_(words[half], b.shl(low, k.splat(2 * j, I)))
                words[2] = b.or_(words[2], b.shl(high, k.splat(8 * (j // 4) + 4 * half + j % 4, I)))
            for i, word in enumerate(words):
                columns.store(word, piece, k.at(out, i * _WORD_BYTES))

    def _gather(self, k: Kernel, source: _Source, columns: _Columns, input_: ir.Value, out: ir.Value) -> None:
        """One word of 2, 4 or 8 bits, whose first code is that of ``input_``."""
        with columns.loop() as pieces:
            words = [k.var(k.splat(0, I)) for _ in pieces]
            with k.loop(32 // self.bits) as j:
                place = _splat(k, k.mul(j, self.bits))
                for word, code in zip(words, self._gathered(k, source, columns, pieces, k.add(input_, j)), strict=True):
                    word.set(k.b.or_(word.get(), k.b.shl(code, place)))
            for piece, word in zip(pieces, words, strict=True):
                columns.store(word.get(), piece, out)

    def _gather_planes(self, k: Kernel, source: _Source, columns: _Columns, input_: ir.Value, out: ir.Value) -> None:
        """Three words of 3 bits. Input 16 half + j has its low bits at 2 j of a word, its highest bit in the third, at
        8 (j / 4) + 4 half + j % 4."""
        b = k.b
        with columns.loop() as pieces:
            highs = [k.var(k.splat(0, I)) for _ in pieces]
            with k.loop(2) as half:
                lows = [k.var(k.splat(0, I)) for _ in pieces]
                with k.loop(16) as j:
                    low_place = _splat(k, k.mul(j, 2))
                    step = k.mul(b.lshr(j, I64(2)), 8)
                    high_place = _splat(k, k.add(step, k.mul(half, 4), b.and_(j, I64(3))))
                    codes = self._gathered(k, source, columns, pieces, k.add(input_, k.mul(half, 16), j))
                    for low, high, code in zip(lows, highs, codes, strict=True):
                        low.set(b.or_(low.get(), b.shl(b.and_(code, k.splat(3, I)), low_place)))
                        high.set(b.or_(high.get(), b.shl(b.lshr(code, k.splat(2, I)), high_place)))
                for piece, low in zip(pieces, lows, strict=True):
                    columns.store(low.get(), piece, k.at(out, k.mul(half, _WORD_BYTES)))
            for piece, high in zip(pieces, highs, strict=True):
                columns.store(high.get(), piece, k.at(out, 2 * _WORD_BYTES))

    def _gathered(
        self, k: Kernel, source: _Source, columns: _Columns, pieces: list[ir.Value], input_: ir.Value
    ) -> list[ir.Value]:
        """The codes of one input, i32: 16 columns for each of ``pieces``."""
        b = k.b
        found = b.sext(k.load(I32, source.rows, k.mul(input_, 4)), I64)
        none = b.icmp_signed("<", found, I64(0))
        row = b.select(none, I64(0), found)
        mask = k.splat(b.select(none, I32(0), I32((1 << self.bits) - 1)), I)
        if self.form == "codes":
            there = source.row(k, row)
            return [b.and_(b.zext(columns.load(I8, piece, there), I), mask) for piece in pieces]
        bit = k.mul(row, self.bits)
        word, shift = b.lshr(bit, I64(5)), b.and_(bit, I64(31))
        there, by = source.row(k, word), _splat(k, shift)
        codes = [b.lshr(columns.load(I32, piece, there), by) for piece in pieces]
        if self.bits == 3:  # the rest of a code that straddles two words is in the next; of others nothing is left
            over = b.icmp_signed(">", shift, I64(29))
            next_ = source.row(k, b.select(over, k.add(word, 1), word))
            left = _splat(k, b.select(over, b.sub(I64(32), shift), I64(0)))
            some = k.splat(b.select(over, I32(-1), I32(0)), I)
            rest = [b.and_(b.shl(columns.load(I32, piece, next_), left), some) for piece in pieces]
            codes = [b.or_(code, more) for code, more in zip(codes, rest, strict=True)]
        return [b.and_(code, mask) for code in codes]


def _splat(k: Kernel, value: ir.Value) -> ir.Value:
    """An i64 in all 16 lanes, as i32."""
    return k.splat(k.b.trunc(value, I32), I)


@dataclass(frozen=True)
class _Source:
    """Where the matrix's codes are: ``stride`` bytes from a row to the next."""

    first: ir.Value
    stride: ir.Value
    rows: ir.Value  # slot 3

    def row(self, k: Kernel, row: ir.Value) -> ir.Value:
        return k.at(self.first, k.mul(row, self.stride))


class _Columns:
    """The columns of one block that a matrix has: ``count`` from ``at`` on in the block, ``column`` in the matrix.
    ``whole``: all 64, which saves masks."""

    def __init__(self, k: Kernel, count: ir.Value, at: ir.Value, column: ir.Value, *, whole: bool) -> None:
        self._k, self._count, self._at, self._column, self._whole = k, count, at, column, whole

    @contextmanager
    def loop(self, *, together: bool = True) -> Iterator[list[ir.Value]]:
        """Over all columns: the first of each 16 columns that are taken together, from 0 on. ``together``: all 64 where
        they are there; code that is long by itself says no."""
        if self._whole and together:
            yield [I64(first) for first in range(0, COLUMNS, LANES)]
        else:
            with self._k.loop(self._count, step=LANES) as piece:
                yield [piece]

    def load(self, element: ir.IntType, piece: ir.Value, row: ir.Value) -> ir.Value:
        """16 columns of a row of the matrix."""
        k, size = self._k, element.width // 8
        offset = k.mul(k.add(self._column, piece), size)
        if self._whole:
            return k.load(vec(element), row, offset)
        return k.load_first(vec(element), k.b.sub(self._count, piece), row, offset)

    def store(self, value: ir.Value, piece: ir.Value, row: ir.Value) -> None:
        """16 columns of a row of the record."""
        k = self._k
        offset = k.mul(k.add(self._at, piece), value.type.element.width // 8)
        if self._whole:
            k.store(value, row, offset)
        else:
            k.store_first(value, k.b.sub(self._count, piece), row, offset)

    def copy(self, element: ir.IntType, source: ir.Value, out: ir.Value) -> None:
        with self.loop() as pieces:
            for piece in pieces:
                self.store(self.load(element, piece, source), piece, out)
