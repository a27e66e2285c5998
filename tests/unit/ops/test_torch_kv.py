"""Quantized K and V against the rules in docs/memory.md, computed in float64 one element at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exl.layout.kv import KV_BITS, KVLayout
from exl.ops import torch_attention
from exl.ops.torch_kv import as_stored, dequantize_rows, hadamard, quantize_rows


def plain_hadamard(size: int) -> np.ndarray:
    return np.array([[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]) / size**0.5


def plain_quantize(row: np.ndarray, bits: int) -> tuple[list[int], list[float]]:
    """One token's head -> codes and scales."""
    codes, scales = [], []
    for start in range(0, len(row), 32):
        group = [float(x) for x in row[start : start + 32]]
        extreme = max(group, key=abs)  # on ties the first one
        scale = float(np.float16(np.float32(abs(extreme)) / np.float32(127) if bits == 8 else extreme / -8))
        low, high = (-127, 127) if bits == 8 else (-8, 7)
        codes += [
            0 if scale == 0 else int(np.clip(np.rint(np.float32(x) / np.float32(scale)), low, high)) for x in group
        ]
        scales.append(scale)
    return codes, scales


def unpack(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes.view(np.int8).astype(int)
    return np.concatenate([codes & 15, codes >> 4], axis=-1).astype(int) - 8


@pytest.mark.parametrize("size", [1, 2, 8, 16, 64, 128])
def test_hadamard_is_the_matrix_and_its_own_inverse(size):
    x = torch.randn(3, 2, 384 if size == 128 else 5 * size, generator=torch.Generator().manual_seed(size))
    rotated = x.clone()
    hadamard(rotated, size)
    runs = x.double().numpy().reshape(3, 2, -1, size)
    assert np.allclose(rotated.numpy().reshape(runs.shape), runs @ plain_hadamard(size), atol=1e-5)
    hadamard(rotated, size)
    assert torch.allclose(rotated, x, atol=1e-5)


@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_scales_are_as_documented(bits, head_dim):
    rng = np.random.default_rng(head_dim + bits)
    x = (rng.standard_normal((5, 2, head_dim)) * 10.0 ** rng.integers(-3, 3, (5, 2, 1))).astype(np.float32)
    x[0, 0] = 0
    x[1, 0, :4] = [3, -3, 3, -3]  # a tie: the first one decides the sign of the scale
    codes, scales = (array.numpy() for array in quantize_rows(torch.from_numpy(x), bits))
    assert codes.shape == (5, 2, head_dim * bits // 8)
    assert scales.shape == (5, 2, -(-head_dim // 32))
    for t in range(5):
        for head in range(2):
            expected_codes, expected_scales = plain_quantize(x[t, head], bits)
            assert scales[t, head].tolist() == expected_scales
            assert unpack(codes[t, head], bits).tolist() == expected_codes


@pytest.mark.parametrize("head_dim", [8, 80, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_come_back_within_half_a_step(bits, head_dim):
    x = torch.randn(7, 3, head_dim, generator=torch.Generator().manual_seed(bits))
    codes, scales = quantize_rows(x, bits)
    values = dequantize_rows(codes, scales, head_dim)
    steps = scales.float().abs().repeat_interleave(32, dim=-1)[..., :head_dim]
    # 4-bit codes are -8 to 7: a value that mirrors the extreme one is off by a whole step.
    assert ((values - x).abs() <= steps * (0.501 if bits == 8 else 1.001)).all()
    exact = scales.double().repeat_interleave(32, dim=-1)[..., :head_dim] * torch.from_numpy(
        unpack(codes.numpy(), bits)
    )
    assert torch.equal(values.double(), exact)


def test_extremes_saturate_instead_of_turning_infinite():
    x = torch.full((1, 1, 32), 3e38)
    for bits in (4, 8):
        codes, scales = quantize_rows(x, bits)
        assert torch.isfinite(dequantize_rows(codes, scales, 32)).all()
    tiny, scales = quantize_rows(torch.full((1, 1, 32), 1e-30), 4)
    assert (dequantize_rows(tiny, scales, 32) == 0).all()


@pytest.mark.parametrize("kind", KV_BITS)
def test_bytes_a_token(kind):
    """The table in docs/memory.md, at head size 128."""
    layout = KVLayout(kind, num_layers=3, num_kv_heads=2, head_dim=128)
    expected = {"f32": 1024, "f16": 512, "q8": 272, "k8v4": 208, "q4": 144}[kind]
    assert layout.slab_bytes(5) == 3 * 5 * 64 * 2 * expected
    assert [layout.hadamard_size, KVLayout(kind, 1, 1, 80).hadamard_size, KVLayout(kind, 1, 1, 96).hadamard_size] == (
        [128, 16, 32] if layout.quantized else [1, 1, 1]
    )


def test_an_f16_cache_saturates_and_keeps_nan():
    """f16 saturates as the kernels' pages do; f32 and bf16 can hold the value."""
    x = torch.tensor([65504.0, 65519.0, 65520.0, -1e5, float("inf"), float("nan"), 0.1])
    stored = as_stored(x, torch.float16)
    assert stored[:5].tolist() == [65504, 65504, 65504, -65504, 65504]
    assert stored[5].isnan()
    assert torch.equal(stored[6], x[6].half())
    assert torch.equal(as_stored(x, torch.float32).nan_to_num(0, 1, 1), x.nan_to_num(0, 1, 1))


def test_appended_rows_of_an_f16_cache_saturate():
    pages = torch.zeros(1, 64, 1, 4, dtype=torch.float16)
    staged = SimpleNamespace(slots=torch.tensor([3]), cached_rows=None)
    torch_attention._append(torch.full((1, 1, 4), 1e5), pages, None, staged)
    assert (pages[0, 3] == 65504).all()
