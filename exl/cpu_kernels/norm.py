"""RMSNorm and LayerNorm of rows, and a normalized branch added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from llvmlite import ir

from exl.cpu_kernels.ir import F32, I32, I64, LANES, I, Kernel
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.quantize import ActivationForm
from exl.cpu_kernels.vectors import Part, Records, each_part, load_part, row_of, store_part

_SUMS = 4  # vectors of partial sums: enough that additions need not wait for each other


def sum_of(k: Kernel, row: ir.Value, width: ir.Value, join: Callable[[ir.Value, ir.Value, Part], ir.Value]) -> ir.Value:
    """Of ``width`` f32: element i goes to partial sum i mod 64, and the 64 are added in a fixed tree. ``join(sum, x,
    part)``: a partial sum with one more vector, in which elements beyond the row are 0."""
    b = k.b
    sums = [k.var(k.splat(0.0)) for _ in range(_SUMS)]

    def add(which: int, part: Part) -> None:
        sums[which].set(join(sums[which].get(), load_part(k, row, part), part))

    step = LANES * _SUMS
    whole = b.and_(width, I64(-step))
    with k.loop(whole, step=step) as i:
        for j in range(_SUMS):
            add(j, Part(k.add(i, LANES * j)))
    with b.if_then(b.icmp_signed("<", whole, width)):
        for j in range(_SUMS):
            first = k.add(whole, LANES * j)
            add(j, Part(first, b.sub(width, first)))  # a count below 0 is none
    first, second, third, fourth = (total.get() for total in sums)
    return k.total(b.fadd(b.fadd(first, third), b.fadd(second, fourth)), b.fadd)


def sum_of_squares(k: Kernel, row: ir.Value, width: ir.Value) -> ir.Value:
    return sum_of(k, row, width, lambda total, x, part: k.fma(x, x, total))


def centred_squares(k: Kernel, row: ir.Value, width: ir.Value, mean: ir.Value) -> ir.Value:
    """Sum of (x - mean)^2."""
    mean = k.splat(mean)

    def join(total: ir.Value, x: ir.Value, part: Part) -> ir.Value:
        x = k.b.fsub(x, mean)
        if part.count is not None:  # of what is beyond the row the mean must not be taken
            lanes, count = ir.Constant(I, list(range(LANES))), k.splat(k.b.trunc(part.count, I32), I)
            x = k.b.select(k.b.icmp_signed("<", lanes, count), x, k.splat(0.0))
        return k.fma(x, x, total)

    return sum_of(k, row, width, join)


def rms_factor(k: Kernel, square: ir.Value, width: ir.Value, eps: ir.Value) -> ir.Value:
    """1 / sqrt(square / width + eps), f32; NaN if the sum of squares is not finite, so that a row whose squares
    overflow does not turn into zeros."""
    b = k.b
    mean = b.fadd(b.fdiv(square, b.sitofp(width, F32)), eps)
    factor = b.fdiv(F32(1.0), k.unary("sqrt", mean))
    return b.fadd(factor, b.fsub(square, square))


class _Row:
    """A row and its factor: parts of ``x * factor * weight``; ``centred``: of ``(x - mean) * factor * weight``."""

    def __init__(
        self, k: Kernel, row: ir.Value, width: ir.Value, weight: ir.Value | None, eps: ir.Value, centred: bool
    ) -> None:
        self._k, self._row, self._weight, self._mean = k, row, weight, None
        if centred:
            mean = k.b.fdiv(sum_of(k, row, width, lambda total, x, part: k.b.fadd(total, x)), k.b.sitofp(width, F32))
            square, self._mean = centred_squares(k, row, width, mean), k.splat(mean)
        else:
            square = sum_of_squares(k, row, width)
        self._factor = k.splat(rms_factor(k, square, width, eps))

    def normalized(self, part: Part) -> ir.Value:
        x = load_part(self._k, self._row, part)
        if self._mean is not None:
            x = self._k.b.fsub(x, self._mean)
        x = self._k.b.fmul(x, self._factor)
        return x if self._weight is None else self._k.b.fmul(x, load_part(self._k, self._weight, part))


@dataclass(frozen=True)
class RmsNorm(KernelSpec):
    """out = x / sqrt(mean(x^2) + eps) * weight, for each row x, as f32 (``keeps``), records of integers (``form``) or
    both; ``centred``: x less its mean instead of x, which is LayerNorm. A row whose squares do not sum to a finite
    number becomes NaN.

    Slots: 0 x f32, 1 x's stride, 2 rows i32: which row of x each row of out is made from (not read unless
    ``chosen``), 3 weight f32 [width] (not read unless ``weighted``), 4 out f32, 5 out's stride (both not read unless
    ``keeps``), 6 width, 7 eps f32; with a form also 8 records [R][M], 9 M, 10 R, 11 i32 [R * rows] as in
    ``QuantizeRows`` (not read unless ``gathered``). Strides and width in elements. A chunk is a row of out, which must
    not be x.
    """

    form: ActivationForm | None = None
    keeps: bool = True
    gathered: bool = False
    chosen: bool = False
    weighted: bool = True
    centred: bool = False

    @property
    def name(self) -> str:
        flags = [word for word in ("keeps", "gathered", "chosen", "weighted", "centred") if getattr(self, word)]
        return "_".join(["rms_norm", *([self.form.name] if self.form else []), *flags])

    def emit(self, k: Kernel) -> None:
        source, width = k.chunk, k.size(6)
        if self.chosen:
            source = k.b.sext(k.load(I32, k.pointer(2), k.mul(k.chunk, 4)), I64)
        x, weight = row_of(k, k.pointer(0), source, k.size(1)), k.pointer(3) if self.weighted else None
        row = _Row(k, x, width, weight, k.number(7), self.centred)
        if self.keeps:
            out = row_of(k, k.pointer(4), k.chunk, k.size(5))
            each_part(k, width, lambda part: store_part(k, row.normalized(part), out, part))
        if self.form is not None:
            listed = k.pointer(11) if self.gathered else None
            Records(self.form, k.pointer(8), k.chunk, k.size(9), width, listed).emit(k, k.size(10), row.normalized)


@dataclass(frozen=True)
class NormAdd(KernelSpec):
    """out = h + scale * (y / sqrt(mean(y^2) + eps) * weight), for each row: a block's output y, normalized, joins the
    residual stream h. ``centred``: y less its mean instead of y.

    Slots: 0 y f32, 1 y's stride, 2 weight f32 [width], 3 h f32, 4 h's stride, 5 out f32, 6 out's stride, 7 width,
    8 eps f32, 9 scale f32. Strides and width in elements. A chunk is a row. ``out`` must not be y; it may be h where no
    chunk is run twice.
    """

    centred: bool = False

    @property
    def name(self) -> str:
        return "norm_add" + ("_centred" if self.centred else "")

    def emit(self, k: Kernel) -> None:
        width, scale = k.size(7), k.splat(k.number(9))
        h, out = row_of(k, k.pointer(3), k.chunk, k.size(4)), row_of(k, k.pointer(5), k.chunk, k.size(6))
        y = row_of(k, k.pointer(0), k.chunk, k.size(1))
        row = _Row(k, y, width, k.pointer(2), k.number(8), self.centred)

        def body(part: Part) -> None:
            store_part(k, k.fma(scale, row.normalized(part), load_part(k, h, part)), out, part)

        each_part(k, width, body)


@dataclass(frozen=True)
class RowFactors(KernelSpec):
    """1 / sqrt(mean(x^2) + eps) of two runs of channels that lie side by side in each row: what norms of q and k over
    all heads multiply by.

    Slots: 0 x f32, 1 x's stride, 2 out f32 [rows][2], 3 and 4 widths of the runs, 5 and 6 their eps f32. Stride and
    widths in elements. A chunk is a row.
    """

    name: ClassVar = "row_factors"

    def emit(self, k: Kernel) -> None:
        start = row_of(k, k.pointer(0), k.chunk, k.size(1))
        for i, run in enumerate((start, k.at(start, k.mul(4, k.size(3))))):
            width = k.size(3 + i)
            factor = rms_factor(k, sum_of_squares(k, run, width), width, k.number(5 + i))
            k.store(factor, k.pointer(2), k.add(k.mul(8, k.chunk), 4 * i))
