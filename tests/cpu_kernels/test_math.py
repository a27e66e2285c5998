"""Functions of numbers against mpmath and NumPy's float64 or longdouble, in ulps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray

from exl.cpu_kernels import math as own
from exl.cpu_kernels.ir import F32, F64, Kernel, vec
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.library import Library, slots

LANES = 16


@dataclass(frozen=True)
class Apply(KernelSpec):
    """Slots: 0 x [n], 1 out [n] (cos, then sin [n] for ``cos_sin``), 2 n, a multiple of 16."""

    function: str
    bits: int = 32
    functions: ClassVar = {"exp", "tanh", "silu", "gelu_tanh", "cos_sin"}

    @property
    def name(self) -> str:
        return f"apply_{self.function}_{self.bits}"

    def emit(self, k: Kernel) -> None:
        x, out, count = k.pointer(0), k.pointer(1), k.size(2)
        size = self.bits // 8
        with k.loop(count, step=LANES) as i:
            value = k.load(vec(F32 if size == 4 else F64, LANES), x, k.mul(i, size))
            result = getattr(own, self.function)(k, value)
            for number, part in enumerate(result if isinstance(result, tuple) else (result,)):
                k.store(part, out, k.mul(k.add(i, k.mul(count, number)), size))


@pytest.fixture
def apply(library: Library) -> Callable[[str, NDArray], NDArray]:
    def run(function: str, x: NDArray) -> NDArray:
        padded = np.zeros(-(-len(x) // LANES) * LANES, x.dtype)
        padded[: len(x)] = x
        out = np.empty((2 if function == "cos_sin" else 1, len(padded)), x.dtype)
        library.call(Apply(function, x.itemsize * 8), slots(padded, out, len(padded)))
        return out[0, : len(x)] if len(out) == 1 else out[:, : len(x)]

    return run


def ulps(found: NDArray, exact: NDArray) -> float:
    """The largest error, in distances between neighbours of ``found``'s type; ``exact`` in a wider one."""
    spacing = np.spacing(np.abs(exact).astype(found.dtype)).astype(exact.dtype)
    return float(np.max(np.abs(found.astype(exact.dtype) - exact) / spacing))


def spread(low: float, high: float, count: int = 200_000) -> NDArray[np.float32]:
    """Both evenly spaced numbers and numbers of all magnitudes."""
    rng = np.random.default_rng(3)
    small = rng.choice([-1, 1], count) * np.exp(rng.uniform(-80, np.log(max(-low, high)), count))
    both = np.concatenate([np.linspace(low, high, count), small])
    return np.clip(both, low, high).astype(np.float32)


def test_exp_of_f32(apply):
    x = spread(-103.9, 88.7)
    assert ulps(apply("exp", x), np.exp(x.astype(np.float64))) < 1.0
    edges = np.array([0.0, -0.0, 88.72284, 88.7229, np.inf, -103.97208, -104.5, -np.inf, np.nan, 3e38, -3e38], "f4")
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp(edges.astype(np.float64)).astype(np.float32)
    found = apply("exp", edges)
    np.testing.assert_allclose(found, expected, rtol=1.2e-7)
    assert np.all((found == 0) == (expected == 0))


def test_exp_of_f64(apply):
    rng = np.random.default_rng(4)
    x = np.concatenate([rng.uniform(-745, 709.7, 1500), rng.uniform(-1, 1, 500)])
    with mpmath.workprec(100):
        exact = [mpmath.exp(mpmath.mpf(value)) for value in x]
        found = [mpmath.mpf(value) for value in apply("exp", x)]
        spacing = np.spacing(np.exp(x))
        assert max(abs(a - b) / mpmath.mpf(s) for a, b, s in zip(found, exact, spacing, strict=True)) < 1.0
    edges = np.array([0.0, -745.14, -746.0, -1e300, -np.inf, 709.79, np.inf, np.nan])
    found = apply("exp", edges)
    assert list(found[:7]) == [1.0, 0.0, 0.0, 0.0, 0.0, np.inf, np.inf]
    assert np.isnan(found[7])


def test_tanh(apply):
    x = np.concatenate([spread(-12, 12), np.array([1e-45, -1e-40, 1e30, np.inf, -np.inf], "f4")])
    assert ulps(apply("tanh", x), np.tanh(x.astype(np.float64))) < 2.5
    found = apply("tanh", np.array([np.nan, -0.0], "f4"))
    assert np.isnan(found[0])
    assert np.signbit(found[1])


def test_silu(apply):
    x = spread(-80, 100)
    wide = x.astype(np.float64)
    assert ulps(apply("silu", x), wide / (1 + np.exp(-wide))) < 3.0
    x = np.linspace(-120, -80, 10_000, dtype=np.float32)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(apply("silu", x), wide / (1 + np.exp(-wide)), rtol=0, atol=1e-36)
    found = apply("silu", np.array([np.nan, np.inf, -np.inf, -1e30, 1e30], "f4"))
    assert np.isnan(found[[0, 2]]).all()
    assert list(found[[1, 3, 4]]) == [np.inf, 0, np.float32(1e30)]


def test_gelu_tanh(apply):
    x = spread(-5, 100)
    wide = x.astype(np.float64)
    u = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    expected = wide / (1 + np.exp(-2 * u))
    np.testing.assert_allclose(apply("gelu_tanh", x), expected, rtol=2.5e-6, atol=1e-44)
    x = np.linspace(-30, -5, 10_000, dtype=np.float32)
    wide = x.astype(np.float64)
    u = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    with np.errstate(over="ignore"):
        expected = wide / (1 + np.exp(-2 * u))
    np.testing.assert_allclose(apply("gelu_tanh", x), expected, rtol=2e-5, atol=1e-36)
    found = apply("gelu_tanh", np.array([np.nan, np.inf, -1e20, 1e20], "f4"))
    assert np.isnan(found[0])
    assert list(found[1:]) == [np.inf, 0, np.float32(1e20)]


def test_cos_and_sin(apply):
    # Beside multiples of pi / 2, where the result is smallest, and at positions up to i32's end.
    turns = np.random.default_rng(5).integers(0, 2**31, 3000) >> np.arange(3000) % 30
    near = (turns * (np.pi / 2)).astype(np.float32)
    x = np.concatenate([spread(-100, 100, 2000), near[near < 2**31], spread(0, 2.0**31 - 129, 2000)])
    found = apply("cos_sin", x)
    with mpmath.workprec(160):
        for part, function in zip(found, (mpmath.cos, mpmath.sin), strict=True):
            exact = [function(mpmath.mpf(float(value))) for value in x]
            spacing = np.spacing(np.abs(np.array([float(value) for value in exact])).astype(np.float32))
            errors = [
                abs(mpmath.mpf(float(a)) - b) / mpmath.mpf(float(s))
                for a, b, s in zip(part, exact, spacing, strict=True)
            ]
            assert max(errors) < 0.501
    assert np.isnan(apply("cos_sin", np.array([np.nan, np.inf, -np.inf, 2.0**31], "f4"))).all()


@pytest.mark.parametrize("function", sorted(Apply.functions))
def test_bits_do_not_depend_on_the_instructions(function, libraries):
    x = spread(-110, 110, 4000)
    results = set()
    for library in libraries:
        out = np.zeros((2, len(x)), np.float32)
        library.call(Apply(function), slots(x, out, len(x)))
        results.add(out.tobytes())
    assert len(results) == 1
