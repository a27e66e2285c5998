"""Rows of any width, 16 elements at a time: whole vectors, what is left over at the end, elements by a list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import F16, I16, I32, I64, LANES, PTR, F, I, Kernel, vec
from exl.cpu_kernels.quantize import ActivationForm, emit_record
from exl.layout.fields import DTYPE_BYTES


@dataclass(frozen=True)
class Part:
    """16 elements of a row: those from ``first`` (i64) on; if ``count`` (i64) is not None, only so many of them, the
    others counting as 0; or those that ``listed`` (16 i32) names, where -1 is a 0."""

    first: ir.Value | None = None
    count: ir.Value | None = None
    listed: ir.Value | None = None


def load_part(k: Kernel, row: ir.Value, part: Part, dtype: str = "f32") -> ir.Value:
    """Of a row of f32, f16 or bf16, as f32; memory of elements that count as 0 is not touched. A list needs f32."""
    if part.listed is not None:
        return _gather(k, row, part.listed)
    offset = k.mul(part.first, DTYPE_BYTES[dtype])
    if part.count is None:
        return k.widen(dtype, LANES, row, offset)
    if dtype == "f32":
        return k.load_first(F, part.count, row, offset)
    bits = k.load_first(vec(I16), part.count, row, offset)
    if dtype == "f16":
        return k.b.fpext(k.b.bitcast(bits, vec(F16)), F)
    return k.b.bitcast(k.b.shl(k.b.zext(bits, I), k.splat(16, I)), F)


def store_part(k: Kernel, value: ir.Value, row: ir.Value, part: Part) -> None:
    """Into a row of f32; not for a list."""
    offset = k.mul(part.first, 4)
    if part.count is None:
        k.store(value, row, offset)
    else:
        k.store_first(value, part.count, row, offset)


def _gather(k: Kernel, row: ir.Value, listed: ir.Value) -> ir.Value:
    wide, pointers = vec(I64), ir.VectorType(PTR, LANES)
    offsets = k.b.mul(k.b.sext(listed, wide), k.splat(4, wide))
    addresses = k.b.inttoptr(k.b.add(offsets, k.splat(k.b.ptrtoint(row, I64), wide)), pointers)
    there = k.b.icmp_signed(">=", listed, k.splat(0, I))
    return k.call("llvm.masked.gather.v16f32.v16p0", F, addresses, I32(4), there, ir.Constant(F, None))


def each_part(k: Kernel, stop: ir.Value, body: Callable[[Part], None], start: ir.Value | int = 0) -> None:
    """Writes ``body(part)`` for the elements ``start`` to ``stop - 1``, twice: for whole vectors, for the last few."""
    start = k.n(start)
    whole = k.add(start, k.b.and_(k.b.sub(stop, start), I64(-LANES)))
    with k.loop(whole, start, LANES) as i:
        body(Part(i))
    rest = k.b.sub(stop, whole)
    with k.b.if_then(k.b.icmp_signed(">", rest, I64(0))):
        body(Part(whole, rest))


@dataclass(frozen=True)
class Records:
    """Where a row's quantized activations go. ``listed``: i32 [R * rows], which element each input is, -1: none;
    None: in their own order, those beyond ``width`` counting as 0."""

    form: ActivationForm
    pointer: ir.Value  # [R][M] records
    row: ir.Value  # of M
    num_rows: ir.Value  # M
    width: ir.Value
    listed: ir.Value | None

    def emit(self, k: Kernel, stop: ir.Value, value: Callable[[Part], ir.Value], start: ir.Value | int = 0) -> None:
        """Records ``start`` to ``stop - 1`` of ``value(part)``."""
        rows = self.form.rows
        inputs = k.memory(4 * rows)
        with k.loop(stop, start) as r:
            self._compute(k, k.mul(r, rows), value, inputs)
            where = k.mul(self.form.num_bytes, k.add(k.mul(r, self.num_rows), self.row))
            emit_record(k, inputs, k.at(self.pointer, where), self.form)

    def _compute(self, k: Kernel, first: ir.Value, value: Callable[[Part], ir.Value], inputs: ir.Value) -> None:
        """A record's f32, to ``inputs``: in a loop, as code for each vector would take long to compile."""
        if self.listed is not None:
            with k.loop(self.form.rows, step=LANES) as i:
                listed = k.load(I, self.listed, k.mul(k.add(first, i), 4))
                k.store(value(Part(listed=listed)), inputs, k.mul(i, 4))
            return
        count = k.smaller(self.form.rows, k.b.sub(self.width, first))
        with k.b.if_then(k.b.icmp_signed("<", count, I64(self.form.rows))):
            for i in range(0, self.form.rows, LANES):
                k.store(k.splat(0.0), inputs, 4 * i)

        def body(part: Part) -> None:
            store_part(k, value(Part(k.add(first, part.first), part.count)), inputs, part)

        each_part(k, count, body)


def row_of(k: Kernel, pointer: ir.Value, row: ir.Value, stride: ir.Value) -> ir.Value:
    """The row's first element; ``stride`` in elements of f32."""
    return k.at(pointer, k.mul(k.mul(row, stride), 4))


def columns_of_chunk(
    k: Kernel, columns: ir.Value, chunks_a_row: ir.Value, width: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(row, first column, end) of chunk c: the columns of number c mod ``chunks_a_row`` of row c / ``chunks_a_row``."""
    row = k.b.sdiv(k.chunk, chunks_a_row)
    start = k.mul(k.b.srem(k.chunk, chunks_a_row), columns)
    return row, start, k.smaller(k.add(start, columns), width)
