"""GPTQ's kernels against torch, bit for bit: every instruction set, types, widths of codes, columns that end anywhere.

That torch's own steps are the paper's is shown in tests/unit/quantize.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch

from exl.cpu_kernels.library import Library
from exl.cpu_kernels.pool import Pool
from exl.ops import cpu_target
from exl.quantize.compute import open_compute
from exl.quantize.grid import Grid
from exl.quantize.products import CompiledProducts, TorchProducts
from exl.quantize.rounding import Block, CompiledRounding, TorchRounding
from exl.threads import Threads
from tests.cpu_kernels.guards import guarded_array

F32, F64 = torch.float32, torch.float64
CASES = [
    (F32, Grid(4, sym=False, min_zero=1), 130, 128, 64),
    (F32, Grid(3, sym=True), 7, 96, 12),  # groups that eight does not divide
    (F32, Grid(8, sym=False), 64, 72, 36),
    (F64, Grid(2, sym=False, min_zero=1), 41, 64, 32),
]


def guarded(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Ends where memory does."""
    return torch.from_numpy(guarded_array(torch.from_numpy(array).to(dtype).numpy()))


@pytest.fixture
def compiled(library: Library) -> Iterator[CompiledRounding]:
    with closing(Pool(library, 2)) as pool:
        yield CompiledRounding(pool)


def weights(dtype: torch.dtype, num_rows: int, N: int) -> torch.Tensor:
    """Columns of very different sizes; one of zeros, and one that no f16 scale can reach."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(num_rows, N)) * 10 ** rng.uniform(-4, 3, N)
    values[:, 1], values[:, 2], values[:, 3] = 0, np.abs(values[:, 2]), 1e-9 * values[:, 3]
    values[:, 4] *= 1e8
    return guarded(values, dtype)


@pytest.mark.parametrize(("dtype", "grid", "N", "num_rows", "group_size"), CASES)
def test_grids_are_fitted_as_by_torch(compiled, dtype, grid, N, num_rows, group_size):
    w = weights(dtype, num_rows, N)
    found, expected = (rounding.fit(grid, w, group_size) for rounding in (compiled, TorchRounding(Threads(1))))
    for mine, true in zip(found, expected, strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("fits", [False, True])
@pytest.mark.parametrize(("dtype", "grid", "N", "num_rows", "group_size"), CASES)
def test_blocks_are_rounded_as_by_torch(compiled, dtype, grid, N, num_rows, group_size, fits):
    rng = np.random.default_rng(4)
    w = weights(dtype, num_rows, N)
    U = np.triu(rng.normal(size=(num_rows, num_rows)) * 0.1, 1) + np.diag(rng.uniform(0.5, 2, num_rows))
    factor = guarded(np.ascontiguousarray(U.T), dtype)
    groups = torch.arange(num_rows) // group_size
    if not fits:  # act-order mixes the inputs of static groups
        groups = groups[torch.from_numpy(rng.permutation(num_rows))]
    results = []
    for rounding in (compiled, TorchRounding(Threads(1))):
        scales, zeros = rounding.fit(grid, w, group_size)
        if fits:
            scales, zeros = (guarded(np.full(scales.shape, 7.0), dtype) for _ in range(2))
        codes = guarded(np.full(w.shape, 7.0), dtype)
        block = Block(w.clone(), factor, groups, scales, zeros, codes, group_size if fits else 0)
        errors = rounding.round(grid, block)
        results.append((codes, errors, scales, zeros))
    for mine, true in zip(*results, strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("reason", [None, "llvmlite cannot be imported"])
def test_torch_rounds_where_kernels_cannot_run(monkeypatch, library, reason):
    monkeypatch.setattr(cpu_target, "why_not_compiled", lambda: reason)
    with open_compute(Threads(1)) as compute:
        assert compute.compiled == (reason is None)
        assert isinstance(compute.rounding, CompiledRounding if reason is None else TorchRounding)
        assert isinstance(compute.products, CompiledProducts if reason is None else TorchProducts)
