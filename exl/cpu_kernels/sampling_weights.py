"""What sampling draws by: exponentials and sums of f64, with the same bits on every machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from llvmlite import ir

from exl.cpu_kernels.ir import F64, I64, Kernel, vec
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.library import Library, slots
from exl.cpu_kernels.math import exp

if TYPE_CHECKING:
    import torch

_LANES = 8  # of f64
_SUMS = 4  # vectors of partial sums: enough that additions need not wait for each other
_X = vec(F64, _LANES)
_BLOCK = _LANES * _SUMS


@dataclass(frozen=True)
class Exponentials(KernelSpec):
    """out = e^x. Slots: 0 x f64 [n], 1 out f64 [n], 2 n. One chunk."""

    name: ClassVar = "exponentials"

    def emit(self, k: Kernel) -> None:
        x, out, count = k.pointer(0), k.pointer(1), k.size(2)
        with k.loop(count, step=_LANES) as i:
            left, at = k.b.sub(count, i), k.mul(i, 8)
            k.store_first(exp(k, k.load_first(_X, left, x, at)), left, out, at)


@dataclass(frozen=True)
class Mass(KernelSpec):
    """The sum of e^x over the x that are at least a cut: element i goes to partial sum i mod 32, and the 32 are added
    in a fixed tree. Slots: 0 x f64 [n], without NaN, 1 the sum f64, 2 n, 3 the cut f64. One chunk."""

    name: ClassVar = "mass"

    def emit(self, k: Kernel) -> None:
        x, count, cut = k.pointer(0), k.size(2), k.splat(k.load(F64, k.args, 24), _X)
        sums = [k.var(k.splat(0.0, _X)) for _ in range(_SUMS)]
        whole = k.b.and_(count, I64(-_BLOCK))
        with k.loop(whole, step=_BLOCK) as i:
            self._add(k, [k.load(_X, x, k.mul(k.add(i, _LANES * j), 8)) for j in range(_SUMS)], cut, sums)
        with k.b.if_then(k.b.icmp_signed("<", whole, count)):
            left = [k.b.sub(count, k.add(whole, _LANES * j)) for j in range(_SUMS)]
            self._add(k, [self._first(k, n, x, k.mul(k.b.sub(count, n), 8)) for n in left], cut, sums)
        a, b, c, d = (total.get() for total in sums)
        k.store(k.total(k.b.fadd(k.b.fadd(a, c), k.b.fadd(b, d)), k.b.fadd), k.pointer(1))

    def _first(self, k: Kernel, count: ir.Value, x: ir.Value, offset: ir.Value) -> ir.Value:
        """The first ``count`` numbers, and behind them -inf, whose exponential is 0."""
        lanes = vec(I64, _LANES)
        there = k.b.icmp_signed("<", ir.Constant(lanes, list(range(_LANES))), k.splat(count, lanes))
        return k.b.select(there, k.load_first(_X, count, x, offset), k.splat(float("-inf"), _X))

    def _add(self, k: Kernel, values: list[ir.Value], cut: ir.Value, sums: list) -> None:
        """Blocks with nothing to add, which are most of them under top-k, cost a comparison."""
        kept = [k.b.fcmp_ordered(">=", x, cut) for x in values]
        some = kept[0]
        for more in kept[1:]:
            some = k.b.or_(some, more)
        with k.b.if_then(k.b.icmp_unsigned("!=", k.b.bitcast(some, ir.IntType(_LANES)), ir.IntType(_LANES)(0))):
            for x, keep, total in zip(values, kept, sums, strict=True):
                weight = k.b.select(keep, exp(k, x), k.splat(0.0, _X))
                total.set(k.b.fadd(total.get(), weight))


@dataclass(frozen=True)
class PrefixSums(KernelSpec):
    """out[i] = x[0] + ... + x[i], added in this order. Slots: 0 x f64 [n], 1 out f64 [n], 2 n. One chunk."""

    name: ClassVar = "prefix_sums"

    def emit(self, k: Kernel) -> None:
        x, out = k.pointer(0), k.pointer(1)
        total = k.var(F64(0.0))
        with k.loop(k.size(2)) as i:
            total.set(k.b.fadd(total.get(), k.load(F64, x, k.mul(i, 8))))
            k.store(total.get(), out, k.mul(i, 8))


class CompiledMath:
    """See ``exl.sampling.SamplingMath``; for f64 [n] on the CPU. Runs on the calling thread."""

    kernels: ClassVar = (Exponentials(), Mass(), PrefixSums())

    def __init__(self, library: Library) -> None:
        library.load(self.kernels)
        self._library = library

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        return self._map(Exponentials(), x)

    def mass(self, x: torch.Tensor, cut: float) -> float:
        x, total = x.contiguous(), np.empty(1)
        self._library.call(Mass(), slots(x.data_ptr(), total, len(x), int(np.float64(cut).view(np.int64))))
        return float(total[0])

    def cumulated(self, weights: torch.Tensor) -> torch.Tensor:
        return self._map(PrefixSums(), weights)

    def _map(self, kernel: KernelSpec, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = x.new_empty(len(x))
        self._library.call(kernel, slots(x.data_ptr(), out.data_ptr(), len(x)))
        return out
