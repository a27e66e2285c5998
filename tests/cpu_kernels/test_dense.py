"""Dense linears of the CPU's own kernels against float64, and each row's bits in any company."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from exl.cpu_kernels.dense import DenseRow, DenseRows, dense_kernel, row_tile
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.library import Library, slots
from tests.cpu_kernels.guards import guarded_array

DTYPES = ("f32", "f16", "bf16")


def stored(values: NDArray[np.float32], dtype: str) -> NDArray:
    """In the dtype's bits, rounded towards zero for bf16."""
    if dtype == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16 if dtype == "f16" else np.float32)


def exact(weight: NDArray, dtype: str) -> NDArray[np.float64]:
    if dtype == "bf16":
        weight = (weight.astype(np.uint32) << 16).view(np.float32)
    return weight.astype(np.float64)


def linear(
    library: Library,
    spec: KernelSpec,
    weight: NDArray,
    x: NDArray[np.float32],
    *,
    span: int = 16,
    bias: NDArray | None = None,
    residual: NDArray | None = None,
    scale: float = 1.0,
    out: NDArray | None = None,
) -> NDArray[np.float32]:
    """f32 [M][N]. Rows of ``x``, ``residual`` and ``out`` may be parts of wider matrices."""
    (M, K), N = x.shape, len(weight)
    out = np.full((M, N), np.nan, np.float32) if out is None else out
    h_stride = 0 if residual is None else residual.strides[0] // 4
    args = slots(
        weight, x, out, out.strides[0] // 4, K, M, N, span, bias, residual, h_stride, scale, 0, x.strides[0] // 4
    )
    library.call(spec, args, -(-N // span))
    return out


def random(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_near(y: NDArray[np.float32], x: NDArray[np.float32], weight: NDArray[np.float64]) -> None:
    """Within the rounding that K products and their sums can have, in chains of 48 in blocks of 768."""
    size = np.abs(x.astype(np.float64)) @ np.abs(weight).T
    error = np.abs(y - x.astype(np.float64) @ weight.T)
    bound = (48 + x.shape[1] // 768 + 5) * 2.0**-24
    assert (error <= bound * size).all()
    assert np.sqrt((error**2).mean()) <= 2e-7 * np.sqrt(((x.astype(np.float64) @ weight.T) ** 2).mean())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "N", "M"), [(576, 64, 1), (1, 1, 1), (15, 5, 2), (1069, 39, 3), (5639, 10, 53)])
def test_near_float64(library: Library, dtype: str, K: int, N: int, M: int) -> None:
    weight, x = stored(random(1, N, K), dtype), random(2, M, K)
    y = linear(library, dense_kernel(dtype, M, library.isa), weight, x)
    assert_near(y, x, exact(weight, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_company(libraries: list[Library], dtype: str) -> None:
    weight, x = stored(random(3, 45, 1069), dtype), random(4, 61, 1069)
    alone = linear(libraries[0], DenseRow(dtype), weight, x[:1])
    assert np.isfinite(alone).all()
    for library in libraries:
        for spec in (DenseRow(dtype), DenseRows(dtype, 2), DenseRows(dtype, 3), DenseRows(dtype, 6)):
            for M, span in ((1, 1), (5, 4), (61, 7), (61, 64)):
                for place in {0, M - 1}:
                    rows = x.copy()[:M]
                    rows[place] = x[0]
                    y = linear(library, spec, weight, rows, span=span)
                    assert np.array_equal(y[place], alone[0]), (library.isa, spec, M, span)


@pytest.mark.parametrize("M", [1, 7])
def test_bias_residual_and_scale(library: Library, M: int) -> None:
    weight, x, bias, residual = random(5, 21, 100), random(6, M, 100), random(7, 21), random(8, M, 30)[:, 3:24]
    spec = dense_kernel("f32", M, library.isa)
    plain = linear(library, spec, weight, x)
    shifted = linear(library, spec, weight, x, bias=bias)
    assert np.array_equal(shifted, plain + bias)
    added = linear(library, spec, weight, x, residual=residual)
    assert np.array_equal(added, residual + plain)
    scaled = linear(library, spec, weight, x, bias=bias, residual=residual, scale=0.22)
    product = np.float64(np.float32(0.22)) * shifted.astype(np.float64)  # exact, so that the sum is rounded once
    assert np.array_equal(scaled, (residual.astype(np.float64) + product).astype(np.float32))


@pytest.mark.parametrize("M", [1, 8])
def test_a_row_that_is_not_finite_is_seen_in_that_row_alone(library: Library, M: int) -> None:
    weight, x = stored(random(9, 9, 83), "f16"), random(10, M, 83)
    weight[:, 82] = 1
    spec = dense_kernel("f16", M, library.isa)
    clean = linear(library, spec, weight, x)
    for value, expected in ((np.nan, np.isnan), (np.inf, np.isposinf)):
        x[M - 1, 82] = value
        y = linear(library, spec, weight, x)
        assert expected(y[-1]).all()
        assert np.array_equal(y[:-1], clean[:-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", [False, True], ids=["behind", "before"])
def test_nothing_outside_is_touched(library: Library, dtype: str, before: bool) -> None:
    """Weights may end where a mapped file ends."""
    for K, N, M in ((37, 7, 1), (64, 5, 8), (769, 9, 4)):
        weight, x, bias, residual = stored(random(11, N, K), dtype), random(12, M, K), random(13, N), random(14, M, N)
        guarded = [guarded_array(a, before=before) for a in (weight, x, bias, residual)]
        out = guarded_array(np.zeros((M, N), np.float32), before=before)
        spec = dense_kernel(dtype, M, library.isa)
        linear(library, spec, guarded[0], guarded[1], bias=guarded[2], residual=guarded[3], out=out)
        assert np.array_equal(out, linear(library, spec, weight, x, bias=bias, residual=residual))


def test_only_the_columns_of_the_matrix_are_written(library: Library) -> None:
    weight, x, wide = random(15, 10, 40), random(16, 5, 40), np.full((5, 16), 7, np.float32)
    linear(library, dense_kernel("f32", 5, library.isa), weight, x, out=wide[:, 2:12])
    assert (wide[:, :2] == 7).all()
    assert (wide[:, 12:] == 7).all()
    assert_near(wide[:, 2:12], x, exact(weight, "f32"))


@pytest.mark.parametrize(("isa", "largest"), [("avx512vnni", 6), ("avx2", 3)])
def test_tiles_waste_few_rows(isa: str, largest: int) -> None:
    assert [row_tile(M, isa) for M in (2, largest, 1000)] == [2, largest, largest]
    for M in range(2, 300):
        assert -(-M // row_tile(M, isa)) * row_tile(M, isa) <= M + max(1, M / 3)
