"""New tokens in their pages: the twin's bytes if arithmetic is exact, otherwise within half a step of float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import backend_or_skip
from reference.attention_twin import bytes_of_tokens

from exl.errors import KernelError
from exl.kernels.append_kv import append_kv, check_slots
from exl.kernels.attention_io import HeadNorms, QkvRows
from exl.kernels.launch import Backend
from exl.layout.pages import KINDS, PageLayout, hadamard, pack_pages, unpack_pages

H, HKV = 6, 2
HEAD_DIMS = (16, 64, 80, 96, 128, 256)
EIGHTS = (("k8v4", 8), ("q4", 24), ("q8", 40), ("f16", 72), ("q4", 120))  # V ends with half a tile


def no_rope(T: int, D: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(T, D // 2, device=device), torch.zeros(T, D // 2, device=device)


def turned(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """RoPE in float64 on x [T, heads, D]: channel c turns with channel c + half, for c < half."""
    half = cosine.shape[1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cosine[:, None], sine[:, None]
    return np.concatenate([low * c - high * s, high * c + low * s, rest], -1)


def normalised(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize(("kind", "D"), [*((kind, D) for D in HEAD_DIMS for kind in KINDS), *EIGHTS])
def test_pages_are_the_twins_byte_for_byte(backend: Backend, kind: str, D: int) -> None:
    """Without RoPE: 70 tokens on two pages in shuffled order, written in a shuffled order; zeros, equal magnitudes of
    both signs, a scale that saturates."""
    layout, T = PageLayout(kind, D), 70
    rng = np.random.default_rng(D)
    qkv = (rng.standard_normal((T, (H + 2 * HKV) * D)) * 3).astype(np.float32)
    kv = qkv[:, H * D :].reshape(T, 2, HKV, D)
    kv[3], kv[5, :, :, 1:], kv[7, :, :, 1::2] = 0, 0, -kv[7, :, :, ::2]
    if kind != "f16":
        kv[9, :, 0, 0] = 3e6
    expected = pack_pages(layout, kv[:, 0], kv[:, 1])
    where = np.array([2, 0])  # page of the first 64 tokens, of the rest
    order = rng.permutation(T)
    slots = torch.from_numpy((where[order // 64] * 64 + order % 64).astype(np.int32)).to(backend.device)
    pages = torch.full((3, HKV, layout.num_bytes), 0xAB, dtype=torch.uint8, device=backend.device)
    q = torch.full((T, H, D), float("nan"), dtype=torch.float16, device=backend.device)
    rows = torch.from_numpy(qkv[order].copy()).to(backend.device)
    append_kv(backend, layout, QkvRows(rows, *no_rope(T, D, backend.device)), slots, pages, q)
    found = pages.cpu().numpy()
    np.testing.assert_array_equal(found[2], expected[0])
    written = bytes_of_tokens(layout, 6)
    np.testing.assert_array_equal(found[0][:, written], expected[1][:, written])
    assert (np.delete(found[0], written, axis=1) == 0xAB).all()  # other tokens' bytes, and other pages, are left alone
    assert (found[1] == 0xAB).all()
    exact = hadamard(qkv[order][:, : H * D].reshape(T, H, D), layout.hadamard_size)
    np.testing.assert_array_equal(q.cpu().numpy(), exact.astype(np.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("D", "half"), [(64, 32), (128, 16), (80, 40)])
def test_norm_and_rope(backend: Backend, kind: str, D: int, half: int, dtype: torch.dtype) -> None:
    """Partial RoPE among them. K and V are within half a step of their codes of the exact values."""
    layout, T = PageLayout(kind, D), 5
    rng = np.random.default_rng(half)
    rows = torch.from_numpy(rng.standard_normal((T, (H + 2 * HKV) * D)) * 2).to(dtype)
    angles = rng.uniform(0, 50, (T, half))
    cosine, sine = (torch.from_numpy(f(angles)).float() for f in (np.cos, np.sin))
    weights = [torch.from_numpy(rng.uniform(0.5, 2, D)).float() for _ in range(2)]
    place = backend.device
    pages = torch.zeros(1, HKV, layout.num_bytes, dtype=torch.uint8, device=place)
    q = torch.full((T, H, D), float("nan"), dtype=torch.float16, device=place)
    slots = torch.tensor([10, 11, -1, 63, 0], dtype=torch.int32, device=place)
    norms = HeadNorms(weights[0].to(place), weights[1].to(place), 1e-5)
    append_kv(backend, layout, QkvRows(rows.to(place), cosine.to(place), sine.to(place), norms), slots, pages, q)
    exact = rows.double().numpy().reshape(T, -1, D)
    c, s = cosine.double().numpy(), sine.double().numpy()
    q64, k64 = (
        turned(normalised(x, w.double().numpy(), 1e-5), c, s)
        for x, w in ((exact[:, :H], weights[0]), (exact[:, H : H + HKV], weights[1]))
    )
    turn = lambda x: transform(x, layout.hadamard_size)  # noqa: E731
    # f32 arithmetic: a norm, a turn and a Hadamard of up to 7 additions, each within 2^-24 of the row's largest.
    largest = np.abs(q64).max()
    np.testing.assert_allclose(q.cpu().double().numpy(), turn(q64), rtol=2.0**-11, atol=64 * largest * 2.0**-24)
    kept = [i for i, slot in enumerate(slots.tolist()) if slot >= 0]
    k, v = unpack_pages(layout, pages.cpu().numpy())
    at = slots.cpu().numpy()[kept]
    for found, wanted, bits in ((k, k64, layout.k_bits), (v, exact[:, H + HKV :], layout.v_bits)):
        wanted = turn(wanted)[kept]
        if bits == 16:
            limit = 2.0**-11 * np.abs(wanted) + 2.0**-24 + 64 * np.abs(wanted).max() * 2.0**-24
        else:
            groups = np.pad(np.abs(wanted), ((0, 0), (0, 0), (0, -D % 32))).reshape(*wanted.shape[:2], -1, 32).max(-1)
            step = np.repeat(groups / (127 if bits == 8 else 8), 32, -1)[..., :D]
            # Half a step. At 4 bits codes end at 7: a value that mirrors the extreme is a whole step off. The step is
            # rounded to f16.
            limit = (0.5 if bits == 8 else 1.0) * step + (2.0**-10 + 2.0**-18) * np.abs(wanted).max()
        assert (np.abs(found[at] - wanted) <= limit).all()


def transform(x: np.ndarray, size: int) -> np.ndarray:
    """Walsh-Hadamard in float64, from its definition."""
    i = np.arange(size)
    matrix = (-1.0) ** np.array([[bin(a & b).count("1") for b in i] for a in i]) / np.sqrt(size)
    return (x.reshape(*x.shape[:-1], -1, size) @ matrix).reshape(x.shape)


@pytest.mark.parametrize("arch", [61, 75])
def test_other_architectures(arch: int) -> None:
    backend, layout = backend_or_skip("race", arch), PageLayout("k8v4", 96)
    kv = np.random.default_rng(arch).standard_normal((3, 2, 1, 96)).astype(np.float32)
    qkv = torch.from_numpy(np.concatenate([np.zeros((3, 96), np.float32), kv.reshape(3, -1)], 1))
    pages = torch.zeros(1, 1, layout.num_bytes, dtype=torch.uint8)
    q = torch.zeros(3, 1, 96, dtype=torch.float16)
    rows = QkvRows(qkv, *no_rope(3, 96, backend.device))
    append_kv(backend, layout, rows, torch.arange(3, dtype=torch.int32), pages, q)
    expected = pack_pages(layout, kv[:, 0], kv[:, 1])
    np.testing.assert_array_equal(unpack_pages(layout, pages.numpy())[0][:3], unpack_pages(layout, expected)[0][:3])
    np.testing.assert_array_equal(unpack_pages(layout, pages.numpy())[1][:3], unpack_pages(layout, expected)[1][:3])


def test_slots_are_checked_on_the_host() -> None:
    check_slots([0, -1, 127], 2)
    for slots, words in (([0, 128], "slot 128 at row 1: expected -1 to 127"), ([-2], "slot -2 at row 0")):
        with pytest.raises(KernelError, match=words):
            check_slots(slots, 2)


class NeverLaunches:
    device = torch.device("cpu")
    arch = 86

    def load(self, spec: object) -> None:
        raise AssertionError("a kernel was asked for")


def test_bad_arguments_are_refused_before_a_launch() -> None:
    layout = PageLayout("q4", 64)
    good = {
        "rows": QkvRows(torch.zeros(2, (4 + 2 * 2) * 64), torch.ones(2, 32), torch.zeros(2, 32)),
        "slots": torch.zeros(2, dtype=torch.int32),
        "pages": torch.zeros(1, 2, layout.num_bytes, dtype=torch.uint8),
        "q": torch.zeros(2, 4, 64, dtype=torch.float16),
    }
    for change, words in (
        ({"rows": replace(good["rows"], qkv=torch.zeros(2, 100))}, "qkv has shape"),
        ({"rows": replace(good["rows"], cosine=torch.ones(2, 33))}, "33 angles"),
        ({"rows": replace(good["rows"], sine=torch.zeros(2, 16))}, "sine has shape"),
        ({"slots": torch.zeros(2, dtype=torch.int64)}, "slots is torch.int64"),
        ({"pages": torch.zeros(1, 2, 100, dtype=torch.uint8)}, "pages has shape"),
        ({"pages": torch.zeros(1, 3, layout.num_bytes, dtype=torch.uint8)}, "whole groups"),
        ({"q": torch.zeros(2, 4, 64)}, "q is torch.float32"),
        ({"rows": replace(good["rows"], norms=HeadNorms(torch.ones(32), None, 0.0))}, "q_norm has shape"),
        ({"rows": replace(good["rows"], norms=HeadNorms(None, torch.ones(64).half(), 0.0))}, "k_norm is torch.float16"),
    ):
        with pytest.raises(KernelError, match=words):
            append_kv(NeverLaunches(), layout, **{**good, **change})
