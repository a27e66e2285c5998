"""Quantized linears against float64 with the exact weights, on the host shim's builds and on a GPU if there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import backend_or_skip
from reference.linear_twin import (
    ACTIVATIONS,
    bias_of,
    dequantize,
    random_matrix,
    rms_norm,
    sum_bound,
    tile_sumsq,
)

from exl.kernels.launch import Backend
from exl.kernels.linear import make_scratch, multiply
from exl.kernels.linear_io import NormedInput, Output
from exl.kernels.tile_pack import pack_matrix
from exl.kernels.weights import TiledWeight
from exl.layout.linear_config import LinearConfig, reachable_configs
from exl.layout.tiles import gated_rows

TOKENS = (1, 2, 7, 8, 9, 15, 16, 17, 33, 64)
# bits, K, N, group size, symmetric, scales. Among them: K of one group, odd numbers of groups, a shorter last group (in
# one stage and in several), groups longer than a stage but not a multiple of it, a partial last stage of K, N that is
# not a multiple of 64 or of 16.
SHAPES = [
    (4, 128, 40, 128, False),
    (4, 1152, 136, 128, False),
    (4, 352, 24, 32, False),
    (4, 960, 72, 64, True),
    (4, 1408, 20, -1, False),
    (4, 96, 16, -1, True),
    (3, 640, 40, 128, False),
    (3, 1120, 24, 32, True),
    (2, 1600, 40, 64, False),
    (2, 768, 20, -1, True),
    (8, 384, 40, 128, False),
    (8, 224, 24, 32, True),
    (4, 704, 40, 128, False, "bf16"),
    (4, 1376, 24, 256, False, "f32"),
    (4, 352, 24, 64, True, "f32"),
    (3, 1376, 24, 384, True, "bf16"),
    (2, 928, 40, 64, False, "f32"),
    (8, 608, 24, 128, False, "bf16"),
]
F16_ROUNDING = 2.0**-11


def inputs(rng: np.random.Generator, T: int, K: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((T, K))).to(dtype)


def place(backend: Backend, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(backend.device) for t in tensors]


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def assert_close(found: torch.Tensor, expected: np.ndarray, bound: np.ndarray | float) -> None:
    difference = np.abs(f64(found) - expected)
    assert (difference <= bound).all(), (
        f"{np.nanmax(difference - bound)} over the bound; NaN: {np.isnan(difference).sum()}"
    )


def run(
    backend: Backend, weight: TiledWeight, x: torch.Tensor, N: int, config=None, dtype=torch.float32
) -> torch.Tensor:
    y = torch.full((x.shape[0], N), float("nan"), dtype=dtype, device=backend.device)
    scratch = make_scratch([weight.layout], backend)
    if config is not None and config.wide:
        scratch.partial.resize_(max(config.partial_bytes(weight.layout) // 4, 1))
        scratch.arrived.resize_(config.row_blocks(weight.layout)).zero_()
    multiply(backend, weight, x.to(backend.device), Output.store(y), scratch=scratch, config=config)
    assert not scratch.arrived.any()
    return y


def shape_name(shape: tuple) -> str:
    bits, K, N, group_size, symmetric, *scale_dtype = shape
    return "-".join([f"{bits}bits", f"{K}x{N}", f"g{group_size}", "sym" if symmetric else "zeros", *scale_dtype])


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        *(("race", shape) for shape in SHAPES),
        *(("asan", shape) for shape in SHAPES[::2]),
        *(pytest.param("cupy", shape, marks=pytest.mark.gpu) for shape in SHAPES),
    ],
    ids=lambda value: value if isinstance(value, str) else shape_name(value),
)
def test_equals_float64_at_every_token_count(mode: str, shape: tuple) -> None:
    backend = backend_or_skip(mode)
    bits, K, N, group_size, symmetric, *scale_dtype = shape
    rng = np.random.default_rng(K + bits)
    matrix = random_matrix(rng, bits, K, N, group_size, symmetric, True, *scale_dtype)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    exact = dequantize(matrix)
    for T in TOKENS:
        x = inputs(rng, T, K)
        expected = f64(x) @ exact + bias_of(matrix)
        assert_close(run(backend, weight, x, N), expected, sum_bound(f64(x), matrix))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("T", [1, 8, 16])
def test_is_more_exact_than_dequantizing_to_f16(bits: int, T: int) -> None:
    backend = backend_or_skip("race")
    rng = np.random.default_rng(7)
    matrix = random_matrix(rng, bits, 1024, 64, 128)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    x = inputs(rng, T, 1024)
    expected = f64(x) @ dequantize(matrix)
    rounded = torch.from_numpy(dequantize(matrix).astype(np.float16)).float()

    def error(y: torch.Tensor) -> float:
        return float(np.linalg.norm(f64(y) - expected) / np.linalg.norm(expected))

    assert error(run(backend, weight, x, 64)) <= error(x.float() @ rounded)
    assert error(run(backend, weight, x, 64, dtype=torch.float16)) <= 2e-3


# ---- a row's bits, whichever kernel runs it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group_size", "scale_dtype", "arch"),
    [
        (4, 128, "f16", 75),
        (4, 128, "f16", 86),
        (4, 128, "bf16", 90),
        (4, 512, "f32", 86),  # 1152 inputs: the third group is shorter
        (3, 64, "f16", 86),
        (2, 128, "f32", 75),
        (8, 32, "f16", 86),
    ],
)
def test_a_rows_bits_depend_on_nothing_else(bits: int, group_size: int, scale_dtype: str, arch: int) -> None:
    """Every token count from 1 to 64, and every configuration that some GPU could choose."""
    rng = np.random.default_rng(bits)
    K, N = 1152, 264
    matrix = random_matrix(rng, bits, K, N, group_size, scale_dtype=scale_dtype)
    backend = backend_or_skip("plain", arch)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    x = inputs(rng, 64, K)
    reference = torch.cat([run(backend, weight, x[i : i + 1], N) for i in range(64)])
    seen: set[LinearConfig] = set()
    for T in range(1, 65):
        for i, config in enumerate(reachable_configs(weight.layout, T, arch)):
            if i == 0 or config not in seen or T in TOKENS:  # all configurations at some counts, one new one at each
                assert torch.equal(run(backend, weight, x[:T], N, config), reference[:T]), (T, config)
            seen.add(config)
    assert {(config.wide, config.spread) for config in seen} >= {(False, 1), (True, 1), (True, 8)}
    if (bits, group_size) == (4, 128) and arch >= 80:
        assert {(8, 1, 8), (8, 2, 8)} <= {(config.token_tiles, config.row_tiles, config.spread) for config in seen}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_more_than_64_tokens_go_in_turns(dtype: torch.dtype) -> None:
    backend = backend_or_skip("plain")
    rng = np.random.default_rng(5)
    matrix = random_matrix(rng, 4, 256, 40, 128)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    x = inputs(rng, 137, 256, dtype)
    alone = torch.cat([run(backend, weight, x[i : i + 1], 40) for i in range(137)])
    assert torch.equal(run(backend, weight, x, 40), alone)


# ---- inputs and outputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 5, 8, 20, 64])
def test_bf16_inputs_of_any_range(backend: Backend, T: int) -> None:
    """Magnitudes far above and below f16's range, within one row and between slices; a row of zeros."""
    rng = np.random.default_rng(T)
    matrix = random_matrix(rng, 4, 1152, 40, 128)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    scale = 2.0 ** rng.integers(-6, 7, (T, 1152)) * 2.0 ** rng.integers(-90, 90, (T, 1))
    scale[:, 300:500] *= 2.0**-20
    if T > 2:
        scale[2] = 0
    x = torch.from_numpy(rng.standard_normal((T, 1152)) * scale).bfloat16()
    # Inputs far below their slice's largest become f16 subnormals: each loses at most 2^-39 of the largest.
    lost = np.abs(f64(x)).max(axis=1, keepdims=True) * 2.0**-39 * np.abs(dequantize(matrix)).sum(axis=0)
    assert_close(run(backend, weight, x, 40), f64(x) @ dequantize(matrix), sum_bound(f64(x), matrix) + lost)


def normed(rng: np.random.Generator, backend: Backend, T: int, K: int) -> tuple[torch.Tensor, NormedInput, np.ndarray]:
    """A residual, its producer's sums of squares for the norm, and the normalised rows as exl rounds them."""
    h = torch.from_numpy(rng.standard_normal((T, K)) * rng.uniform(0.1, 30, (T, 1))).float()
    weight = torch.from_numpy(rng.uniform(0.2, 2, K)).float()
    sumsq = torch.from_numpy(tile_sumsq(f64(h))).float()
    exact = rms_norm(f64(h), f64(weight), 1e-5)
    return h.to(backend.device), NormedInput(*place(backend, sumsq, weight), 1e-5), exact


@pytest.mark.parametrize("T", [1, 3, 8, 17])
def test_normalises_on_the_way(backend: Backend, T: int) -> None:
    rng = np.random.default_rng(T + 30)
    K, N = 1120, 40  # 70 sums per token: not a multiple of 32 lanes
    matrix = random_matrix(rng, 4, K, N, 32)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    h, norm, exact = normed(rng, backend, T, K)
    y = torch.full((T, N), float("nan"), dtype=torch.float32, device=backend.device)
    multiply(backend, weight, h, Output.store(y), norm=norm, scratch=make_scratch([weight.layout], backend))
    magnitude = np.abs(exact) @ np.abs(dequantize(matrix))
    # each input is rounded to f16 once, and may lie 2^-20 off for its norm's own roundings
    assert_close(y, exact @ dequantize(matrix), sum_bound(exact, matrix) + (F16_ROUNDING + 2.0**-20) * magnitude)
    wide = torch.full((12, N), float("nan"), dtype=torch.float32, device=backend.device)
    rows = [i % T for i in range(12)]
    again = NormedInput(norm.sumsq[rows], norm.weight, norm.eps)
    multiply(backend, weight, h[rows], Output.store(wide), norm=again, scratch=make_scratch([weight.layout], backend))
    assert torch.equal(wide, y[rows])  # the prologue of both kernels rounds alike


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 8, 17])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_and_up_meet_in_the_lane(backend: Backend, activation: str, T: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(T + 60)
    K, F = 384, 44
    gate, up = (random_matrix(rng, 4, K, F, 128, bias=True) for _ in range(2))
    order = rng.permutation(F)
    weight = TiledWeight.from_packed(pack_matrix([gate, up], gated_rows(F, order)), backend.device)
    x = inputs(rng, T, K, dtype)
    y = torch.full((T, F), float("nan"), dtype=dtype, device=backend.device)
    multiply(
        backend,
        weight,
        x.to(backend.device),
        Output.gated(y, activation),
        scratch=make_scratch([weight.layout], backend),
    )
    a, b = (f64(x) @ dequantize(m) + bias_of(m) for m in (gate, up))
    expected = ACTIVATIONS[activation](a) * b
    # The slopes of SiLU and GELU are below 1.13; ex2.approx and the division are within 2^-20
    slack = 1.13 * (sum_bound(f64(x), gate) * np.abs(b) + sum_bound(f64(x), up) * np.abs(a)) + 2.0**-20 * np.abs(
        expected
    )
    rounding = (F16_ROUNDING if dtype == torch.float16 else 2.0**-8) * np.abs(expected) + 2.0**-24
    assert_close(y, expected[:, order], (1.01 * slack + rounding)[:, order])


@pytest.mark.parametrize("T", [1, 8, 33])
def test_adds_to_the_residual_and_leaves_its_squares(backend: Backend, T: int) -> None:
    rng = np.random.default_rng(T + 90)
    K, N = 640, 72
    matrix = random_matrix(rng, 4, K, N, 128, bias=True)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    x, h = inputs(rng, T, K), torch.from_numpy(rng.standard_normal((T, N + 4))).float()[:, :N]  # rows apart
    channel_map = torch.from_numpy(rng.permutation(N).astype(np.int32))
    expected = f64(h) + 0.5 * (f64(x) @ dequantize(matrix) + bias_of(matrix))
    (x, channel_map), h = place(backend, x, channel_map), torch.nn.functional.pad(h, (0, 4)).to(backend.device)[:, :N]
    sumsq = torch.full((T, 5), float("nan"), device=backend.device)
    permuted = torch.full((T, N), float("nan"), device=backend.device)
    scratch = make_scratch([weight.layout], backend)
    multiply(backend, weight, x, Output.residual(h, sumsq, 0.5, permuted, channel_map), scratch=scratch)
    assert_close(h, expected, sum_bound(f64(x), matrix) + 2.0**-23 * np.abs(expected))
    assert_close(sumsq, tile_sumsq(f64(h)), 2.0**-19 * tile_sumsq(f64(h)))
    assert torch.equal(permuted[:, channel_map.long()], h)


@pytest.mark.parametrize("T", [1, 9])
def test_act_order_is_paid_by_the_producer(backend: Backend, T: int) -> None:
    """W's rows are sorted by group; the producer of the activations already stored them in that order."""
    rng = np.random.default_rng(T + 120)
    K, N = 384, 40
    matrix = random_matrix(rng, 4, K, N, 64)
    order = rng.permutation(K)  # sorted row i is the checkpoint's row order[i]
    in_file = np.empty((K, N))
    in_file[order] = dequantize(matrix)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    x = inputs(rng, T, K)
    y = run(backend, weight, x[:, torch.from_numpy(order)].contiguous(), N)
    assert_close(y, f64(x) @ in_file, sum_bound(f64(x)[:, order], matrix))


@pytest.mark.parametrize("arch", [75, 80, 90, 120])
@pytest.mark.parametrize("T", [1, 8, 20, 64])
def test_other_architectures(arch: int, T: int) -> None:
    """sm_75 prefetches into registers and uses m16n8k8; dependent launches exist from sm_90 on."""
    backend = backend_or_skip("race", arch)
    rng = np.random.default_rng(arch + T)
    for bits in (3, 4):
        matrix = random_matrix(rng, bits, 1280, 40, 128)
        weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
        x = inputs(rng, T, 1280, torch.bfloat16)
        assert_close(run(backend, weight, x, 40), f64(x) @ dequantize(matrix), sum_bound(f64(x), matrix))


@pytest.mark.sample(3)
@pytest.mark.parametrize("T", [3, 8])
@pytest.mark.parametrize("row_tiles", [1, 2, 4])
def test_several_row_tiles_a_warp(backend: Backend, T: int, row_tiles: int) -> None:
    """Numbers of tiles that a block's tiles do not divide, and chunks of activations shorter than a slice."""
    rng = np.random.default_rng(T + row_tiles)
    matrix = random_matrix(rng, 4, 5120, 88, 128)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    config = LinearConfig(False, row_tiles, {1: 4, 2: 3, 4: 2}[row_tiles], {1: 4, 2: 3, 4: 2}[row_tiles])
    x = inputs(rng, T, 5120)
    assert_close(run(backend, weight, x, 88, config), f64(x) @ dequantize(matrix), sum_bound(f64(x), matrix))


# ---- on a GPU alone ------------------------------------------------------------------------------------------------


# K as in a 7B's linears, 11008 with a partial last stage; N is small, because float64 would take minutes.
LARGE = [(bits, 4096, 96, 128, symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True)]
LARGE += [(4, 11008, 64, 128, False), (4, 14336, 48, 32, True), (3, 11008, 48, 64, False), (4, 4096, 64, -1, False)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE, ids=shape_name)
def test_long_sums_equal_float64(shape: tuple) -> None:
    backend = backend_or_skip("cupy")
    bits, K, N, group_size, symmetric = shape
    rng = np.random.default_rng(K + bits)
    matrix = random_matrix(rng, bits, K, N, group_size, symmetric, bias=True)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    exact = dequantize(matrix)
    for T in TOKENS:
        x = inputs(rng, T, K)
        expected = f64(x) @ exact + bias_of(matrix)
        assert_close(run(backend, weight, x, N), expected, sum_bound(f64(x), matrix))


@pytest.mark.gpu
@pytest.mark.parametrize("N", [4096, 12288, 22016])
def test_every_row_of_a_large_matrix(N: int) -> None:
    """As many blocks as in a 7B's linears: rows have the same bits as in a small matrix of the same rows."""
    backend = backend_or_skip("cupy")
    rng = np.random.default_rng(N)
    part = random_matrix(rng, 4, 4096, 64, 128)
    small = TiledWeight.from_packed(pack_matrix([part]), backend.device)
    whole = TiledWeight.from_packed(pack_matrix([part] * (N // 64)), backend.device)
    for T in (1, 3, 8, 16, 33, 64):
        x = inputs(rng, T, 4096)
        expected = run(backend, small, x, 64)
        assert torch.equal(run(backend, whole, x, N), expected.repeat(1, N // 64)), T


@pytest.mark.gpu
def test_a_hundred_runs_are_bit_identical() -> None:
    backend = backend_or_skip("cupy")
    rng = np.random.default_rng(11)
    matrix = random_matrix(rng, 4, 4096, 4096, 128)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    for T in (1, 8, 16, 64):
        x = inputs(rng, T, 4096)
        first = run(backend, weight, x, 4096)
        for _ in range(100):
            assert torch.equal(run(backend, weight, x, 4096), first)


@pytest.mark.gpu
def test_a_row_alone_equals_the_row_in_a_batch_of_16() -> None:
    backend = backend_or_skip("cupy")
    rng = np.random.default_rng(12)
    for bits in (2, 3, 4, 8):
        matrix = random_matrix(rng, bits, 4096, 1024, 128)
        weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
        x = inputs(rng, 16, 4096)
        batch = run(backend, weight, x, 1024)
        for i in range(16):
            assert torch.equal(run(backend, weight, x[i : i + 1], 1024)[0], batch[i])
