"""Norms that compute their own sums, against float64: of rows, and of what joins the residual stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import backend_or_skip
from reference.linear_twin import layer_norm, rms_norm, tile_sumsq

from exl.errors import KernelError
from exl.kernels.launch import Backend
from exl.kernels.norms import KINDS, RowNorm, norm_add, row_norm

TYPES = (torch.float16, torch.bfloat16, torch.float32)
OWN = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0}  # the output's rounding
EXACT = {"rms": rms_norm, "layer": layer_norm}
EPS = 1e-5


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def rows(rng: np.random.Generator, T: int, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows whose means are not small beside their deviations."""
    return torch.from_numpy(rng.standard_normal((T, K)) * rng.uniform(0.1, 3, (T, 1)) + rng.uniform(-2, 2)).to(dtype)


def weights(rng: np.random.Generator, K: int, backend: Backend, kind: str) -> RowNorm:
    return RowNorm(torch.from_numpy(rng.uniform(0.2, 2, K)).float().to(backend.device), EPS, kind)


def limit(exact: np.ndarray, own: float) -> np.ndarray:
    """A sum of K terms in a tree of lanes and warps, a root, a division, a difference and two products in f32."""
    return (24 * 2.0**-24 + own) * np.abs(exact) + 8 * 2.0**-24 * np.abs(exact).max(axis=1, keepdims=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize(("T", "K"), [(1, 8), (3, 40), (2, 2056)])
def test_rows(backend: Backend, T: int, K: int, target: torch.dtype, kind: str) -> None:
    rng = np.random.default_rng(K)
    for source in TYPES:
        x, norm = rows(rng, T, K + 8, source).to(backend.device)[:, :K], weights(rng, K, backend, kind)
        y = torch.full((T, K + 16), float("nan"), dtype=target, device=backend.device)[:, :K]
        row_norm(backend, x, norm, y)
        exact = EXACT[kind](f64(x), f64(norm.weight), EPS)
        assert (np.abs(f64(y) - exact) <= limit(exact, OWN[target])).all()


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
def test_without_a_norm_rows_are_rounded_once(backend: Backend, source: torch.dtype, target: torch.dtype) -> None:
    """As torch rounds; f16 saturates."""
    x = rows(np.random.default_rng(1), 3, 72, source)
    x[1, :2] = torch.tensor([7e4, -7e4]).to(source).clamp(-65504 if source == torch.float16 else -7e4)
    y = torch.full((3, 72), float("nan"), dtype=target, device=backend.device)
    row_norm(backend, x.to(backend.device), None, y)
    wanted = x.float().clamp(-65504, 65504) if target == torch.float16 else x.float()
    assert torch.equal(y.cpu(), wanted.to(target))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_channels_go_where_a_consumer_expects_them(backend: Backend, kind: str | None) -> None:
    rng = np.random.default_rng(2)
    x, norm = rows(rng, 2, 264).to(backend.device), None if kind is None else weights(rng, 264, backend, kind)
    order = torch.from_numpy(rng.permutation(264).astype(np.int32)).to(backend.device)
    plain, moved = (torch.full((2, 264), float("nan"), dtype=torch.float16, device=backend.device) for _ in range(2))
    row_norm(backend, x, norm, plain)
    row_norm(backend, x, norm, moved, channel_map=order)
    assert torch.equal(moved[:, order.long()], plain)


@pytest.mark.parametrize("dtype", TYPES[:2])
def test_two_runs_of_channels_in_place(backend: Backend, dtype: torch.dtype) -> None:
    """q and k of a row, whose v stays: each with its own weight and its own sum."""
    rng = np.random.default_rng(3)
    qkv = rows(rng, 5, 96 + 32 + 32, dtype).to(backend.device)
    qkv[:, 96:128] *= 8
    before = qkv.clone()
    q, k = weights(rng, 96, backend, "rms"), weights(rng, 32, backend, "rms")
    row_norm(backend, qkv[:, :128], q, qkv[:, :128], k)
    parts = ((before[:, :96], q), (before[:, 96:128], k))
    exact = np.concatenate([rms_norm(f64(x), f64(norm.weight), EPS) for x, norm in parts], 1)
    assert (np.abs(f64(qkv[:, :128]) - exact) <= limit(exact, OWN[dtype])).all()
    assert torch.equal(qkv[:, 128:], before[:, 128:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "C"), [(1, 8), (3, 40), (2, 2064)])
def test_a_normalised_branch_joins_the_residual(backend: Backend, T: int, C: int, kind: str) -> None:
    rng = np.random.default_rng(C)
    y, h, norm = rows(rng, T, C), rows(rng, T, C + 8)[:, :C], weights(rng, C, backend, kind)
    added = 0.3 * EXACT[kind](f64(y), f64(norm.weight), EPS)
    expected = f64(h) + added
    wide = torch.nn.functional.pad(h, (0, 8)).to(backend.device)
    sumsq = torch.full((T, -(-C // 16)), float("nan"), device=backend.device)
    norm_add(backend, y.to(backend.device), norm, wide[:, :C], sumsq, 0.3)
    found = f64(wide[:, :C])
    assert (np.abs(found - expected) <= limit(added, 0.0) + 2.0**-23 * np.abs(expected)).all()
    assert not wide[:, C:].any()
    np.testing.assert_allclose(f64(sumsq), tile_sumsq(found), rtol=16 * 2.0**-24)


def test_a_rows_bits_do_not_depend_on_the_others(backend: Backend) -> None:
    rng = np.random.default_rng(4)
    x, norm = rows(rng, 9, 2056).to(backend.device), weights(rng, 2056, backend, "layer")

    def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, h, sumsq = torch.empty_like(x), x.clone(), torch.empty(len(x), 129, device=backend.device)
        row_norm(backend, x, norm, y)
        norm_add(backend, x, norm, h, sumsq)
        return y, h, sumsq

    together = both(x)
    for i in (0, 8):
        assert all(torch.equal(a[0], b[i]) for a, b in zip(both(x[i : i + 1]), together, strict=True))


@pytest.mark.parametrize("arch", [61, 75, 90])
def test_other_architectures(arch: int) -> None:
    backend = backend_or_skip("race", arch)
    rng = np.random.default_rng(5)
    x, norm = rows(rng, 2, 40), weights(rng, 40, backend, "layer")
    y, sumsq = torch.full((2, 40), float("nan")), torch.zeros(2, 3)
    row_norm(backend, x, norm, y, dependent=True)
    exact = layer_norm(f64(x), f64(norm.weight), EPS)
    assert (np.abs(f64(y) - exact) <= limit(exact, 0.0)).all()
    norm_add(backend, x, norm, h := torch.zeros(2, 40), sumsq, dependent=True)
    assert torch.equal(h, y)


class NeverLaunches:
    device = torch.device("cpu")
    arch = 86

    def load(self, spec: object) -> None:
        raise AssertionError("a kernel was asked for")


def test_bad_arguments_are_refused_before_a_launch() -> None:
    nobody, x, sumsq = NeverLaunches(), torch.zeros(2, 16), torch.zeros(2, 1)
    norm, half = RowNorm(torch.ones(16), EPS), RowNorm(torch.ones(8), EPS)
    channel_map = torch.zeros(16, dtype=torch.int32)
    cases = [
        ("K a multiple of 8", lambda: row_norm(nobody, x[:, :12], None, x)),
        ("y has shape", lambda: row_norm(nobody, x, norm, torch.zeros(2, 8))),
        ("weight of the norm has shape", lambda: row_norm(nobody, x, half, x)),
        ("kind of the norm: found 'batch'", lambda: row_norm(nobody, x, RowNorm(norm.weight, EPS, "batch"), x)),
        ("eps of the norm is -1", lambda: row_norm(nobody, x, RowNorm(norm.weight, -1.0), x)),
        ("same kind and epsilon", lambda: row_norm(nobody, x, half, x, RowNorm(half.weight, 0.0))),
        ("same kind and epsilon", lambda: row_norm(nobody, x, None, x, half)),
        ("weight of the norm has shape", lambda: row_norm(nobody, x, norm, x, half)),
        ("y is x", lambda: row_norm(nobody, x, norm, x, channel_map=channel_map)),
        ("y is torch.float16", lambda: norm_add(nobody, x.half(), norm, x, sumsq)),
        ("h has shape", lambda: norm_add(nobody, x, norm, torch.zeros(3, 16), sumsq)),
        ("sumsq has shape", lambda: norm_add(nobody, x, norm, x.clone(), torch.zeros(2, 2))),
    ]
    for words, call in cases:
        with pytest.raises(KernelError, match=words):
            call()
