"""Activations to integers, as the integer linears take them.

A record is the activations of one row that meet one record of weights (``exl.layout.columns``): ``parts`` times
``rows`` signed bytes, then the step d as f32, the sum of the integers as i32, and 8 bytes of nothing. An integer is
x / d, computed as ``rint(x * r)`` with r = 1 / d, rounded. Two parts ("int16") are the high and the low byte of
``256 * high + low``, both signed, with d = max |x| / 32512; one part ("int8") is the integer itself, with
d = max |x| / 127.

Bytes lie in the order in which codes come out of the weights' words, four inputs at a time (``ActivationForm.order``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import F32, I8, I32, I64, LANES, F, I, Kernel, vec
from exl.cpu_kernels.kernel import KernelSpec
from exl.layout.columns import ColumnLayout, activation_bytes

_LIMITS = {1: 127.0, 2: 32512.0}  # 32512 = 256 * 127: the largest whose high byte, rounded, is a signed byte
_SMALLEST = 1e-30  # a record whose largest value is below counts as zero: d stays a normal number, and 1 / d finite
_INFINITY_BITS = 0x7F800000  # NaN is above, as an integer

# Where each of 16 bytes comes from.
_EIGHTS = (0, 2, 4, 6, 1, 3, 5, 7)
_ORDERS = {
    "bytes": tuple(range(LANES)),
    "eights": tuple(8 * half + i for half in (0, 1) for i in _EIGHTS),
    "sixteens": tuple(step + 4 * byte for step in range(4) for byte in range(4)),
}
_ORDER_OF_BITS = {2: "sixteens", 3: "sixteens", 4: "eights", 8: "bytes"}


@dataclass(frozen=True)
class ActivationForm:
    """How a record of activations lies. ``rows``: inputs, a multiple of 16. ``order``: "eights" (weights of 4 bits),
    "bytes" (of 8) or "sixteens" (of 2 and 3)."""

    rows: int
    parts: int
    order: str

    @property
    def num_bytes(self) -> int:
        return activation_bytes(self.rows, self.parts)

    @property
    def step_offset(self) -> int:
        """Of d; the sum of the integers is 4 bytes further on."""
        return self.parts * self.rows

    @property
    def name(self) -> str:
        return f"{self.rows}_{8 * self.parts}_{self.order}"


def form_of(layout: ColumnLayout, parts: int) -> ActivationForm:
    return ActivationForm(layout.rows, parts, _ORDER_OF_BITS[layout.bits])


def emit_record(k: Kernel, x: ir.Value, record: ir.Value, form: ActivationForm) -> None:
    """f32 [rows] at ``x`` -> a record at ``record``. For use in kernels that make activations, too."""
    emit_values(k, [k.load(F, x, 64 * i) for i in range(form.rows // LANES)], record, form)


def emit_values(k: Kernel, values: Sequence[ir.Value], record: ir.Value, form: ActivationForm) -> None:
    """The same from registers: ``rows / 16`` vectors of 16 f32.

    If a value is NaN or infinite, d is NaN, so that every result of the row is; then, and where all are next to
    nothing, the integers are 0."""
    b = k.b
    top = _largest_magnitude(k, values)  # as bits: those of positive floats are ordered as the floats are
    finite = b.icmp_signed("<", top, I32(_INFINITY_BITS))
    largest = b.bitcast(top, F32)
    some = b.and_(finite, b.fcmp_ordered(">=", largest, F32(_SMALLEST)))
    limit = F32(_LIMITS[form.parts])
    safe = b.select(some, largest, F32(1.0))
    inverse = k.splat(b.fdiv(limit, safe))
    keep = k.splat(b.select(some, I32(-1), I32(0)), I)
    total = k.splat(0, I)
    for i, x in enumerate(values):
        kept = b.bitcast(b.and_(b.bitcast(x, I), keep), F)  # converting NaN to an integer has no defined result
        q = b.fptosi(k.unary("rint", b.fmul(kept, inverse)), I)
        total = b.add(total, q)
        _store_bytes(k, q, k.at(record, LANES * i), form)
    step = b.select(some, b.fdiv(safe, limit), b.select(finite, F32(0.0), F32(float("nan"))))
    k.store(step, record, form.step_offset)
    k.store(k.total(total, b.add), record, form.step_offset + 4)


def _largest_magnitude(k: Kernel, values: Sequence[ir.Value]) -> ir.Value:
    """Bits of the largest |x|, i32; of some NaN if there is one."""

    def larger(a: ir.Value, b: ir.Value) -> ir.Value:
        return k.b.select(k.b.icmp_signed(">", a, b), a, b)

    top = k.splat(0, I)
    for x in values:
        top = larger(k.b.and_(k.b.bitcast(x, I), k.splat(0x7FFFFFFF, I)), top)
    return k.total(top, larger)


def _store_bytes(k: Kernel, q: ir.Value, where: ir.Value, form: ActivationForm) -> None:
    """16 integers at ``where``, their low bytes ``rows`` further on: 256 * ((q + 128) >> 8) + the low byte, signed."""
    b, order = k.b, _ORDERS[form.order]
    low = b.trunc(q, vec(I8))
    parts = [low]
    if form.parts == 2:
        parts = [b.trunc(b.ashr(b.add(q, k.splat(128, I)), k.splat(8, I)), vec(I8)), low]
    for part, values in enumerate(parts):
        k.store(k.shuffle(values, values, order), where, part * form.rows)


@dataclass(frozen=True)
class QuantizeRows(KernelSpec):
    """x f32 [M][stride] -> records of activations [R][M].

    Slots: 0 x, 1 records, 2 stride of x in elements, 3 R, 4 M, 5 i32 [R * rows]: which input each is, -1: none, which
    counts as 0 (0 if not ``gathered``: inputs in their own order), 6 records a chunk, 7 K, the number of inputs, of
    which none behind is read (not ``gathered``; those count as 0). Chunk c: some records of row c mod M; there are M
    times ceil(R / slot 6).
    """

    form: ActivationForm
    gathered: bool

    @property
    def name(self) -> str:
        return f"quantize_{self.form.name}{'_gathered' if self.gathered else ''}"

    def emit(self, k: Kernel) -> None:
        b, form = k.b, self.form
        records, stride, num_records, num_rows = k.pointer(1), k.size(2), k.size(3), k.size(4)
        row, first = b.srem(k.chunk, num_rows), k.mul(b.sdiv(k.chunk, num_rows), k.size(6))
        x = k.at(k.pointer(0), k.mul(4, k.mul(row, stride)))
        inputs = k.memory(4 * form.rows)
        with k.loop(k.smaller(num_records, k.add(first, k.size(6))), first) as r:
            start = k.mul(r, form.rows)
            source = self._gather(k, x, start, inputs) if self.gathered else self._pad(k, x, start, inputs)
            record = k.at(records, k.mul(form.num_bytes, k.add(k.mul(r, num_rows), row)))
            emit_record(k, source, record, form)

    def _gather(self, k: Kernel, x: ir.Value, start: ir.Value, inputs: ir.Value) -> ir.Value:
        b = k.b
        with k.loop(self.form.rows) as i:
            index = k.load(I32, k.pointer(5), k.mul(4, k.add(start, i)))
            there = b.icmp_signed(">=", index, I32(0))
            value = k.load(F32, x, k.mul(4, b.sext(b.select(there, index, I32(0)), I64)))
            k.store(b.select(there, value, F32(0.0)), inputs, k.mul(4, i))
        return inputs

    def _pad(self, k: Kernel, x: ir.Value, start: ir.Value, inputs: ir.Value) -> ir.Value:
        """Where the record's inputs are: in ``x``, or copied with zeros behind."""
        b, here = k.b, k.at(x, k.mul(4, start))
        left = b.sub(k.size(7), start)
        whole = b.icmp_signed(">=", left, I64(self.form.rows))
        with b.if_then(b.not_(whole)), k.loop(self.form.rows, step=LANES) as i:
            k.store(k.load_first(F, b.sub(left, i), here, k.mul(4, i)), inputs, k.mul(4, i))
        return b.select(whole, here, inputs)
