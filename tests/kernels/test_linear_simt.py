"""Quantized linears in f32 arithmetic, for GPUs without tensor cores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import backend_or_skip
from reference.linear_twin import ACTIVATIONS, bias_of, dequantize, random_matrix, rms_norm, tile_sumsq

from exl.kernels.linear import make_scratch, multiply
from exl.kernels.linear_io import NormedInput, Output
from exl.kernels.linear_simt import choose_x_stages, simt_shared_bytes, token_counts
from exl.kernels.tile_pack import pack_matrix
from exl.kernels.weights import TiledWeight
from exl.layout.arch import arch_limits
from exl.layout.tiles import TileLayout, gated_rows

ARCH = 61
SHAPES = [
    (4, 1152, 40, 128, False),
    (4, 352, 24, 32, False),
    (4, 96, 20, -1, True),
    (3, 1120, 24, 32, False),
    (2, 1600, 40, 64, True),
    (8, 384, 40, -1, False),
    (4, 704, 24, 256, False, "f32"),
    (2, 928, 24, 64, False, "bf16"),
]


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def bound(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Error of f32 sums: one rounding per product of a lane and per group, at most K in all."""
    return (x.shape[1] + 16) * 2.0**-24 * (np.abs(x) @ np.abs(weights))


@pytest.mark.sample(3)
@pytest.mark.parametrize("mode", ["race", "asan"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_and_rows_do_not_depend_on_the_batch(mode: str, shape: tuple) -> None:
    backend = backend_or_skip(mode, ARCH)
    bits, K, N, group_size, symmetric, *scale_dtype = shape
    rng = np.random.default_rng(K)
    matrix = random_matrix(rng, bits, K, N, group_size, symmetric, True, *scale_dtype)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.from_numpy(rng.standard_normal((64, K)) * (1 if dtype == torch.float16 else 1e9)).to(dtype)
        alone = torch.full((64, N), float("nan"))
        for i in range(64 if mode == "race" else 17):
            multiply(backend, weight, x[i : i + 1], Output.store(alone[i : i + 1]))
        expected = f64(x) @ dequantize(matrix) + bias_of(matrix)
        slack = bound(f64(x), dequantize(matrix)) + 2.0**-23 * np.abs(expected)
        for T in (2, 7, 8, 9, 15, 16, 17, 33, 64) if mode == "race" else (7, 17):
            y = torch.full((T, N), float("nan"))
            multiply(backend, weight, x[:T], Output.store(y))
            assert torch.equal(y, alone[:T])
            assert (np.abs(f64(y) - expected[:T]) <= slack[:T]).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norm_gate_and_residual(activation: str) -> None:
    backend = backend_or_skip("race", ARCH)
    rng = np.random.default_rng(1)
    K, F, T = 384, 20, 3
    gate, up = (random_matrix(rng, 4, K, F, 128) for _ in range(2))
    h, norm_weight = torch.from_numpy(rng.standard_normal((T, K)) * 7).float(), torch.rand(K) + 0.5
    norm = NormedInput(torch.from_numpy(tile_sumsq(f64(h))).float(), norm_weight, 1e-5)
    x = rms_norm(f64(h), f64(norm_weight), 1e-5)
    y = torch.full((T, F), float("nan"))
    gated = TiledWeight.from_packed(pack_matrix([gate, up], gated_rows(F)), backend.device)
    multiply(backend, gated, h, Output.gated(y, activation), norm=norm, scratch=make_scratch([gated.layout], backend))
    a, b = x @ dequantize(gate), x @ dequantize(up)
    off_a, off_b = (bound(x, dequantize(m)) + 2.0**-20 * np.abs(x) @ np.abs(dequantize(m)) for m in (gate, up))
    expected = ACTIVATIONS[activation](a) * b
    slack = 1.13 * (off_a * np.abs(b) + off_b * np.abs(a)) + 2.0**-20 * np.abs(expected)
    assert (np.abs(f64(y) - expected) <= 1.01 * slack).all()

    matrix = random_matrix(rng, 4, F + 12, K, 32)
    down = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    x16 = torch.randn(T, F + 12).half()
    expected = f64(h) + f64(x16) @ dequantize(matrix)
    sumsq = torch.full((T, K // 16), float("nan"))
    multiply(backend, down, x16, Output.residual(h, sumsq))
    assert (np.abs(f64(h) - expected) <= bound(f64(x16), dequantize(matrix)) + 2.0**-23 * np.abs(expected)).all()
    np.testing.assert_allclose(f64(sumsq), tile_sumsq(f64(h)), rtol=2.0**-19)


def test_every_shape_fits() -> None:
    assert token_counts(7) == [4, 2, 1]
    assert token_counts(64) == [4] * 16
    for arch in (60, 61, 70, 72):
        for bits in (2, 3, 4, 8):
            for K in (96, 4096, 28672):
                layout = TileLayout(bits, K, 4096, K, True)
                for T in (1, 2, 4):
                    x_stages = choose_x_stages(layout, T, arch)
                    assert simt_shared_bytes(layout, T, x_stages) <= arch_limits(arch).max_shared_bytes
