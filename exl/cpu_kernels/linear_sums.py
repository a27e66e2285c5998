"""The exact integer sums of a record: some rows of activations times some vectors of columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import I8, I16, I32, Kernel, Var, vec
from exl.cpu_kernels.linear_codes import ByteSource, WordSource
from exl.cpu_kernels.quantize import ActivationForm

# Of unsigned codes up to 15, or up to 24, times signed bytes, in pairs, that 16 bits hold: 8 * 2 * 15 * 128 = 30720 and
# 4 * 2 * 24 * 128 = 24576.
_MOST_STEPS = {"int": 8, "fp4": 4}

_Totals = list[list[ir.Value]]  # i32 [rows][vectors of columns]
_Term = tuple[int, int, int, int]  # row, part of the activations, plane of the codes, vector of columns


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


def integer_sums(k: Kernel, source: WordSource | ByteSource, x: ir.Value, form: ActivationForm, tile: Tile) -> _Totals:
    """[rows][vectors] i32: the sum of code * q of a record. ``x``: the record of the tile's first row, which the other
    rows' follow."""
    sums = _Sums(k, source, x, form, tile)
    add = sums.pairs if k.isa == "avx2" else sums.dots
    totals = [[k.splat(0, sums.type)] * tile.vectors for _ in range(tile.rows)]
    for parts in tile.passes(form.parts):
        totals = add(parts, totals)
    return totals


@dataclass(frozen=True)
class _Sums:
    k: Kernel
    source: WordSource | ByteSource
    x: ir.Value
    form: ActivationForm
    tile: Tile

    @property
    def type(self) -> ir.VectorType:
        return vec(I32, self.tile.lanes)

    def dots(self, parts: list[int], totals: _Totals) -> _Totals:
        """``totals`` + some parts, by dot products of four bytes that add to 32 bits."""
        k, inputs = self.k, max(16, self.source.form.inputs)
        sums = {term: self._first(term, totals) for term in self._terms(parts)}
        with k.loop(self.form.rows, step=inputs) as i:
            for term, codes, values in self._products(i, inputs, parts):
                sums[term].set(k.dot4(sums[term].get(), codes, values))
        if all(self._shift(term) for term in sums):  # none has begun with ``totals``
            found = [list(row) for row in totals]
        else:
            found = [[k.splat(0, self.type)] * self.tile.vectors for _ in totals]
        for term, value in sums.items():
            row, _, _, v = term
            shifted = k.b.shl(value.get(), k.splat(self._shift(term), self.type))
            found[row][v] = k.b.add(found[row][v], shifted)
        return found

    def pairs(self, parts: list[int], totals: _Totals) -> _Totals:
        """The same by products of bytes added in pairs to 16 bits, as many steps as those hold, and only then to 32:
        with AVX2 the step to 32 bits costs as much as the products. It also weighs parts and planes, so one sum takes
        all."""
        k, b = self.k, self.k.b
        most = 4 * _MOST_STEPS[self.source.form.kind]
        inputs = most if self.form.rows % most == 0 else 16
        sums = [[k.var(total) for total in row] for row in totals]
        with k.loop(self.form.rows, step=inputs) as i:
            pairs: dict[_Term, ir.Value] = {}
            for term, codes, values in self._products(i, inputs, parts):
                product = _pair_products(k, codes, values)
                pairs[term] = b.add(pairs[term], product) if term in pairs else product
            for term, pair in pairs.items():
                row, _, _, v = term
                worth = k.splat(1 << self._shift(term), pair.type)
                total = k.call("llvm.x86.avx2.pmadd.wd", self.type, pair, worth)
                sums[row][v].set(b.add(sums[row][v].get(), total))
        return [[total.get() for total in row] for row in sums]

    def _terms(self, parts: list[int]) -> Iterator[_Term]:
        planes = range(len(self.source.form.weights))
        return itertools.product(range(self.tile.rows), parts, planes, range(self.tile.vectors))

    def _products(self, i: ir.Value, inputs: int, parts: list[int]) -> Iterator[tuple[_Term, ir.Value, ir.Value]]:
        """What is multiplied in ``inputs`` inputs from ``i`` on: codes and values, four inputs of a column a lane."""
        k, form, tile = self.k, self.form, self.tile
        xi = k.at(self.x, i)
        for step, codes in enumerate(self.source.steps(k, i, inputs, tile.columns, tile.lanes)):
            for row, part in itertools.product(range(tile.rows), parts):
                four = k.load(I32, xi, row * form.num_bytes + part * form.rows + 4 * step)
                values = k.splat(four, self.type)
                for plane, vectors in enumerate(codes):
                    for v, vector in enumerate(vectors):
                        yield (row, part, plane, v), vector, values
            k.barrier()

    def _shift(self, term: _Term) -> int:
        """Bits by which a term counts more: the high part of activations, the high halves of codes."""
        _, part, plane, _ = term
        return (8 if self.form.parts == 2 and part == 0 else 0) + 4 * plane

    def _first(self, term: _Term, totals: _Totals) -> Var:
        row, _, _, v = term
        return self.k.var(self.k.splat(0, self.type) if self._shift(term) else totals[row][v])


def _pair_products(k: Kernel, codes: ir.Value, values: ir.Value) -> ir.Value:
    """i16: code * q + the next code * q, exact."""
    lanes = codes.type.count
    codes, values = (k.b.bitcast(value, vec(I8, 4 * lanes)) for value in (codes, values))
    return k.call("llvm.x86.avx2.pmadd.ub.sw", vec(I16, 2 * lanes), codes, values)
