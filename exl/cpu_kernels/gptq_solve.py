"""GPTQ's inner loop: grids fitted to groups of weights, and weights rounded with their errors passed on.

Lanes are columns, the outputs of a linear, which are independent given the inverse Hessian's factor. Each operation
rounds as torch's do, one by one and without a fused multiply-add, and sums are in the order of ``grid.sum_rows``, so
that ``exl/quantize/grid.py`` and ``rounding.TorchRounding`` give the same bits; the formulas are explained there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import F16, F32, F64, I64, Kernel, Var, vec
from exl.cpu_kernels.kernel import KernelSpec

_VECTORS = 4  # in a chunk: enough chains of subtractions for them not to wait for each other
_ELEMENTS = {"f32": (F32, 16), "f64": (F64, 8)}  # lanes of 64 bytes
SUMS = 8  # partial sums over rows: row r goes to sum r mod 8
MOST_ROWS = 128  # of a block, and of a group whose grid is fitted within one


def chunk_columns(element: str) -> int:
    return _VECTORS * _ELEMENTS[element][1]


@dataclass(frozen=True)
class GridForm:
    """A ``quantize.grid.Grid``, and the type of the weights and of all arithmetic: "f32" or "f64"."""

    bits: int
    sym: bool
    min_zero: int
    element: str

    @property
    def name(self) -> str:
        return f"{self.element}_{self.bits}_{'sym' if self.sym else f'from{self.min_zero}'}"

    @property
    def vector(self) -> ir.VectorType:
        return vec(*_ELEMENTS[self.element])

    @property
    def num_bytes(self) -> int:
        return 4 if self.element == "f32" else 8

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1


class _Fit:
    """Writes the search for one vector of columns; ``load(row)`` gives the weights of a row below ``rows``."""

    def __init__(self, k: Kernel, form: GridForm, load: Callable[[ir.Value], ir.Value], rows: ir.Value) -> None:
        self.k, self.form, self.load, self.rows = k, form, load, rows

    def emit(self, factors: ir.Value, num_factors: ir.Value, refits: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Scale and zero. ``factors``: of the span, of the weights' type; the first is 1."""
        k, b, form = self.k, self.k.b, self.form
        low, high = self._span()
        first_scale, first_zero = self._params(low, high)
        scale, zero = k.var(first_scale), k.var(first_zero)
        least = k.var(k.splat(float("inf"), form.vector))
        with k.loop(num_factors) as i:
            factor = k.splat(k.load(form.vector.element, factors, k.mul(i, form.num_bytes)), form.vector)
            self._consider(*self._params(b.fmul(low, factor), b.fmul(high, factor)), least, scale, zero)
        with k.loop(refits):
            now, fixed = scale.get(), zero.get()

            def terms(w: ir.Value) -> tuple[ir.Value, ir.Value]:
                steps = b.fsub(emit_codes(k, form, w, now, fixed), fixed)
                return b.fmul(w, steps), b.fmul(steps, steps)

            product, square = self._sums(terms, 2)
            best = b.fdiv(product, _at_least(k, square, 1.0))
            self._consider(self._round_to_f16(best), fixed, least, scale, zero)
        return scale.get(), zero.get()

    def _each_row(self, body: Callable[[int, ir.Value], None]) -> None:
        """``body(row mod SUMS, weights)``; rows past the end are zeros, which change no span and no sum."""
        k = self.k
        with k.loop(self.rows, step=SUMS) as row:
            for j in range(SUMS):
                body(j, self.load(k.add(row, j)))

    def _span(self) -> tuple[ir.Value, ir.Value]:
        k, b, form = self.k, self.k.b, self.form
        low, high = (k.var(k.splat(0.0, form.vector)) for _ in range(2))

        def extend(_: int, w: ir.Value) -> None:
            low.set(b.select(b.fcmp_ordered("<", w, low.get()), w, low.get()))
            high.set(b.select(b.fcmp_ordered(">", w, high.get()), w, high.get()))

        self._each_row(extend)
        bottom, top = low.get(), high.get()
        if form.sym:
            top = _at_least(k, top, b.fneg(bottom))
            bottom = b.fneg(top)
        empty = b.fcmp_ordered("==", bottom, top)
        return tuple(b.select(empty, k.splat(end, form.vector), x) for end, x in ((-1.0, bottom), (1.0, top)))

    def _params(self, low: ir.Value, high: ir.Value) -> tuple[ir.Value, ir.Value]:
        k, b, form = self.k, self.k.b, self.form
        scale = self._round_to_f16(b.fdiv(b.fsub(high, low), k.splat(float(form.max_code), form.vector)))
        if form.sym:
            return scale, k.splat(float(1 << (form.bits - 1)), form.vector)
        zero = k.unary("rint", b.fdiv(b.fneg(low), scale))
        return scale, _clamp(k, zero, float(form.min_zero), float(form.max_code))

    def _round_to_f16(self, scale: ir.Value) -> ir.Value:
        """The nearest f16 above 0. From f64 by way of f32, as torch does."""
        k, b, lanes = self.k, self.k.b, self.form.vector.count
        scale = _clamp(k, scale, 2.0**-24, 65504.0)
        if self.form.element == "f64":
            scale = b.fptrunc(scale, vec(F32, lanes))
        return b.fpext(b.fptrunc(scale, vec(F16, lanes)), self.form.vector)

    def _consider(self, scale: ir.Value, zero: ir.Value, least: Var, best_scale: Var, best_zero: Var) -> None:
        k, b, form = self.k, self.k.b, self.form

        def square(w: ir.Value) -> tuple[ir.Value]:
            code = emit_codes(k, form, w, scale, zero)
            error = b.fsub(b.fmul(b.fsub(code, zero), scale), w)
            return (b.fmul(error, error),)

        (error,) = self._sums(square, 1)
        better = b.fcmp_ordered("<", error, least.get())
        for old, new in ((least, error), (best_scale, scale), (best_zero, zero)):
            old.set(b.select(better, new, old.get()))

    def _sums(self, terms: Callable[[ir.Value], Sequence[ir.Value]], count: int) -> list[ir.Value]:
        k, b = self.k, self.k.b
        parts = [[k.var(k.splat(0.0, self.form.vector)) for _ in range(SUMS)] for _ in range(count)]

        def add(j: int, w: ir.Value) -> None:
            for part, term in zip(parts, terms(w), strict=True):
                part[j].set(b.fadd(part[j].get(), term))

        self._each_row(add)
        totals = []
        for part in parts:
            values = [p.get() for p in part]
            while len(values) > 1:
                half = len(values) // 2
                values = [b.fadd(x, y) for x, y in zip(values[:half], values[half:], strict=True)]
            totals += values
        return totals


def _at_least(k: Kernel, x: ir.Value, low: ir.Value | float) -> ir.Value:
    low = low if isinstance(low, ir.Value) else k.splat(low, x.type)
    return k.b.select(k.b.fcmp_ordered(">", x, low), x, low)


def _clamp(k: Kernel, x: ir.Value, low: float, high: float) -> ir.Value:
    x, high = _at_least(k, x, low), k.splat(high, x.type)
    return k.b.select(k.b.fcmp_ordered("<", x, high), x, high)


def emit_codes(k: Kernel, form: GridForm, w: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
    """The nearest codes, as whole numbers in the type of ``w``."""
    return _clamp(k, k.b.fadd(k.unary("rint", k.b.fdiv(w, scale)), zero), 0.0, float(form.max_code))


@dataclass(frozen=True)
class FitGrids(KernelSpec):
    """Scale and zero of every group of inputs and column.

    Slots, in elements of the form's type: 0 weight [G * n, N], 1 N, 2 n, 3 scales out [G, N], 4 zeros out [G, N],
    5 factors of the span [F], 6 F, 7 refits, 8 column blocks B = ceil(N / ``chunk_columns``). Chunk g * B + c is a
    block of columns of group g.
    """

    form: GridForm

    @property
    def name(self) -> str:
        return f"fit_grids_{self.form.name}"

    def emit(self, k: Kernel) -> None:
        b, form = k.b, self.form
        weight, scales, zeros, factors = (k.pointer(i) for i in (0, 3, 4, 5))
        N, n, num_factors, refits, blocks = (k.size(i) for i in (1, 2, 6, 7, 8))
        group, block = b.udiv(k.chunk, blocks), b.urem(k.chunk, blocks)
        with k.loop(_VECTORS) as v:
            column = k.mul(k.add(k.mul(block, _VECTORS), v), form.vector.count)
            count = b.sub(N, column)
            first = k.mul(group, n)

            def load(row: ir.Value) -> ir.Value:
                there = b.select(b.icmp_signed("<", row, n), count, I64(0))
                place = k.add(k.mul(k.add(first, row), N), column)
                return k.load_first(form.vector, there, weight, k.mul(place, form.num_bytes))

            found = _Fit(k, form, load, n).emit(factors, num_factors, refits)
            place = k.mul(k.add(k.mul(group, N), column), form.num_bytes)
            for value, out in zip(found, (scales, zeros), strict=True):
                k.store_first(value, count, out, place)


@dataclass(frozen=True)
class RoundBlock(KernelSpec):
    """A block of inputs, rounded one after the other; each one's error changes the block's later inputs.

    Slots, in elements of the form's type: 0 weight [n, N], 1 N, 2 n <= ``MOST_ROWS``, 3 the block's factor,
    transposed: U[i, j] at [j, i] of [n, n], 4 scales [G, N], 5 zeros [G, N], 6 group of each input i64 [n], 7 codes out
    [n, N], 8 errors out [n, N], divided by U's diagonal; and if the form ``fits``: 9 inputs in a group, of which n is
    a multiple or the last is short, 10 factors of the span, 11 their number, 12 refits. A group's grid is then fitted
    when its first input is reached, and slots 4 and 5 are written. A chunk is ``chunk_columns`` columns.
    """

    form: GridForm
    fits: bool

    @property
    def name(self) -> str:
        return f"{'fit_and_' if self.fits else ''}round_block_{self.form.name}"

    def emit(self, k: Kernel) -> None:
        _Block(k, self.form, self.fits).emit()


class _Block:
    """Writes one chunk of ``RoundBlock``. Weights and errors of the chunk's columns are kept in the cache."""

    def __init__(self, k: Kernel, form: GridForm, fits: bool) -> None:
        self.k, self.form, self.fits = k, form, fits
        self.N, self.n = k.size(1), k.size(2)
        self.column = k.mul(k.chunk, _VECTORS * form.vector.count)
        self.counts = [k.b.sub(self.N, k.add(self.column, j * form.vector.count)) for j in range(_VECTORS)]
        self.row_bytes = _VECTORS * 64
        self.weights = k.memory((MOST_ROWS + SUMS) * self.row_bytes)
        self.errors = k.memory(MOST_ROWS * self.row_bytes)
        self.grid = k.memory(2 * self.row_bytes)  # scales and zeros

    def emit(self) -> None:
        k, b = self.k, self.k.b
        if not self.fits:
            with k.loop(self.n) as row:
                self._round(row, self._updated(row, self._load(row), 0))
            return
        group_size = k.size(9)
        with k.loop(b.sdiv(k.add(self.n, k.add(group_size, -1)), group_size)) as g:
            start = k.mul(g, group_size)
            stop = k.smaller(k.add(start, group_size), self.n)
            with k.loop(stop, start) as row:
                self._keep(self.weights, row, self._updated(row, self._load(row), 0, start))
            self._fit(start, k.b.sub(stop, start))
            with k.loop(stop, start) as row:
                kept = [k.load(self.form.vector, self.weights, self._kept(row, j), 64) for j in range(_VECTORS)]
                self._round(row, self._updated(row, kept, start))

    def _load(self, row: ir.Value) -> list[ir.Value]:
        k, place = self.k, self._place(row)
        pointer = k.pointer(0)
        return [k.load_first(self.form.vector, self.counts[j], pointer, k.add(place, 64 * j)) for j in range(_VECTORS)]

    def _updated(
        self, row: ir.Value, values: list[ir.Value], start: ir.Value | int, stop: ir.Value | None = None
    ) -> list[ir.Value]:
        """Less the errors of the inputs ``start`` to ``stop`` (None: up to this one), one after the other."""
        k, b, form = self.k, self.k.b, self.form
        now = [k.var(value) for value in values]
        factor = k.at(k.pointer(3), k.mul(k.mul(row, self.n), form.num_bytes))
        with k.loop(row if stop is None else stop, start) as i:
            u = k.splat(k.load(form.vector.element, factor, k.mul(i, form.num_bytes)), form.vector)
            for j, value in enumerate(now):
                error = k.load(form.vector, self.errors, self._kept(i, j), 64)
                value.set(b.fsub(value.get(), b.fmul(u, error)))
        return [value.get() for value in now]

    def _fit(self, start: ir.Value, rows: ir.Value) -> None:
        k, b, form = self.k, self.k.b, self.form
        group = k.load(I64, k.pointer(6), k.mul(start, 8))
        place = k.mul(k.add(k.mul(group, self.N), self.column), form.num_bytes)
        with k.loop(_VECTORS) as j:
            offset = k.mul(j, 64)

            def load(row: ir.Value) -> ir.Value:
                w = k.load(form.vector, self.weights, k.add(k.mul(k.add(start, row), self.row_bytes), offset), 64)
                return b.select(b.icmp_signed("<", row, rows), w, k.splat(0.0, form.vector))

            found = _Fit(k, form, load, rows).emit(k.pointer(10), k.size(11), k.size(12))
            count = b.sub(b.sub(self.N, self.column), k.mul(j, form.vector.count))
            for value, slot in zip(found, (4, 5), strict=True):
                k.store(value, self.grid, k.add(offset, (slot - 4) * self.row_bytes), 64)
                k.store_first(value, count, k.pointer(slot), k.add(place, offset))

    def _round(self, row: ir.Value, values: list[ir.Value]) -> None:
        k, b, form = self.k, self.k.b, self.form
        diagonal = k.load(form.vector.element, k.pointer(3), k.mul(k.mul(row, k.add(self.n, 1)), form.num_bytes))
        place = self._place(row)
        errors = []
        for j, w in enumerate(values):
            scale, zero = self._grid_of(row, j)
            code = emit_codes(k, form, w, scale, zero)
            error = b.fsub(w, b.fmul(b.fsub(code, zero), scale))
            errors.append(b.fdiv(error, k.splat(diagonal, form.vector)))
            k.store_first(code, self.counts[j], k.pointer(7), k.add(place, 64 * j))
            k.store_first(errors[j], self.counts[j], k.pointer(8), k.add(place, 64 * j))
        self._keep(self.errors, row, errors)

    def _grid_of(self, row: ir.Value, j: int) -> tuple[ir.Value, ir.Value]:
        k, form = self.k, self.form
        if self.fits:
            return tuple(k.load(form.vector, self.grid, 64 * j + i * self.row_bytes, 64) for i in range(2))
        group = k.load(I64, k.pointer(6), k.mul(row, 8))
        place = k.add(self._place(group), 64 * j)
        scale, zero = (k.load_first(form.vector, self.counts[j], k.pointer(slot), place) for slot in (4, 5))
        # Columns past the end have no scale; they are computed with 1 and not stored.
        there = k.b.fcmp_ordered(">", scale, k.splat(0.0, form.vector))
        return k.b.select(there, scale, k.splat(1.0, form.vector)), zero

    def _place(self, row: ir.Value) -> ir.Value:
        """Of the chunk's first column in a row of [., N], in bytes."""
        return self.k.mul(self.k.add(self.k.mul(row, self.N), self.column), self.form.num_bytes)

    def _kept(self, row: ir.Value, j: int) -> ir.Value:
        return self.k.add(self.k.mul(row, self.row_bytes), 64 * j)

    def _keep(self, memory: ir.Value, row: ir.Value, values: list[ir.Value]) -> None:
        for j, value in enumerate(values):
            self.k.store(value, memory, self._kept(row, j), 64)
