"""Many tokens: panels, a matrix product, and the same epilogues as the kernels that read codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import backend_or_skip
from reference.linear_twin import ACTIVATIONS, random_matrix
from reference.linear_twin import dequantize as exact_weights

from exl.errors import KernelError
from exl.kernels.launch import Backend
from exl.kernels.linear_io import NormedInput, Output
from exl.kernels.linear_many import PanelScratch, multiply_many
from exl.kernels.tile_pack import pack_matrix
from exl.kernels.weights import TiledWeight
from exl.layout.linear_config import crossover_tokens
from exl.layout.panels import panel_scratch_shapes
from exl.layout.tiles import TileLayout, gated_rows

T, K, N = 70, 384, 104  # 7 tiles, the last one half empty; T is not a multiple of 8


def make_scratch(layout: TileLayout, num_tokens: int, device: torch.device, panel_tiles: int = 3) -> PanelScratch:
    """Scratch for panels of three tiles; the last panel is shorter."""
    dtypes = {"f16": torch.float16, "f32": torch.float32}
    shapes = panel_scratch_shapes([layout], num_tokens, panel_tiles * 16 * layout.K * 2)
    nan = float("nan")
    return PanelScratch(**{k: torch.full((n,), nan, dtype=dtypes[t], device=device) for k, (t, n) in shapes.items()})


def rounded_weights(matrix, dtype: torch.dtype) -> np.ndarray:
    """The product's operand: weights rounded once to ``dtype``, as f64 [K, N]."""
    return torch.from_numpy(exact_weights(matrix)).float().to(dtype).double().numpy()


def bound(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Error of f32 sums of K products, in any order: K * 2^-24 of the sum of magnitudes (Higham, 2002, section 3.1)."""
    return K * 2.0**-24 * (np.abs(x) @ np.abs(weights)) + 1e-30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stored(backend: Backend, bits: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(bits)
    matrix = random_matrix(rng, bits, K, N, 128, bias=True)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    x = torch.from_numpy(rng.standard_normal((T, K))).to(dtype)
    y = torch.full((T, N), float("nan"), device=backend.device)
    multiply_many(
        backend, weight, x.to(backend.device), Output.store(y), make_scratch(weight.layout, T, backend.device)
    )
    weights = rounded_weights(matrix, dtype)
    expected = x.double().numpy() @ weights + matrix.bias.astype(np.float64)
    limit = bound(x.double().numpy(), weights) + 2.0**-23 * np.abs(expected)
    assert (np.abs(y.cpu().double().numpy() - expected) <= limit).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(backend: Backend, activation: str) -> None:
    rng = np.random.default_rng(1)
    gate, up = (random_matrix(rng, 4, K, N, 128) for _ in range(2))
    weight = TiledWeight.from_packed(pack_matrix([gate, up], gated_rows(N)), backend.device)
    x = torch.from_numpy(rng.standard_normal((T, K)) / 8).half()
    y = torch.full((T, N), float("nan"), device=backend.device)
    multiply_many(
        backend,
        weight,
        x.to(backend.device),
        Output.gated(y, activation),
        make_scratch(weight.layout, T, backend.device),
    )
    a, b = (x.double().numpy() @ rounded_weights(m, torch.float16) for m in (gate, up))
    expected = ACTIVATIONS[activation](a) * b
    # f32 arithmetic, and ex2.approx (2 ulp, PTX ISA) of an exponent with a relative error of 2^-24.
    np.testing.assert_allclose(y.cpu().double().numpy(), expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_normalised_and_added(backend: Backend) -> None:
    """Reads the residual and adds to it: the matrix is square, so that one h serves as both."""
    rng = np.random.default_rng(2)
    size = 256
    matrix = random_matrix(rng, 4, size, size, 64)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    h = torch.from_numpy(rng.standard_normal((T, size))).float()
    norm_weight = torch.from_numpy(rng.uniform(0.5, 2, size)).float()
    sumsq = (h.double() ** 2).reshape(T, size // 16, 16).sum(-1).float()
    exact = h.double().numpy()
    x = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5) * norm_weight.double().numpy()
    order = rng.permutation(size).astype(np.int32)
    h, sumsq, norm_weight = (tensor.to(backend.device) for tensor in (h, sumsq, norm_weight))
    new, permuted = h.clone(), torch.full((T, size), float("nan"), device=backend.device)
    new_sumsq = torch.full((T, size // 16), float("nan"), device=backend.device)
    channel_map = torch.from_numpy(order).to(backend.device)
    out = Output.residual(new, new_sumsq, 0.5, permuted, channel_map)
    scratch = make_scratch(weight.layout, T, backend.device)
    multiply_many(backend, weight, h, out, scratch, NormedInput(sumsq, norm_weight, 1e-5))
    expected = exact + 0.5 * (x @ rounded_weights(matrix, torch.float16))
    # The normalised input is rounded to f16: 2^-11 of each product.
    limit = 2.0**-11 * 0.5 * (np.abs(x) @ np.abs(exact_weights(matrix))) + 1e-5
    found = new.cpu().double().numpy()
    assert (np.abs(found - expected) <= limit).all()
    assert torch.equal(permuted[:, channel_map.long()], new)
    squares = (found**2).reshape(T, size // 16, 16).sum(-1)
    np.testing.assert_allclose(new_sumsq.cpu().numpy(), squares, rtol=1e-5)


@pytest.mark.parametrize("arch", [61, 75])
def test_other_architectures(arch: int) -> None:
    backend = backend_or_skip("race", arch)
    rng = np.random.default_rng(3)
    matrix = random_matrix(rng, 4, 256, 40, 128)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    x = torch.from_numpy(rng.standard_normal((9, 256))).half()
    y = torch.full((9, 40), float("nan"))
    multiply_many(backend, weight, x, Output.store(y), make_scratch(weight.layout, 9, backend.device))
    expected = x.double().numpy() @ rounded_weights(matrix, torch.float16)
    np.testing.assert_allclose(y.double().numpy(), expected, atol=1e-4)


class NeverLaunches:
    device = torch.device("cpu")
    arch = 86

    def load(self, spec: object) -> None:
        raise AssertionError("a kernel was asked for")


def test_scratch_that_is_too_small_is_refused() -> None:
    matrix = random_matrix(np.random.default_rng(4), 4, K, N, 128)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), torch.device("cpu"))
    x, y = torch.zeros(T, K, dtype=torch.float16), torch.zeros(T, N)
    scratch = make_scratch(weight.layout, T - 1, torch.device("cpu"))
    with pytest.raises(KernelError, match=r"scratch\.product has \d+ elements: expected \d+ or more"):
        multiply_many(NeverLaunches(), weight, x, Output.store(y), scratch)
    tiny = PanelScratch(scratch.x, scratch.panel[: 16 * K - 8], scratch.product)
    with pytest.raises(KernelError, match="panel of"):
        multiply_many(NeverLaunches(), weight, x, Output.store(y), tiny)
    with pytest.raises(KernelError, match=r"x.*float32"):
        multiply_many(NeverLaunches(), weight, x.float(), Output.store(y), scratch)


def test_the_crossover_is_where_the_costs_meet() -> None:
    """RTX 3090 by hand: 4.53 bytes per weight at 6.7 per clock = 0.676; a token saves 1/192 - 1/230.4 = 0.000868."""
    assert crossover_tokens(86) == 768  # 0.676 / 0.000868 = 779
    assert crossover_tokens(90) < crossover_tokens(89)  # cuBLAS has faster instructions there
    for arch in (61, 75, 80, 86, 87, 89, 90, 100, 103, 120, 121):
        assert 256 <= crossover_tokens(arch, True) <= crossover_tokens(arch) <= 1024
