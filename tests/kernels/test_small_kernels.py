"""Embedding, norm, gated product and scaled logits against float64; their outputs for the next kernel; what they
refuse."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from conftest import backend_or_skip
from reference.linear_twin import ACTIVATIONS, silu, tile_sumsq
from reference.linear_twin import rms_norm as exact_norm

from exl.errors import KernelError
from exl.kernels.embed import check_ids, embed
from exl.kernels.gated_product import gated_product
from exl.kernels.launch import Backend
from exl.kernels.linear_io import NormedInput
from exl.kernels.rms_norm import rms_norm
from exl.kernels.scale_logits import scale_logits
from exl.memory.mapped import mapped

HALVES = (torch.float16, torch.bfloat16)
TYPES = (*HALVES, torch.float32)


def draw(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def nan(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


# ---- embed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("C", [8, 16, 40, 2064])
def test_rows_of_the_table(backend: Backend, C: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(C)
    table = draw(rng, 50, C, dtype=dtype)
    ids = torch.tensor([0, 49, 7, -1, -3, 7], dtype=torch.int32)
    samples = torch.tensor([5, 11, 49], dtype=torch.int32)
    expected = table[[0, 49, 7, 5, 49, 7]].float()
    h, sumsq = nan(6, C, device=backend.device), nan(6, -(-C // 16), device=backend.device)
    order = torch.from_numpy(rng.permutation(C).astype(np.int32)).to(backend.device)
    permuted = nan(6, C, device=backend.device)
    place = backend.device
    embed(
        backend, table.to(place), ids.to(place), h, sumsq,
        samples=samples.to(place), permuted=permuted, channel_map=order,
    )  # fmt: skip
    assert torch.equal(h.cpu(), expected)
    assert torch.equal(permuted[:, order.long()], h)
    # 16 squares added in f32: at most 15 roundings.
    np.testing.assert_allclose(f64(sumsq), tile_sumsq(f64(expected)), rtol=16 * 2.0**-24)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("C", [40, 1032])
def test_rows_are_scaled(backend: Backend, C: int, dtype: torch.dtype) -> None:
    """One rounding each: a scale that is no power of two."""
    table, ids = draw(np.random.default_rng(C), 9, C, dtype=dtype), torch.tensor([8, 0, 3], dtype=torch.int32)
    h, sumsq = nan(3, C, device=backend.device), nan(3, -(-C // 16), device=backend.device)
    embed(backend, table.to(backend.device), ids.to(backend.device), h, sumsq, scale=50.7)
    expected = table[[8, 0, 3]].float() * torch.tensor(50.7)
    assert torch.equal(h.cpu(), expected)
    np.testing.assert_allclose(f64(sumsq), tile_sumsq(f64(expected)), rtol=16 * 2.0**-24)


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_of_a_table_in_the_hosts_memory(backend: Backend, dtype: torch.dtype) -> None:
    """What a device reads over the bus has the same bits as what is in its memory."""
    table = draw(np.random.default_rng(6), 50, 1032, dtype=dtype)
    ids = torch.tensor([3, 49, 3, 0], dtype=torch.int32, device=backend.device)
    found = []
    with ExitStack() as stack:
        host, on_device = mapped(table.nbytes, "test", backend.device, stack)
        host.copy_(table.view(-1).view(torch.uint8))
        for one in (table.to(backend.device), on_device.view(dtype).view(table.shape)):
            h, sumsq = nan(4, 1032, device=backend.device), nan(4, 65, device=backend.device)
            embed(backend, one, ids, h, sumsq)
            found.append((h.cpu(), sumsq.cpu()))
        assert torch.equal(found[0][0], table[[3, 49, 3, 0]].float())
        assert all(map(torch.equal, *found))
        del on_device, one


def test_an_id_that_is_none_gives_zeros_and_reads_nothing(backend: Backend) -> None:
    table = draw(np.random.default_rng(0), 20, 16, dtype=torch.float16).to(backend.device)
    ids = torch.tensor([20, -1, -2, 3, -2147483648], dtype=torch.int32, device=backend.device)
    samples = torch.tensor([1 << 30], dtype=torch.int32, device=backend.device)
    h, sumsq = nan(5, 16, device=backend.device), nan(5, 1, device=backend.device)
    embed(backend, table, ids, h, sumsq, samples=samples)
    assert torch.equal(h[3], table[3].float())
    assert not h[[0, 1, 2, 4]].any()
    assert not sumsq[[0, 1, 2, 4]].any()


def test_sums_of_squares_are_those_that_the_residual_leaves(backend: Backend) -> None:
    """Exactly: the embedding's sums have the bits that the residual epilogue would give, so that the first layer's norm
    is like any other. The expected sums spell out the shuffles of epilogue.cuh."""
    table = draw(np.random.default_rng(1), 3, 48, dtype=torch.bfloat16)
    h, sumsq = nan(3, 48, device=backend.device), nan(3, 3, device=backend.device)
    embed(backend, table.to(backend.device), torch.arange(3, dtype=torch.int32, device=backend.device), h, sumsq)
    x = table.float().numpy().reshape(3, 3, 2, 8)
    exact = x[:, :, 1].astype(np.float64) ** 2 + (x[:, :, 0] * x[:, :, 0]).astype(np.float64)
    s = exact.astype(np.float32)  # a bf16 squared is exact in f32, so this is one rounding, as fma's
    s = s[..., 0::2] + s[..., 1::2]
    s = s[..., 0::2] + s[..., 1::2]
    np.testing.assert_array_equal(sumsq.cpu().numpy(), s[..., 0] + s[..., 1])


def test_ids_are_checked_on_the_host() -> None:
    check_ids([0, 9, -1, -2], 10, 2)
    for ids, words in (([1, 10], "token id 10 at row 1: expected -2 to 9"), ([-3], "token id -3 at row 0")):
        with pytest.raises(KernelError, match=words):
            check_ids(ids, 10, 2)


# ---- rms_norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("T", "K"), [(1, 8), (3, 40), (2, 2056)])
def test_norm(backend: Backend, T: int, K: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(K)
    h = draw(rng, T, K) * torch.from_numpy(rng.uniform(0.01, 30, (T, 1))).float()
    weight = torch.from_numpy(rng.uniform(0.2, 2, K)).float()
    sumsq = torch.from_numpy(tile_sumsq(f64(h))).float()
    norm = NormedInput(sumsq.to(backend.device), weight.to(backend.device), 1e-5)
    y = nan(T, K, dtype=dtype, device=backend.device)
    rms_norm(backend, h.to(backend.device), norm, y)
    exact = exact_norm(f64(h), f64(weight), 1e-5)
    # A sum of K / 16 numbers, a division, a root and two products in f32, and the output's own rounding.
    own = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0}[dtype]
    np.testing.assert_allclose(f64(y), exact, rtol=(8 + K / 16) * 2.0**-24 + own, atol=1e-7)


def test_a_norms_row_does_not_depend_on_the_others(backend: Backend) -> None:
    rng = np.random.default_rng(3)
    h = draw(rng, 9, 264).to(backend.device)
    sumsq = torch.from_numpy(tile_sumsq(f64(h))).float().to(backend.device)
    weight = torch.ones(264, device=backend.device)
    y = nan(9, 264, device=backend.device)
    rms_norm(backend, h, NormedInput(sumsq, weight, 1e-6), y)
    for i in (0, 8):
        alone = nan(1, 264, device=backend.device)
        rms_norm(backend, h[i : i + 1], NormedInput(sumsq[i : i + 1], weight, 1e-6), alone)
        assert torch.equal(alone[0], y[i])


# ---- gated_product --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_product(backend: Backend, activation: str, source: torch.dtype, target: torch.dtype) -> None:
    """Gate and up are halves of one tensor, as if one launch stored both."""
    both = (draw(np.random.default_rng(4), 3, 2 * 300) * 4).to(source).to(backend.device)
    gate, up = both[:, :300], both[:, 300:]
    y = nan(3, 300, dtype=target, device=backend.device)
    gated_product(backend, gate, up, y, activation)
    exact = ACTIVATIONS[activation](f64(gate)) * f64(up)
    # ex2.approx is within 2 ulp (PTX ISA); its argument, up to 2^5, is rounded to 2^-19.
    own = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0}[target]
    np.testing.assert_allclose(f64(y), exact, rtol=2.0**-18 + own, atol=1e-6)


def test_far_gates(backend: Backend) -> None:
    """Where an exponential over- or underflows, and where 1 + tanh would have lost all digits."""
    gate = torch.tensor([[-1e30, -300.0, -20.0, -6.0, -3.0, 0.0, 12.0, 1e30]], device=backend.device)
    for activation, exact in ACTIVATIONS.items():
        gated_product(backend, gate, torch.ones_like(gate), y := torch.full_like(gate, float("nan")), activation)
        expected = [0, 0, *exact(np.array([-20.0, -6.0, -3.0, 0.0, 12.0])), 1e30]
        if activation == "gelu_tanh":  # tanh's own digits end at -6: the formula as x / (1 + e^-2u)
            u = (2 / np.pi) ** 0.5 * (np.array([-6.0, -3.0]) + 0.044715 * np.array([-6.0, -3.0]) ** 3)
            expected[3:5] = np.array([-6.0, -3.0]) / (1 + np.exp(-2 * u))
        np.testing.assert_allclose(f64(y)[0], expected, rtol=1e-5, atol=1e-37)


# ---- scale_logits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("scale", [1.0, 0.0625])
def test_logits_are_scaled_and_capped(backend: Backend, scale: float, softcap: float | None) -> None:
    """Rows apart; more columns than a block has, and not a multiple of them."""
    wide = (draw(np.random.default_rng(7), 3, 1100) * 40).to(backend.device)
    x = wide[:, :1029]
    exact = scale * f64(x)
    rest = wide[:, 1029:].clone()
    scale_logits(backend, x, scale, softcap)
    if softcap is None:
        assert np.array_equal(f64(x), exact.astype(np.float32))
    else:
        # ex2.approx is within 2 ulp of an exponent of up to 2^3 (6 or less counts) rounded to 2^-21.
        np.testing.assert_allclose(f64(x), softcap * np.tanh(exact / softcap), rtol=0, atol=softcap * 2.0**-21)
    assert torch.equal(wide[:, 1029:], rest)


# ---- all ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [61, 75])
def test_other_architectures(arch: int) -> None:
    backend = backend_or_skip("race", arch)
    rng = np.random.default_rng(5)
    table, h, sumsq = draw(rng, 4, 32, dtype=torch.float16), nan(2, 32, device=backend.device), torch.zeros(2, 2)
    embed(backend, table, torch.tensor([3, 1], dtype=torch.int32), h, sumsq)
    y = nan(2, 32, device=backend.device)
    rms_norm(backend, h, NormedInput(sumsq, torch.ones(32), 0.0), y)
    np.testing.assert_allclose((f64(y) ** 2).mean(1), 1, rtol=1e-5)
    gated_product(backend, h, y, out := nan(2, 32, device=backend.device))
    np.testing.assert_allclose(f64(out), silu(f64(h)) * f64(y), rtol=1e-5, atol=1e-6)


class NeverLaunches:
    device = torch.device("cpu")
    arch = 86

    def load(self, spec: object) -> None:
        raise AssertionError("a kernel was asked for")


def test_bad_arguments_are_refused_before_a_launch() -> None:
    nobody = NeverLaunches()
    table, ids = torch.zeros(10, 16, dtype=torch.float16), torch.zeros(2, dtype=torch.int32)
    h, sumsq = torch.zeros(2, 16), torch.zeros(2, 1)
    norm = NormedInput(sumsq, torch.ones(16), 1e-5)
    cases = [
        ("table is torch.float32", lambda: embed(nobody, table.float(), ids, h, sumsq)),
        ("C a multiple of 8", lambda: embed(nobody, table[:, :12], ids, h, sumsq)),
        ("ids is torch.int64", lambda: embed(nobody, table, ids.long(), h, sumsq)),
        (r"h has shape \(3, 16\)", lambda: embed(nobody, table, ids, torch.zeros(3, 16), sumsq)),
        ("h starts at address", lambda: embed(nobody, table, ids, torch.zeros(33)[1:].view(2, 16), sumsq)),
        ("sumsq has shape", lambda: embed(nobody, table, ids, h, torch.zeros(2, 2))),
        ("go together", lambda: embed(nobody, table, ids, h, sumsq, permuted=h.clone())),
        ("expected a contiguous tensor", lambda: embed(nobody, torch.zeros(16, 10).half().T[:, :16], ids, h, sumsq)),
        ("K a multiple of 8", lambda: rms_norm(nobody, h[:, :12], norm, h)),
        ("y has shape", lambda: rms_norm(nobody, h, norm, torch.zeros(2, 8))),
        ("x is torch.float16", lambda: rms_norm(nobody, h.half(), norm, h)),
        ("up is torch.float16", lambda: gated_product(nobody, h, h.half(), h)),
        ("rows 16 elements apart", lambda: gated_product(nobody, h, torch.zeros(2, 32)[:, :16], h)),
        ("y has shape", lambda: gated_product(nobody, h, h, torch.zeros(3, 16))),
        ("activation 'relu': expected silu or gelu_tanh", lambda: gated_product(nobody, h, h, h, "relu")),
        ("x is torch.float16", lambda: scale_logits(nobody, h.half(), 1.0, None)),
        ("softcap is -1", lambda: scale_logits(nobody, h, 1.0, -1.0)),
    ]
    for words, call in cases:
        with pytest.raises(KernelError, match=words):
            call()
