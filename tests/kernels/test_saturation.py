"""Activations beyond f16's range: every kernel that stores f16 saturates at +-65504, and NaN stays NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import backend_or_skip
from reference.linear_twin import random_matrix, tile_sumsq
from reference.linear_twin import rms_norm as exact_norm
from test_attention_decode import Case, undo
from test_attention_prefill import run as run_prefill
from test_linear import run as run_linear

from exl.kernels.append_kv import append_kv
from exl.kernels.attention_io import QkvRows
from exl.kernels.gated_product import gated_product
from exl.kernels.launch import Backend
from exl.kernels.linear import make_scratch, multiply
from exl.kernels.linear_dense import DenseWeight, multiply_dense
from exl.kernels.linear_io import NormedInput, Output
from exl.kernels.linear_many import PanelScratch, multiply_many
from exl.kernels.rms_norm import rms_norm
from exl.kernels.tile_pack import pack_matrix
from exl.kernels.weights import TiledWeight
from exl.layout.pages import KINDS, PageLayout, hadamard, pack_pages, quantize
from exl.layout.panels import panel_scratch_shapes
from exl.layout.tiles import gated_rows

LARGEST = 65504.0  # of f16; 65520 is the smallest value that rounds to infinity
BORDER = (65504.0, 65519.0, 65520.0, 1e5, 3e38, float("inf"), float("nan"), 1.0, 0.0)


def saturated(x: torch.Tensor) -> torch.Tensor:
    """f32 -> f16, saturated; NaN stays NaN."""
    return x.clamp(-LARGEST, LARGEST).half()


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    np.testing.assert_array_equal(found.cpu().numpy(), expected.cpu().numpy())  # here NaN equals NaN


def nan(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def both_types(device: torch.device, T: int, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    return nan(T, N, dtype=torch.float16, device=device), nan(T, N, dtype=torch.float32, device=device)


def assert_saturates(narrow: torch.Tensor, wide: torch.Tensor) -> None:
    """``narrow`` is ``wide``, the same kernel's f32 output, saturated; ``wide`` is in range, beyond it and NaN."""
    assert (wide.abs() > 65520).any()
    assert (wide.abs() < 6e4).any()
    assert wide.isnan().any()
    same(narrow, saturated(wide))


def test_silu(backend: Backend) -> None:
    up = torch.tensor([BORDER, [-v for v in BORDER]], device=backend.device)
    gate = torch.full_like(up, 100.0)  # its sigmoid is 1
    gate[:, 7] = 1e5
    y, wide = both_types(backend.device, *up.shape)
    gated_product(backend, gate, up, y)
    gated_product(backend, gate, up, wide)
    np.testing.assert_array_equal(wide[:, :7].cpu().numpy(), (up[:, :7] * 100).cpu().numpy())
    assert_saturates(y, wide)


@pytest.mark.parametrize("ordered", [False, True])
def test_norm(backend: Backend, ordered: bool) -> None:
    K = 16
    h = torch.ones(2, K)
    weight = torch.tensor([*BORDER[:5], *(-v for v in BORDER[:5]), *BORDER[5:8], 1e5, 2.0, -1.0])
    sumsq = torch.from_numpy(tile_sumsq(h.double().numpy())).float().to(backend.device)
    norm = NormedInput(sumsq, weight.to(backend.device), 0.0)
    channel_map = torch.arange(K - 1, -1, -1, dtype=torch.int32).to(backend.device) if ordered else None
    y, wide = both_types(backend.device, 2, K)
    for out in (y, wide):
        rms_norm(backend, h.to(backend.device), norm, out, channel_map=channel_map)
    same(wide, (weight.flip(0) if ordered else weight).expand(2, K))
    assert_saturates(y, wide)


def large_inputs(T: int, K: int) -> torch.Tensor:
    """f16 inputs: tokens of 6e4, tokens of ordinary size, and one with NaN."""
    rng = np.random.default_rng(T)
    x = torch.from_numpy(rng.uniform(-1, 1, (T, K)))
    x[::2] *= 6e4
    x[T - 1, 3] = float("nan")
    return x.half()


@pytest.mark.parametrize("T", [3, 8, 17, 64])
@pytest.mark.parametrize("bits", [3, 4])
def test_quantized_linears(backend: Backend, bits: int, T: int) -> None:
    weight = TiledWeight.from_packed(
        pack_matrix([random_matrix(np.random.default_rng(0), bits, 384, 40, 128)]), backend.device
    )
    x = large_inputs(T, 384)
    assert_saturates(run_linear(backend, weight, x, 40, dtype=torch.float16), run_linear(backend, weight, x, 40))


@pytest.mark.parametrize("T", [3, 17])
def test_gate_and_up(backend: Backend, T: int) -> None:
    rng = np.random.default_rng(2)
    gate, up = (random_matrix(rng, 4, 256, 24, 128) for _ in range(2))
    weight = TiledWeight.from_packed(pack_matrix([gate, up], rows=gated_rows(24)), backend.device)
    y, wide = both_types(backend.device, T, 24)
    for out in (y, wide):
        multiply(
            backend,
            weight,
            large_inputs(T, 256).to(backend.device),
            Output.gated(out),
            scratch=make_scratch([weight.layout], backend),
        )
    assert_saturates(y, wide)


@pytest.mark.parametrize("mode", ["race", "asan"])
@pytest.mark.parametrize("T", [1, 3])
def test_linears_without_tensor_cores(mode: str, T: int) -> None:
    backend = backend_or_skip(mode, 61)
    weight = TiledWeight.from_packed(
        pack_matrix([random_matrix(np.random.default_rng(0), 4, 384, 40, 128)]), backend.device
    )
    x = large_inputs(3, 384)
    y, wide = both_types(backend.device, 3, 40)
    for out in (y, wide):
        for start in range(0, 3, T):
            multiply(backend, weight, x[start : start + T], Output.store(out[start : start + T]))
    assert_saturates(y, wide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_linears(backend: Backend, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    weight = DenseWeight(torch.from_numpy(rng.standard_normal((40, 256))).to(dtype).to(backend.device))
    y, wide = both_types(backend.device, 9, 40)
    for out in (y, wide):
        multiply_dense(backend, weight, large_inputs(9, 256).to(backend.device), Output.store(out))
    assert_saturates(y, wide)


def test_many_tokens(backend: Backend) -> None:
    weight = TiledWeight.from_packed(
        pack_matrix([random_matrix(np.random.default_rng(0), 4, 384, 104, 128)]), backend.device
    )
    dtypes = {"f16": torch.float16, "f32": torch.float32}
    shapes = panel_scratch_shapes([weight.layout], 70, 3 * 16 * 384 * 2)
    scratch = PanelScratch(**{k: nan(n, dtype=dtypes[t], device=backend.device) for k, (t, n) in shapes.items()})
    y, wide = both_types(backend.device, 70, 104)
    for out in (y, wide):
        multiply_many(backend, weight, large_inputs(70, 384).to(backend.device), Output.store(out), scratch)
    assert_saturates(y, wide)


@pytest.mark.parametrize("T", [1, 16, 70])
def test_normalised_inputs(backend: Backend, T: int) -> None:
    """With a norm weight of 1e5 the tensor cores get 65504, on every path of a normalised input."""
    rng = np.random.default_rng(4)
    matrix = random_matrix(rng, 4, 256, 40, 128)
    weight = TiledWeight.from_packed(pack_matrix([matrix]), backend.device)
    h = torch.from_numpy(rng.choice([-1.0, 1.0], (T, 256))).float()
    scale = torch.ones(256)
    scale[::5] = 1e5
    sumsq = torch.from_numpy(tile_sumsq(h.double().numpy())).float().to(backend.device)
    norm = NormedInput(sumsq, scale.to(backend.device), 0.0)
    x = torch.from_numpy(exact_norm(h.double().numpy(), scale.double().numpy(), 0.0)).float()
    place = backend.device
    if T == 70:
        dtypes = {"f16": torch.float16, "f32": torch.float32}
        shapes = panel_scratch_shapes([weight.layout], T, 3 * 16 * 256 * 2)
        scratch = PanelScratch(**{k: nan(n, dtype=dtypes[t], device=place) for k, (t, n) in shapes.items()})
        found, expected = (nan(T, 40, dtype=torch.float32, device=place) for _ in range(2))
        multiply_many(backend, weight, h.to(place), Output.store(found), scratch, norm)
        multiply_many(backend, weight, saturated(x).to(place), Output.store(expected), scratch)
    else:
        found, expected = (nan(T, 40, dtype=torch.float32, device=place) for _ in range(2))
        multiply(
            backend, weight, h.to(place), Output.store(found), norm=norm, scratch=make_scratch([weight.layout], backend)
        )
        multiply(
            backend,
            weight,
            saturated(x).to(place),
            Output.store(expected),
            scratch=make_scratch([weight.layout], backend),
        )
    assert found.isfinite().all()
    assert torch.equal(found, expected)
    dense = DenseWeight(torch.from_numpy(rng.standard_normal((16, 256))).half().to(place))
    if T < 65:
        found, expected = (nan(T, 16, dtype=torch.float32, device=place) for _ in range(2))
        multiply_dense(backend, dense, h.to(place), Output.store(found), norm=norm)
        multiply_dense(backend, dense, saturated(x).to(place), Output.store(expected))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_appended_tokens(backend: Backend, kind: str) -> None:
    T, H, Hkv, D = 3, 2, 1, 64
    layout = PageLayout(kind, D)
    rows = (np.random.default_rng(5).uniform(-1, 1, (T, (H + 2 * Hkv) * D)) * 1e5).astype(np.float32)
    kv = rows[:, H * D :].reshape(T, 2, Hkv, D)
    pages = torch.zeros(1, Hkv, layout.num_bytes, dtype=torch.uint8, device=backend.device)
    q = nan(T, H, D, dtype=torch.float16, device=backend.device)
    one, zero = (f(T, D // 2, device=backend.device) for f in (torch.ones, torch.zeros))
    slots = torch.arange(T, dtype=torch.int32, device=backend.device)
    rows[0, [5, 5 + D // 2]] = float("nan")  # of q alone, and of both channels that RoPE turns together
    append_kv(backend, layout, QkvRows(torch.from_numpy(rows).to(backend.device), one, zero), slots, pages, q)
    np.testing.assert_array_equal(pages.cpu().numpy(), pack_pages(layout, kv[:, 0], kv[:, 1]))
    exact = torch.from_numpy(hadamard(rows[:, : H * D].reshape(T, H, D), layout.hadamard_size))
    assert exact.isnan().any()
    assert (exact.abs() > 65520).any()
    same(q, saturated(exact))


def of_one_token(kind: str, D: int, v: np.ndarray) -> tuple[Case, np.ndarray]:
    """A sequence of one token, whose probability is 1, and the expected output of its v, f32 [1, Hkv, D]: V's scales
    times 2^8 saturate, and so does the stored output."""
    case = Case(kind, D, 2, 1, (1,), (1,))
    case.rows = case.rows.astype(np.float32)
    case.rows[:, 3 * D :] = v.reshape(1, D)
    layout = case.layout
    if not layout.quantized:
        return case, np.clip(v[0, 0], -LARGEST, LARGEST)
    codes, scales = quantize(hadamard(v, layout.hadamard_size), layout.v_bits)
    lifted = np.clip(np.repeat(scales.astype(np.float64), 32, -1)[..., :D] * 256, -LARGEST, LARGEST)
    return case, np.clip(undo(codes * lifted / 256, layout.hadamard_size)[0, 0], -LARGEST, LARGEST)


@pytest.mark.parametrize("D", [64, 24])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("spread", [False, True])
def test_attention(backend: Backend, prefill: bool, kind: str, D: int, spread: bool) -> None:
    """V of 1e5 in all channels, whose scales overflow, or in one: quantized pages hold that in range, and what comes
    out of the Hadamard rotation is beyond it."""
    v = np.zeros((1, 1, D), np.float32)
    v[..., 1] = 1e5
    if spread:
        v[:] = np.random.default_rng(6).uniform(-1e5, 1e5, v.shape)
    case, expected = of_one_token(kind, D, v)
    out, _ = run_prefill(case, backend) if prefill else case.run(backend)
    found = out.reshape(2, D).astype(np.float64)
    assert np.isfinite(found).all()
    # f32 sums of a Hadamard rotation, and the output's own rounding.
    np.testing.assert_allclose(found, np.stack([expected] * 2), rtol=2.0**-11, atol=2.0**-18 * np.abs(expected).max())


@pytest.mark.parametrize("arch", [61, 75])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_on_other_architectures(kind: str, arch: int) -> None:
    v = np.random.default_rng(6).uniform(-1e5, 1e5, (1, 1, 64)).astype(np.float32)
    case, expected = of_one_token(kind, 64, v)
    if arch < 75 and case.layout.quantized:  # these multiply V's codes by scales in f32
        codes, scales = quantize(hadamard(v, 64), case.layout.v_bits)
        exact = codes * np.repeat(scales.astype(np.float64), 32, -1)
        expected = np.clip(undo(exact, 64)[0, 0], -LARGEST, LARGEST)
    for out, _ in (case.run(backend_or_skip("race", arch)), run_prefill(case, backend_or_skip("race", arch))):
        np.testing.assert_allclose(
            out.reshape(2, 64), np.stack([expected] * 2), rtol=2.0**-11, atol=2.0**-18 * np.abs(expected).max()
        )


@pytest.mark.parametrize("prefill", [False, True])
def test_queries_saturate_and_nan_stays(backend: Backend, prefill: bool) -> None:
    """Scores of saturated queries are finite. A NaN in one query head makes that head's row NaN."""
    case = Case("q8", 64, 2, 1, (70,), (70 if prefill else 1,))
    case.rows = case.rows.astype(np.float32)
    case.rows[:, :64] = 0
    case.rows[:, 2] = 3e6  # the Hadamard rotation spreads it over 64 channels, each beyond f16's range
    out, _ = run_prefill(case, backend) if prefill else case.run(backend)
    assert np.isfinite(out).all()
    case.rows[-1, 64] = np.nan
    out, _ = run_prefill(case, backend) if prefill else case.run(backend)
    assert np.isnan(out[-1, 64:]).all()
    assert np.isfinite(out[-1, :64]).all()
