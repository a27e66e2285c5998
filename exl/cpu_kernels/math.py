"""Functions of real numbers, by polynomials of our own: the same bits on every machine.

Libraries' and LLVM's own functions differ between processors and versions, so no kernel uses them. Each function here
is a fixed sequence of operations that IEEE 754 defines. None converts a float to an integer, which would be undefined
for NaN: the number of halvings or quarter turns is read from the low bits of a sum with 1.5 * 2^(mantissa's bits), as
in Cody and Waite, "Software Manual for the Elementary Functions" (1980). So NaN in is NaN out, in every function.

Values are vectors of f32 or f64 with any number of lanes, as each function says. Errors are in units in the last place
(ulps) of the result, the largest that tests may find.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import F32, F64, I32, I64, Kernel, vec


@dataclass(frozen=True)
class _Exp:
    """How e^x is computed in one type: with n = rint(x / ln 2) and r = x - n ln 2, |r| <= 0.35,
    e^x = 2^n (1 + r + r^2 q(r))."""

    bits: ir.IntType  # of the same width
    mantissa: int  # bits, without the hidden one
    bias: int  # of the exponent
    ln2: tuple[float, float]  # high and low part; the high one has so few bits that n * high is exact
    lowest: float  # e^x is 0 below
    highest: float  # e^x is infinite above
    q: tuple[float, ...]  # ascending powers


# q of f32: the polynomial of degree 4 with the smallest greatest relative error of e^r, 3.1e-9 (0.05 ulp), by Lawson's
# iteration in f64. q of f64: Taylor's, whose error is 0.04 ulp.
_EXPS = {
    F32: _Exp(
        I32, 23, 127, (0.693145751953125, 1.4286068203094173e-06), -105.0, 89.0,
        (0.49999994039535522, 0.1666652113199234, 0.04166838899254799, 0.008368716575205326, 0.001381459878757596),
    ),
    F64: _Exp(
        I64, 52, 1023, (0.6931471804855391, 7.440617110012397e-11), -746.0, 710.0,
        tuple(1 / math.factorial(i) for i in range(2, 14)),
    ),
}  # fmt: skip

# pi / 2 to 106 bits.
_QUARTER = (1.5707963267948966, 6.123233995736766e-17)
_LARGEST_ANGLE = 2.0**31
_SIN = tuple((-1) ** i / math.factorial(2 * i + 1) for i in range(1, 6))  # (sin r - r) / r^3, in powers of r^2
_COS = tuple((-1) ** i / math.factorial(2 * i) for i in range(1, 6))  # (cos r - 1) / r^2, in powers of r^2


def exp(k: Kernel, x: ir.Value) -> ir.Value:
    """e^x of f32 (error at most 1 ulp, also where the result is denormal) or f64 (1 ulp), for all x.

    Infinite where the exact value rounds to that, 0 for -inf and all x whose exact value rounds to 0.
    """
    x = _between(k, x, _EXPS[x.type.element].lowest, _EXPS[x.type.element].highest)
    n, r = _reduced(k, x)
    y = k.b.fadd(_expm1_of_reduced(k, r), k.splat(1.0, x.type))
    # In two steps, neither of which leaves the exponents' range: e^89 is 2^128 times something, e^-104 is denormal.
    half = k.b.ashr(n, k.splat(1, n.type))
    y = k.b.fmul(y, _power_of_two(k, half, x.type))
    return k.b.fmul(y, _power_of_two(k, k.b.sub(n, half), x.type))


def tanh(k: Kernel, x: ir.Value) -> ir.Value:
    """tanh of f32, for all x; error at most 2.5 ulps. With E = e^2|x| - 1, it is E / (E + 2), and the sign of x."""
    one = k.splat(1.0, x.type)
    size = k.unary("fabs", x)
    n, r = _reduced(k, k.b.fadd(*[_between(k, size, 0.0, 10.0)] * 2))  # beyond 10, tanh rounds to 1
    power = _power_of_two(k, n, x.type)
    e = k.fma(power, _expm1_of_reduced(k, r), k.b.fsub(power, one))
    y = k.b.fdiv(e, k.b.fadd(e, k.splat(2.0, x.type)))
    return k.call(f"llvm.copysign.v{x.type.count}f32", x.type, y, x)


def times_sigmoid(k: Kernel, a: ir.Value, x: ir.Value) -> ir.Value:
    """a / (1 + e^-x) of f32: silu where a = x. Error at most 3 ulps, and more only where the result is below 1e-36,
    because e^x is denormal there."""
    e = exp(k, k.b.fneg(k.unary("fabs", x)))  # e^-|x| cannot overflow
    negative = k.b.fcmp_ordered("<", x, k.splat(0.0, x.type))
    top = k.b.select(negative, k.b.fmul(a, e), a)
    return k.b.fdiv(top, k.b.fadd(e, k.splat(1.0, x.type)))


def silu(k: Kernel, x: ir.Value) -> ir.Value:
    """x / (1 + e^-x) of f32; as exact as ``times_sigmoid``. NaN for -inf, as torch's."""
    return times_sigmoid(k, x, x)


def gelu_tanh(k: Kernel, x: ir.Value) -> ir.Value:
    """x (1 + tanh u) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3), of f32.

    Relative error at most 3 ulps + 2^-23 * |2u|, as e^-2u takes u's rounding with it: 2.5e-6 for x > -5, where the
    value is above 2e-7 in size. NaN for -inf, as torch's.
    """
    scale = 2 * math.sqrt(2 / math.pi)
    inner = k.fma(k.b.fmul(x, x), k.splat(0.044715 * scale, x.type), k.splat(scale, x.type))
    return times_sigmoid(k, x, k.b.fmul(x, inner))


def cos_sin(k: Kernel, angle: ir.Value) -> tuple[ir.Value, ir.Value]:
    """cos and sin of f32 angles in radians, as f32: error at most 0.501 ulp for |angle| < 2^31, else NaN.

    In f64: with n = rint(angle / (pi / 2)), r = angle - n pi / 2 is off by less than 2^-53 of itself plus n * 2^-107,
    and no f32 below 2^31 is so near a multiple of pi / 2 that this shows in f32.
    """
    type_, lanes = vec(F64, angle.type.count), angle.type.count
    inside = k.b.fcmp_ordered("<", k.unary("fabs", angle), k.splat(_LARGEST_ANGLE, angle.type))
    x = k.b.fpext(k.b.select(inside, angle, k.splat(math.nan, angle.type)), type_)
    n, turns = _rint(k, x, 2 / math.pi)
    r = k.fma(n, k.splat(-_QUARTER[0], type_), x)
    r = k.fma(n, k.splat(-_QUARTER[1], type_), r)
    square = k.b.fmul(r, r)
    sin = k.fma(k.b.fmul(r, square), _polynomial(k, square, _SIN), r)
    cos = k.fma(square, _polynomial(k, square, _COS), k.splat(1.0, type_))
    bits = vec(I64, lanes)

    def bit(value: ir.Value, which: int) -> ir.Value:
        return k.b.icmp_signed("!=", k.b.and_(value, k.splat(which, bits)), k.splat(0, bits))

    swapped = bit(turns, 1)
    a, b = k.b.select(swapped, sin, cos), k.b.select(swapped, cos, sin)
    a = k.b.select(bit(k.b.add(turns, k.splat(1, bits)), 2), k.b.fneg(a), a)
    b = k.b.select(bit(turns, 2), k.b.fneg(b), b)
    return k.b.fptrunc(a, angle.type), k.b.fptrunc(b, angle.type)


def _polynomial(k: Kernel, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
    """Horner's rule; ``coefficients`` of ascending powers."""
    y = k.splat(coefficients[-1], x.type)
    for coefficient in coefficients[-2::-1]:
        y = k.fma(y, x, k.splat(coefficient, x.type))
    return y


def _between(k: Kernel, x: ir.Value, low: float, high: float) -> ir.Value:
    """x, or the bound that it is beyond; NaN stays."""
    x = k.maximum(k.splat(low, x.type), x)
    high = k.splat(high, x.type)
    return k.b.select(k.b.fcmp_ordered("<", high, x), high, x)


def _rint(k: Kernel, x: ir.Value, factor: float) -> tuple[ir.Value, ir.Value]:
    """x * factor rounded to an integer below 2^(mantissa's bits - 1), as a float and as an integer of the same width.

    The integer is some number if x is NaN or too large, the float then is NaN or far from x * factor.
    """
    parts = _EXPS[x.type.element]
    magic = k.splat(1.5 * 2.0**parts.mantissa, x.type)
    bits = vec(parts.bits, x.type.count)
    shifted = k.fma(x, k.splat(factor, x.type), magic)
    return k.b.fsub(shifted, magic), k.b.sub(k.b.bitcast(shifted, bits), k.b.bitcast(magic, bits))


def _reduced(k: Kernel, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(n as integers, r as floats) such that x = n ln 2 + r."""
    high, low = _EXPS[x.type.element].ln2
    n, number = _rint(k, x, 1 / math.log(2))
    r = k.fma(n, k.splat(-high, x.type), x)
    return number, k.fma(n, k.splat(-low, x.type), r)


def _expm1_of_reduced(k: Kernel, r: ir.Value) -> ir.Value:
    """e^r - 1 for |r| <= 0.35."""
    return k.fma(k.b.fmul(r, r), _polynomial(k, r, _EXPS[r.type.element].q), r)


def _power_of_two(k: Kernel, n: ir.Value, type_: ir.VectorType) -> ir.Value:
    """2^n for an n that is a normal number's exponent."""
    parts = _EXPS[type_.element]
    exponent = k.b.add(n, k.splat(parts.bias, n.type))
    return k.b.bitcast(k.b.shl(exponent, k.splat(parts.mantissa, n.type)), type_)
