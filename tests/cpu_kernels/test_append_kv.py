"""Appending to the cache against ``exl.ops.torch_kv``'s definition of what is stored, and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exl.cpu_kernels.append_kv import AppendKV
from exl.cpu_kernels.library import Library, slots
from exl.layout.cpu_pages import PageArrays, copy_tokens, page_arrays
from exl.layout.kv import KV_BITS, page_offsets
from exl.ops.torch_kv import as_stored, hadamard, quantize_rows
from tests.cpu_kernels.guards import guarded_array
from tests.cpu_kernels.kv_pages import hadamard_matrix

KINDS = tuple(KV_BITS)
T, H, HKV, NUM_PAGES = 5, 6, 2, 3
SLOTS = np.array([2 * 64 + 5, -1, 63, 64, 2 * 64 + 63], np.int32)


def append(
    library: Library, spec: AppendKV, heads: NDArray, angles: NDArray, weights: tuple = (None, 0.0, None, 0.0),
    before: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:  # fmt: skip
    """heads f32 [T, H + 2 Hkv, D] -> q and pages, whose bytes were ``before``."""
    D = spec.head_dim
    wide = np.full((T, heads.shape[1] * D + 3), np.nan, np.float32)
    wide[:, :-3] = heads.reshape(T, -1)
    qkv = guarded_array(wide.reshape(-1)[:-3])
    q = guarded_array(np.zeros((T, H, D), np.float32))
    size = page_offsets(spec.kind, D).num_bytes
    pages = guarded_array(np.full((NUM_PAGES, HKV, size), before, np.uint8))
    cos, sin = guarded_array(np.cos(angles)), guarded_array(np.sin(angles))
    args = slots(qkv, wide.shape[1], q, pages, SLOTS, cos, sin, H, HKV, *weights)
    library.call(spec, args, T * HKV)
    return q, pages


def random_heads(head_dim: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((T, H + 2 * HKV, head_dim)).astype(np.float32)


def stored(arrays: PageArrays, row: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """K codes [Hkv, ...], K scales, V codes, V scales of a row."""
    page, token = divmod(int(SLOTS[row]), 64)
    return (
        arrays.k[page, ..., token], arrays.k_scales[page, ..., token],
        arrays.v[page, :, token], arrays.v_scales[page, :, token],
    )  # fmt: skip


def expected(x: torch.Tensor, bits: int) -> tuple[NDArray, NDArray]:
    """Codes and scales of rows [..., D], rotated if they are quantized."""
    if bits >= 16:
        return as_stored(x, torch.float32 if bits == 32 else torch.float16).numpy(), np.zeros((*x.shape[:-1], 0))
    codes, scales = quantize_rows(x, bits)
    return codes.numpy(), scales.numpy()


def same_bits(a: NDArray, b: NDArray) -> bool:
    return a.shape == b.shape and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [4, 36, 80, 128])
def test_codes_and_scales_are_those_of_the_definition(library: Library, kind: str, head_dim: int) -> None:
    heads = random_heads(head_dim)
    heads[0, -1, :2] = 1e6, -1e6  # f16 saturates
    heads[2, -2] = 0.0
    heads[3, -1] *= 1e-9  # scales are denormal or zero
    heads[4, -1] = np.where(np.arange(head_dim) % 2, 3.0, -3.0)  # the first of equal magnitudes decides the sign
    q, pages = append(library, AppendKV(kind, head_dim, half=0), heads, np.zeros((T, 0), np.float32))
    x = torch.from_numpy(heads.copy())
    if kind not in ("f32", "f16"):
        hadamard(x, head_dim & -head_dim)
    assert same_bits(q, x[:, :H].numpy())
    arrays = page_arrays(pages, kind, head_dim)
    for row in (0, 2, 3, 4):
        found = stored(arrays, row)
        for i, bits in enumerate(KV_BITS[kind]):
            part = x[row, H + HKV * i : H + HKV * (i + 1)]
            codes, scales = expected(part, bits)
            assert same_bits(found[2 * i], codes)
            assert same_bits(found[2 * i + 1], scales.astype(np.float16))


@pytest.mark.parametrize(("head_dim", "half"), [(8, 4), (36, 9), (64, 32), (80, 20), (128, 64)])
def test_norm_and_rotation(library: Library, head_dim: int, half: int) -> None:
    rng = np.random.default_rng(1)
    heads, angles = random_heads(head_dim), rng.standard_normal((T, half)).astype(np.float32)
    weights = [rng.standard_normal(head_dim).astype(np.float32) for _ in range(2)]
    eps = (1e-5, 1e-2)
    spec = AppendKV("f32", head_dim, half, q_norm=True, k_norm=True)
    q, pages = append(library, spec, heads, angles, (weights[0], eps[0], weights[1], eps[1]))
    x = heads.astype(np.float64)
    for part, w, e in ((x[:, :H], weights[0], eps[0]), (x[:, H : H + HKV], weights[1], eps[1])):
        part *= w / np.sqrt((part**2).mean(-1, keepdims=True) + e)
        turned = (part[..., :half] + 1j * part[..., half : 2 * half]) * np.exp(1j * angles.astype(np.float64))[:, None]
        part[..., :half], part[..., half : 2 * half] = turned.real, turned.imag
    np.testing.assert_allclose(q, x[:, :H], atol=2e-6)
    arrays = page_arrays(pages, "f32", head_dim)
    for row in (0, 2, 3, 4):
        key, _, value, _ = stored(arrays, row)
        np.testing.assert_allclose(key, x[row, H : H + HKV], atol=2e-6)
        np.testing.assert_array_equal(value, heads[row, H + HKV :])


def test_norms_of_whole_rows(library: Library) -> None:
    """What a head is multiplied by is its row's; it has its own part of the weights."""
    rng, D = np.random.default_rng(2), 36
    heads = random_heads(D)
    weights = [rng.standard_normal((n, D)).astype(np.float32) for n in (H, HKV)]
    factors = rng.uniform(0.5, 2, (T, 2)).astype(np.float32)
    spec = AppendKV("f32", D, half=0, q_norm=True, k_norm=True, row_norms=True)
    flat = [guarded_array(w.reshape(-1)) for w in weights]
    args = (flat[0], 0.0, flat[1], 0.0, guarded_array(factors))
    q, pages = append(library, spec, heads, np.zeros((T, 0), np.float32), args)
    np.testing.assert_array_equal(q, heads[:, :H] * factors[:, :1, None] * weights[0])
    arrays = page_arrays(pages, "f32", D)
    for row in (0, 2, 3, 4):
        key, _, value, _ = stored(arrays, row)
        np.testing.assert_array_equal(key, heads[row, H : H + HKV] * factors[row, 1] * weights[1])
        np.testing.assert_array_equal(value, heads[row, H + HKV :])


def test_a_head_whose_squares_overflow_becomes_nan(library: Library) -> None:
    """And not zeros, which would go unnoticed."""
    heads, ones = random_heads(64), np.ones(64, np.float32)
    heads[1, 0] *= 1e25
    spec = AppendKV("f32", 64, half=0, q_norm=True, k_norm=True)
    q, _ = append(library, spec, heads, np.zeros((T, 0), np.float32), (ones, 1e-5, ones, 1e-5))
    assert np.isnan(q[1, 0]).all()
    assert np.isfinite(q).sum() == q.size - 64


def test_queries_of_quantized_caches_are_rotated(library: Library) -> None:
    heads = random_heads(96)
    q, _ = append(library, AppendKV("q4", 96, half=0), heads, np.zeros((T, 0), np.float32))
    np.testing.assert_allclose(q, heads[:, :H] @ hadamard_matrix(96), atol=1e-5)


def bytes_of_tokens(pages: NDArray[np.uint8], kind: str, head_dim: int) -> NDArray[np.uint8]:
    """[page * 64 + token, bytes]: all that belongs to each token."""
    arrays = page_arrays(pages, kind, head_dim)
    by_token = [arrays.k.swapaxes(-1, -2), arrays.k_scales.swapaxes(-1, -2), arrays.v, arrays.v_scales]
    lines = [np.ascontiguousarray(x.swapaxes(1, 2)).reshape(NUM_PAGES * 64, -1) for x in by_token]
    return np.concatenate([x.view(np.uint8) for x in lines if x.size], axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_all_bytes_of_new_tokens_are_written_and_no_others(library: Library, kind: str) -> None:
    heads, angles = random_heads(40), np.ones((T, 20), np.float32)
    found = []
    for fill in (0x5A, 0xA5):
        _, pages = append(library, AppendKV(kind, 40, 20), heads, angles, before=fill)
        tokens = bytes_of_tokens(pages, kind, 40)
        assert tokens.size == pages.size
        assert (np.delete(tokens, SLOTS[SLOTS >= 0], axis=0) == fill).all()
        found.append(tokens[SLOTS[SLOTS >= 0]])
    assert same_bits(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_stored_as_nan(library: Library, kind: str) -> None:
    heads = random_heads(64)
    heads[0, H:, 3] = np.nan
    _, pages = append(library, AppendKV(kind, 64, half=0), heads, np.zeros((T, 0), np.float32))
    key, key_scales, value, value_scales = stored(page_arrays(pages, kind, 64), 0)
    for codes, scales in ((key, key_scales), (value, value_scales)):
        marks = scales if scales.size else codes
        assert np.isnan(marks.astype(np.float32)).any(axis=-1).all()


def test_every_instruction_set_gives_the_same_bits(libraries: list[Library]) -> None:
    heads, angles = random_heads(80), np.random.default_rng(2).standard_normal((T, 40)).astype(np.float32)
    weights = (np.linspace(0.5, 2, 80, dtype=np.float32), 1e-6, None, 0.0)
    for kind in KINDS:
        spec = AppendKV(kind, 80, 40, q_norm=True)
        first, *others = [append(library, spec, heads, angles, weights) for library in libraries]
        for other in others:
            assert same_bits(first[0], other[0])
            assert same_bits(first[1], other[1])


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_page_s_first_tokens(kind: str) -> None:
    rng = np.random.default_rng(3)
    source, target = rng.integers(0, 256, (2, NUM_PAGES, HKV, page_offsets(kind, 24).num_bytes)).astype(np.uint8)
    old = bytes_of_tokens(target, kind, 24)
    copy_tokens(source, target, 17, kind, 24)
    copied = (np.arange(NUM_PAGES * 64) % 64 < 17)[:, None]
    assert same_bits(bytes_of_tokens(target, kind, 24), np.where(copied, bytes_of_tokens(source, kind, 24), old))
