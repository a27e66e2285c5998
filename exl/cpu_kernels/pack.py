"""Packing: a checkpoint's codes -> records, as ``exl/layout/columns.py`` says.

Both kernels share their slots; a chunk is what one block of 64 columns holds of one matrix, whose columns may begin and
end anywhere in the linear:

    0 source: words u32 [rows][N] as a GPTQ file has them, or codes u8 [rows][N]
    1 scales [groups][scale row] in the layout's type    2 zeros u8 [groups][scale row]; not read where symmetric
    3 rows i32: of each input of the records the row of its code in the file, -1: code 0. Not read by ``copies``
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

from exl.cpu_kernels.ir import I8, I16, I32, I64, LANES, I, Kernel, Var, vec
from exl.cpu_kernels.kernel import KernelSpec
from exl.layout.columns import COLUMNS

_SCALES = {"f16": I16, "bf16": I16, "f32": I32}  # copied as bits
_BLOCK_OF_3_BITS = 32  # inputs whose codes are three words, in the file and in a record


@dataclass(frozen=True)
class PackColumns(KernelSpec):
    """``form`` says how the codes come:

    - ``words``: GPTQ's words of 2, 4 or 8 bits in the order of the records: they are copied
    - ``stream``: GPTQ's words of 3 bits in that order: 32 codes in three words, of which codes 10 and 21 straddle two
    - ``gathered``: GPTQ's words of any width, each code from the row that slot 3 says
    - ``codes``: a byte each, also from rows
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
        with b.if_else(b.icmp_signed("==", count, I64(COLUMNS))) as (whole, cut):
            with whole:
                self._records(k, block, _Columns(k, count, at, column, whole=True))
            with cut:
                self._records(k, block, _Columns(k, count, at, column, whole=False))

    def _records(self, k: Kernel, block: ir.Value, columns: _Columns) -> None:
        words, records = k.size(11), k.size(6)
        scale = _SCALES[self.scale_dtype]
        codes_bytes, scales_bytes = k.mul(words, COLUMNS * 4), COLUMNS * scale.width // 8
        record_bytes = k.add(codes_bytes, scales_bytes, 0 if self.symmetric else COLUMNS)
        first = k.at(k.pointer(4), k.mul(k.mul(block, records), record_bytes))
        with k.loop(records) as record:
            out = k.at(first, k.mul(record, record_bytes))
            self._words(k, columns, record, out, words)
            group = k.mul(k.b.sdiv(record, k.size(7)), k.size(8))
            columns.copy(scale, k.at(k.pointer(1), k.mul(group, scale.width // 8)), k.at(out, codes_bytes))
            if not self.symmetric:
                columns.copy(I8, k.at(k.pointer(2), group), k.at(out, k.add(codes_bytes, scales_bytes)))

    def _words(self, k: Kernel, columns: _Columns, record: ir.Value, out: ir.Value, words: ir.Value) -> None:
        """The codes of one record."""
        if self.form == "words":
            source = k.at(k.pointer(0), k.mul(k.mul(record, words), k.size(5)))
            with k.loop(words) as word:
                columns.copy(I32, k.at(source, k.mul(word, k.size(5))), k.at(out, k.mul(word, COLUMNS * 4)))
        elif self.bits == 3:
            blocks = k.b.sdiv(words, I64(3))
            with k.loop(blocks) as i:
                input_ = k.mul(k.add(k.mul(record, blocks), i), _BLOCK_OF_3_BITS)
                self._planes(k, columns, input_, k.at(out, k.mul(i, 3 * COLUMNS * 4)))
        else:
            with k.loop(words) as word:
                input_ = k.mul(k.add(k.mul(record, words), word), 32 // self.bits)
                self._word(k, columns, input_, k.at(out, k.mul(word, COLUMNS * 4)))

    def _word(self, k: Kernel, columns: _Columns, input_: ir.Value, out: ir.Value) -> None:
        with columns.pieces() as piece:
            word = k.splat(0, I)
            for j in range(32 // self.bits):
                code = self._code(k, columns, piece, input_, j)
                word = k.b.or_(word, k.b.shl(code, k.splat(j * self.bits, I)))
            columns.store(word, piece, out)

    def _planes(self, k: Kernel, columns: _Columns, input_: ir.Value, out: ir.Value) -> None:
        """32 inputs of 3 bits: the low bits of each half, then the highest bits of all."""
        with columns.pieces() as piece:
            high = k.var(k.splat(0, I))
            if self.form == "stream":  # where words straddle differs between the halves
                for half in range(2):
                    self._half(k, columns, piece, input_, half, out, high)
            else:
                with k.loop(2) as half:
                    self._half(k, columns, piece, input_, half, out, high)
            columns.store(high.get(), piece, k.at(out, 2 * COLUMNS * 4))

    def _half(
        self, k: Kernel, columns: _Columns, piece: ir.Value, input_: ir.Value, half: ir.Value | int, out: ir.Value,
        high: Var,
    ) -> None:  # fmt: skip
        """Input 4 i + j of a half has its low bits at 8 i + 2 j of the half's word, its highest at 8 i + 4 half + j."""
        word = highest = k.splat(0, I)
        for j in range(16):
            place = k.add(k.mul(half, 16), j) if isinstance(half, ir.Value) else 16 * half + j
            code = self._code(k, columns, piece, input_, place)
            word = k.b.or_(word, k.b.shl(k.b.and_(code, k.splat(3, I)), k.splat(2 * j, I)))
            highest = k.b.or_(highest, k.b.shl(k.b.lshr(code, k.splat(2, I)), k.splat(j // 4 * 8 + j % 4, I)))
        columns.store(word, piece, k.at(out, k.mul(half, COLUMNS * 4)))
        by = k.splat(k.b.trunc(k.mul(half, 4), I32), I)
        high.set(k.b.or_(high.get(), k.b.shl(highest, by)))

    def _code(self, k: Kernel, columns: _Columns, piece: ir.Value, input_: ir.Value, j: ir.Value | int) -> ir.Value:
        """Of input ``input_ + j``, i32, in 16 columns."""
        b, mask = k.b, (1 << self.bits) - 1
        if self.form == "stream":
            row, shift = k.add(k.mul(b.sdiv(input_, I64(32)), 3), j * 3 // 32), j * 3 % 32
            code = b.lshr(columns.load(I32, piece, self._row(k, row)), k.splat(shift, I))
            if shift > 29:
                above = columns.load(I32, piece, self._row(k, k.add(row, 1)))
                code = b.or_(code, b.shl(above, k.splat(32 - shift, I)))
            return b.and_(code, k.splat(mask, I))
        found = b.sext(k.load(I32, k.pointer(3), k.mul(k.add(input_, j), 4)), I64)
        none = b.icmp_signed("<", found, I64(0))
        row = b.select(none, I64(0), found)
        mask = k.splat(b.select(none, I32(0), I32(mask)), I)
        if self.form == "codes":
            return b.and_(b.zext(columns.load(I8, piece, self._row(k, row)), I), mask)
        bit = k.mul(row, self.bits)
        word, shift = b.lshr(bit, I64(5)), b.trunc(b.and_(bit, I64(31)), I32)
        code = b.lshr(columns.load(I32, piece, self._row(k, word)), k.splat(shift, I))
        if self.bits == 3:  # the rest of a code that straddles two words, which is in the next; else that word again
            over = b.icmp_signed(">", shift, I32(29))
            above = columns.load(I32, piece, self._row(k, b.select(over, k.add(word, 1), word)))
            left = b.select(over, b.sub(I32(32), shift), I32(0))
            more = b.shl(above, k.splat(left, I))
            code = b.or_(code, b.and_(more, k.splat(b.select(over, I32(7), I32(0)), I)))
        return b.and_(code, mask)

    def _row(self, k: Kernel, row: ir.Value) -> ir.Value:
        return k.at(k.pointer(0), k.mul(row, k.size(5)))


class _Columns:
    """The columns of one block that a matrix has: ``count`` from ``at`` on in the block, ``column`` in the matrix.
    ``whole``: all 64, which saves masks."""

    def __init__(self, k: Kernel, count: ir.Value, at: ir.Value, column: ir.Value, *, whole: bool) -> None:
        self._k, self._count, self._at, self._column, self._whole = k, count, at, column, whole

    @contextmanager
    def pieces(self) -> Iterator[ir.Value]:
        """A loop over the first of each 16 columns, from 0 on."""
        with self._k.loop(self._count, step=LANES) as piece:
            yield piece

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
        if self._whole:  # without a loop, which would take longer than the copy
            for piece in range(0, COLUMNS, LANES):
                self.store(self.load(element, I64(piece), source), I64(piece), out)
        else:
            with self.pieces() as piece:
                self.store(self.load(element, piece, source), piece, out)
