"""Dense linears against float64 with the same, unrounded weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import backend_or_skip
from reference.linear_twin import ACTIVATIONS, rms_norm, tile_sumsq

from exl.errors import KernelError
from exl.kernels.launch import Backend
from exl.kernels.linear_dense import DenseWeight, choose_dense_config, multiply_dense
from exl.kernels.linear_io import NormedInput, Output
from exl.layout.arch import arch_limits

TOKENS = (1, 2, 7, 8, 9, 15, 16, 17, 33, 64)
SHAPES = [(128, 40), (1160, 20), (648, 136)]  # one slice unit, K not a multiple of 64, unequal slices
DTYPES = (torch.float16, torch.bfloat16)


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def draw(rng: np.random.Generator, rows: int, K: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((rows, K)) * scale).to(dtype)


def bound(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Error of f32 sums of K products, truncated to 24 bits every 4 products (``linear_twin.sum_bound``). With bf16
    weights each input is two parts: twice as many sums, and 2^-16 of each input is lost."""
    return (2 * x.shape[1] / 4 + 16) * 2.0**-23 * (np.abs(x) @ np.abs(w.T))


def run(backend: Backend, weight: torch.Tensor, x: torch.Tensor, norm: NormedInput | None = None) -> torch.Tensor:
    y = torch.full((x.shape[0], weight.shape[0]), float("nan"), device=backend.device)
    multiply_dense(backend, DenseWeight(weight.to(backend.device)), x.to(backend.device), Output.store(y), norm=norm)
    return y


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_equals_float64_at_every_token_count(backend: Backend, K: int, N: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(K)
    weight = draw(rng, N, K, dtype)
    for T in TOKENS:
        for input_dtype in DTYPES:
            x = draw(rng, T, K, input_dtype, scale=3)
            difference = np.abs(f64(run(backend, weight, x)) - f64(x) @ f64(weight).T)
            assert (difference <= bound(f64(x), f64(weight))).all()


@pytest.mark.sample(3)
@pytest.mark.parametrize("arch", [75, 86, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_depend_on_nothing_else(dtype: torch.dtype, arch: int) -> None:
    backend = backend_or_skip("plain", arch)
    rng = np.random.default_rng(1)
    weight = draw(rng, 24, 1160, dtype)
    if (arch, dtype) == (75, torch.bfloat16):
        with pytest.raises(KernelError, match=r"bfloat16 weights need compute capability 8\.0"):
            run(backend, weight, draw(rng, 1, 1160, dtype))
        return
    for input_dtype in DTYPES:
        x = draw(rng, 64, 1160, input_dtype)
        alone = torch.cat([run(backend, weight, x[i : i + 1]) for i in range(64)])
        for T in range(2, 65):
            assert torch.equal(run(backend, weight, x[:T]), alone[:T]), T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 17])
def test_the_heads_norm_and_f32_logits(backend: Backend, dtype: torch.dtype, T: int) -> None:
    rng = np.random.default_rng(T)
    K, N = 640, 72
    weight, h = draw(rng, N, K, dtype, 0.1), torch.from_numpy(rng.standard_normal((T, K)) * 5).float()
    norm_weight = torch.from_numpy(rng.uniform(0.5, 2, K)).float()
    sumsq = torch.from_numpy(tile_sumsq(f64(h))).float()
    norm = NormedInput(sumsq.to(backend.device), norm_weight.to(backend.device), 1e-6)
    exact = rms_norm(f64(h), f64(norm_weight), 1e-6)
    rounding = 2.0**-11 if dtype == torch.float16 else 2.0**-16
    slack = bound(exact, f64(weight)) + 1.01 * (rounding + 2.0**-20) * (np.abs(exact) @ np.abs(f64(weight).T))
    assert (np.abs(f64(run(backend, weight, h, norm)) - exact @ f64(weight).T) <= slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [3, 12])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_rows_and_bias(backend: Backend, activation: str, dtype: torch.dtype, T: int) -> None:
    rng = np.random.default_rng(T)
    K, F = 256, 20
    padded = draw(rng, 2 * F, K + 8, dtype, 0.2)
    weight, x = padded[:, :K], draw(rng, T, K, dtype)  # rows with gaps between them
    bias = rng.standard_normal(2 * F).astype(np.float32)
    tiles = np.zeros((3, 2, 8), np.float32)  # bias in the tiles' order
    for part in range(2):
        tiles[:, part] = np.pad(bias[part * F : (part + 1) * F], (0, 4)).reshape(3, 8)
    packed = DenseWeight(
        padded.to(backend.device)[:, :K], torch.from_numpy(tiles.reshape(-1)).to(backend.device), gated=True
    )
    y = torch.full((T, F), float("nan"), device=backend.device)
    multiply_dense(backend, packed, x.to(backend.device), Output.gated(y, activation))
    sums = f64(x) @ f64(weight).T + bias
    gate, up = sums[:, :F], sums[:, F:]
    off = bound(f64(x), f64(weight)) + 2.0**-23 * np.abs(sums)
    expected = ACTIVATIONS[activation](gate) * up
    slack = 1.13 * (off[:, :F] * np.abs(up) + off[:, F:] * np.abs(gate)) + 2.0**-20 * np.abs(expected)
    assert (np.abs(f64(y) - expected) <= 1.01 * slack).all()


def test_adds_to_the_residual(backend: Backend) -> None:
    rng = np.random.default_rng(5)
    weight, x, h = (
        draw(rng, 40, 384, torch.float16, 0.1),
        draw(rng, 5, 384, torch.float16),
        draw(rng, 5, 40, torch.float32),
    )
    expected = f64(h) + f64(x) @ f64(weight).T
    h, sumsq = h.to(backend.device), torch.full((5, 3), float("nan"), device=backend.device)
    multiply_dense(backend, DenseWeight(weight.to(backend.device)), x.to(backend.device), Output.residual(h, sumsq))
    assert (np.abs(f64(h) - expected) <= bound(f64(x), f64(weight)) + 2.0**-23 * np.abs(expected)).all()
    np.testing.assert_allclose(f64(sumsq), tile_sumsq(f64(h)), rtol=2.0**-19)


@pytest.mark.parametrize("arch", [75, 80, 86, 90, 120])
def test_every_shape_fits_every_architecture(arch: int) -> None:
    for dtype in DTYPES if arch >= 80 else DTYPES[:1]:
        for K in (128, 896, 4096, 28672):
            for T in (1, 8, 9, 32):
                config = choose_dense_config(K, dtype, T, arch)
                assert config.shared_bytes(dtype, T, arch) <= arch_limits(arch).max_shared_bytes
                assert config.token_tiles * 8 >= T


class NeverLaunches:
    device = torch.device("cpu")
    arch = 86
    num_multiprocessors = 4

    def load(self, spec):
        pytest.fail(f"{spec} was loaded in spite of its arguments")


def test_refused_before_any_launch() -> None:
    def refused(message: str, weight: DenseWeight, x: torch.Tensor, out: Output) -> None:
        with pytest.raises(KernelError, match=message):
            multiply_dense(NeverLaunches(), weight, x, out)

    def half(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float16)

    good, x, y = DenseWeight(half(32, 64)), half(2, 64), Output.store(half(2, 32))
    refused("weight is torch.float32", DenseWeight(torch.zeros(32, 64)), x, y)
    refused("weight has strides", DenseWeight(half(64, 32).T), x, y)
    refused("K a multiple of 8", DenseWeight(half(32, 60)), half(2, 60), y)
    refused("weight starts at address", DenseWeight(half(32 * 64 + 1)[1:].view(32, 64)), x, y)
    refused(r"x has shape \(2, 32\)", good, half(2, 32), y)
    refused("output has 31 columns: the matrix has 32 outputs", good, x, Output.store(half(2, 31)))
    refused("the matrix has 32 outputs", good, x, Output.gated(half(2, 16)))
    refused("bias has shape", DenseWeight(half(32, 64), torch.zeros(31)), x, y)
