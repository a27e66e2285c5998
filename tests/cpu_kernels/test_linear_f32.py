"""Quantized linears in f32 against float64, and each row's bits in any company."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from exl.cpu_kernels.library import Library, slots
from exl.cpu_kernels.linear_f32 import MOST_ROWS, ROW_BLOCK, GatherRows, linear_f32
from exl.layout.columns import ColumnLayout
from tests.cpu_kernels.guards import guarded_array
from tests.cpu_kernels.packer import from_scale_dtype, pack_columns, to_scale_dtype

LAYOUTS = [
    ColumnLayout(4, 384, 200, 128),
    ColumnLayout(4, 100, 64, 100, symmetric=True, scale_dtype="f32"),
    ColumnLayout(2, 144, 65, 16, scale_dtype="bf16"),
    ColumnLayout(3, 320, 70, 64),
    ColumnLayout(3, 50, 3, 20, symmetric=True),
    ColumnLayout(8, 256, 130, 128, scale_dtype="f32"),
    ColumnLayout(8, 90, 64, 32, symmetric=True),
    ColumnLayout(4, 192, 70, 32, True, "bf16", "fp4"),
]
# Twice the eight numbers of e2m1, and their negatives.
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float64)


@dataclass(frozen=True)
class Weight:
    """Random codes, as packed and as they are."""

    layout: ColumnLayout
    packed: NDArray[np.uint8]
    exact: NDArray[np.float64]  # [K, N]


def random_weight(layout: ColumnLayout, seed: int = 0) -> Weight:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << layout.bits, (layout.K, layout.N)).astype(np.uint8)
    scales = rng.uniform(0.5, 1.5, (layout.num_groups, layout.N)).astype(np.float32) / 2**layout.bits
    stored = to_scale_dtype(scales, layout.scale_dtype)
    zeros = rng.integers(0, 1 << layout.bits, (layout.num_groups, layout.N)).astype(np.uint8)
    if layout.symmetric:
        zeros[:] = 1 << (layout.bits - 1)
    group = np.arange(layout.K) // layout.group_size
    numbers = FP4[codes] if layout.code_kind == "fp4" else codes - zeros[group].astype(np.float64)
    exact = numbers * from_scale_dtype(stored)[group].astype(np.float64)
    return Weight(layout, pack_columns(layout, codes, stored, None if layout.symmetric else zeros), exact)


def random(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def gathered(library: Library, layout: ColumnLayout, x: NDArray[np.float32], span: int = 48) -> NDArray[np.float32]:
    """In the order of the records."""
    M, size, source = len(x), layout.padded_K, layout.source_rows()
    out = np.full((M, size), np.nan, np.float32)
    args = slots(x, source, out, size, size, M, 0, span, 0, 0, 0, 0, 0, x.strides[0] // 4)
    library.call(GatherRows(), args, M * -(-size // span))
    return out


def linear(
    library: Library,
    weight: Weight,
    x: NDArray[np.float32],
    kind: str,
    *,
    packed: NDArray[np.uint8] | None = None,
    blocks: int = 1,
    bias: NDArray | None = None,
    residual: NDArray | None = None,
    scale: float = 1.0,
    out: NDArray | None = None,
) -> NDArray[np.float32]:
    """f32 [M][N] of x f32 [M][padded K]. ``blocks``: of a chunk."""
    layout, M = weight.layout, len(x)
    packed = weight.packed if packed is None else packed
    out = np.full((M, layout.N), np.nan, np.float32) if out is None else out
    h_stride = 0 if residual is None else residual.strides[0] // 4
    args = slots(
        packed, x, out, out.strides[0] // 4, layout.num_records, M, layout.N, layout.num_blocks,
        bias, residual, h_stride, scale, blocks, x.strides[0] // 4,
    )  # fmt: skip
    chunks = -(-layout.num_blocks // blocks) * (-(-M // ROW_BLOCK) if kind == "panel" else 1)
    library.call(linear_f32(layout, kind), args, chunks)
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_near_float64(library: Library, layout: ColumnLayout) -> None:
    weight, x = random_weight(layout), random(1, 11, layout.K)
    truth = x.astype(np.float64) @ weight.exact
    y = linear(library, weight, gathered(library, layout, x), "panel")
    error = np.abs(y - truth)
    chain = layout.rows + layout.num_records + 1  # roundings, at most, that a product goes through
    assert (error <= chain * 2.0**-24 * (np.abs(x.astype(np.float64)) @ np.abs(weight.exact))).all()
    assert np.sqrt((error**2).mean()) <= 4e-7 * np.sqrt((truth**2).mean())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_row_has_the_same_bits_in_any_company(libraries: list[Library], layout: ColumnLayout) -> None:
    weight, x = random_weight(layout), gathered(libraries[0], layout, random(2, ROW_BLOCK + 9, layout.K))
    alone = linear(libraries[0], weight, x[:1], "row")
    assert np.isfinite(alone).all()
    for library in libraries:
        assert np.array_equal(linear(library, weight, x[:1], "row", blocks=3), alone)
        for M in (1, 2, 7, 9, len(x)):
            for place in {0, M - 1}:
                rows = x[:M].copy()
                rows[place] = x[0]
                for kind in ("rows", "panel") if M <= MOST_ROWS else ("panel",):
                    y = linear(library, weight, rows, kind, blocks=1 + M % 3)
                    assert np.array_equal(y[place], alone[0]), (library.isa, kind, M, place)


@pytest.mark.parametrize("kind", ["row", "rows", "panel"])
def test_bias_residual_and_scale(library: Library, kind: str) -> None:
    layout, M = LAYOUTS[3], 1 if kind == "row" else 4
    weight, x = random_weight(layout), random(3, M, layout.K)
    bias, residual = random(4, layout.N), random(5, M, layout.N + 9)[:, 5:-4]
    plain = linear(library, weight, x, kind)
    shifted = linear(library, weight, x, kind, bias=bias)
    assert np.array_equal(shifted, plain + bias)
    assert np.array_equal(linear(library, weight, x, kind, residual=residual), residual + plain)
    scaled = linear(library, weight, x, kind, bias=bias, residual=residual, scale=0.22)
    product = np.float64(np.float32(0.22)) * shifted.astype(np.float64)  # exact, so that the sum is rounded once
    assert np.array_equal(scaled, (residual.astype(np.float64) + product).astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_seen_in_that_row_alone(library: Library, value: float) -> None:
    layout = LAYOUTS[0]
    weight, x = random_weight(layout), random(6, 8, layout.K)
    clean = linear(library, weight, x, "panel")
    x[5, 17] = value
    y = linear(library, weight, x, "panel")
    assert not np.isfinite(y[5]).any()
    assert np.array_equal(np.delete(y, 5, 0), np.delete(clean, 5, 0))
    assert np.array_equal(linear(library, weight, x[5:6], "row"), y[5:6], equal_nan=True)


@pytest.mark.parametrize("before", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[3], LAYOUTS[6]], ids=str)
def test_nothing_outside_is_touched(library: Library, layout: ColumnLayout, before: bool) -> None:
    weight = random_weight(layout)
    for kind, M in (("row", 1), ("rows", 7), ("panel", 7)):
        x, bias, residual = random(7, M, layout.padded_K), random(8, layout.N), random(9, M, layout.N)
        packed, *guarded = (guarded_array(a, before=before) for a in (weight.packed, x, bias, residual))
        out = guarded_array(np.zeros((M, layout.N), np.float32), before=before)
        linear(library, weight, guarded[0], kind, packed=packed, bias=guarded[1], residual=guarded[2], out=out)
        assert np.array_equal(out, linear(library, weight, x, kind, bias=bias, residual=residual))


def test_only_the_columns_of_the_matrix_are_written(library: Library) -> None:
    layout = LAYOUTS[0]
    weight, x, wide = random_weight(layout), random(10, 5, layout.K), np.full((5, layout.N + 16), 7, np.float32)
    linear(library, weight, x, "panel", out=wide[:, 8:-8])
    assert (wide[:, :8] == 7).all()
    assert (wide[:, -8:] == 7).all()
    assert np.array_equal(wide[:, 8:-8], linear(library, weight, x, "panel"))


@pytest.mark.parametrize("before", [False, True], ids=["behind", "before"])
def test_activations_are_gathered_in_the_order_of_the_records(library: Library, before: bool) -> None:
    layout, x = LAYOUTS[4], random(11, 3, LAYOUTS[4].K)
    out = gathered(library, layout, guarded_array(x, before=before), span=30)
    source = layout.source_rows()
    assert (source < 0).any()
    assert np.array_equal(out, np.where(source < 0, np.float32(0), x[:, source]))
