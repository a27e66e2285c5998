"""The exact integer sums of a record: some rows of activations times some vectors of columns."""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import I16, I32, Kernel, Var, vec
from exl.cpu_kernels.linear_codes import ByteSource, WordSource
from exl.cpu_kernels.quantize import ActivationForm

_MOST_STEPS = 8  # of unsigned codes up to 15 times signed bytes, in pairs, that 16 bits hold: 8 * 2 * 15 * 128 = 30720


@dataclass(frozen=True)
class Tile:
    """``rows`` of activations times ``vectors`` of ``lanes`` columns; ``together``: the parts of the activations in one
    pass over the codes, which costs accumulators, instead of one after the other, which costs reading codes twice."""

    rows: int
    vectors: int
    lanes: int
    together: bool

    @property
    def columns(self) -> list[int]:
        return [v * self.lanes for v in range(self.vectors)]

    def passes(self, parts: int) -> list[list[int]]:
        return [list(range(parts))] if self.together else [[part] for part in range(parts)]


def integer_sums(
    k: Kernel, source: WordSource | ByteSource, x: ir.Value, form: ActivationForm, tile: Tile
) -> list[list[ir.Value]]:
    """[rows][vectors] i32: the sum of code * q of a record. ``x``: the record of the tile's first row, which the other
    rows' follow."""
    add = _add_pairs if k.isa == "avx2" else _add_dots
    totals = None
    for parts in tile.passes(form.parts):
        totals = add(k, source, x, form, tile, parts, totals)
    return totals


def _shift(form: ActivationForm, part: int, plane: int) -> int:
    """Bits by which a sum of one part of the activations and one plane of the codes counts more."""
    return (8 if form.parts == 2 and part == 0 else 0) + 4 * plane


def _value(k: Kernel, x: ir.Value, form: ActivationForm, row: int, part: int, step: int, lanes: int) -> ir.Value:
    """Four inputs' bytes in every lane."""
    return k.splat(k.load(I32, x, row * form.num_bytes + part * form.rows + 4 * step), vec(I32, lanes))


def _add_dots(k, source, x, form: ActivationForm, tile: Tile, parts, totals):
    """By dot products of four bytes that add to 32 bits."""
    vectors, planes = range(tile.vectors), range(len(source.form.weights))
    accumulators: dict[tuple[int, int, int, int], Var] = {}
    for part in parts:
        for plane in planes:
            for row in range(tile.rows):
                for v in vectors:
                    first = k.splat(0, vec(I32, tile.lanes))
                    if totals and _shift(form, part, plane) == 0:
                        first = totals[row][v]
                    accumulators[part, plane, row, v] = k.var(first)
    inputs = max(16, source.form.inputs)
    with k.loop(form.rows, step=inputs) as i:
        xi = k.at(x, i)
        for step, codes in enumerate(source.steps(k, i, inputs, tile.columns, tile.lanes)):
            for row in range(tile.rows):
                for part in parts:
                    value = _value(k, xi, form, row, part, step, tile.lanes)
                    for plane in planes:
                        for v in vectors:
                            sum_ = accumulators[part, plane, row, v]
                            sum_.set(k.dot4(sum_.get(), codes[plane][v], value))
            k.barrier()
    return [[_combined(k, form, accumulators, row, v) for v in vectors] for row in range(tile.rows)]


def _combined(k, form, accumulators, row, v) -> ir.Value:
    """The sums of all parts and planes, each by its worth."""
    total = None
    for (part, plane, of_row, of_v), sum_ in accumulators.items():
        if (of_row, of_v) != (row, v):
            continue
        value, shift = sum_.get(), _shift(form, part, plane)
        if shift:
            value = k.b.shl(value, k.splat(shift, value.type))
        total = value if total is None else k.b.add(total, value)
    return total


def _add_pairs(k, source, x, form: ActivationForm, tile: Tile, parts, totals):
    """By products of bytes added in pairs to 16 bits, as many steps as those hold, and only then to 32: with AVX2 the
    step to 32 bits costs as much as the products. It also weighs parts and planes, so one accumulator takes all."""
    b, vectors, rows, planes = k.b, range(tile.vectors), range(tile.rows), range(len(source.form.weights))
    halves, wide = vec(I16, 2 * tile.lanes), vec(I32, tile.lanes)
    sums = [[k.var(totals[row][v] if totals else k.splat(0, wide)) for v in vectors] for row in rows]
    inputs = 4 * _MOST_STEPS if form.rows % (4 * _MOST_STEPS) == 0 else 16
    with k.loop(form.rows, step=inputs) as i:
        xi, pairs = k.at(x, i), {}
        for step, codes in enumerate(source.steps(k, i, inputs, tile.columns, tile.lanes)):
            for row in rows:
                for part in parts:
                    value = _value(k, xi, form, row, part, step, tile.lanes)
                    for plane in planes:
                        for v in vectors:
                            product = _pair_products(k, codes[plane][v], value)
                            before = pairs.get((row, part, plane, v))
                            pairs[row, part, plane, v] = b.add(before, product) if before else product
            k.barrier()
        for (row, part, plane, v), pair in pairs.items():
            worth = k.splat(1 << _shift(form, part, plane), halves)
            total = k.call("llvm.x86.avx2.pmadd.wd", wide, pair, worth)
            sums[row][v].set(b.add(sums[row][v].get(), total))
    return [[sums[row][v].get() for v in vectors] for row in rows]


def _pair_products(k: Kernel, codes: ir.Value, values: ir.Value) -> ir.Value:
    """i16: code * q + the next code * q, exact."""
    lanes = codes.type.count
    bytes_ = [k.b.bitcast(value, vec(ir.IntType(8), 4 * lanes)) for value in (codes, values)]
    return k.call("llvm.x86.avx2.pmadd.ub.sw", vec(I16, 2 * lanes), *bytes_)
