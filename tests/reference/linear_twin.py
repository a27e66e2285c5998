"""References of the linear kernels, in float64 from the exact weights, and bounds of their error."""

from __future__ import annotations

import numpy as np

from exl.formats.matrix import QuantizedMatrix


def random_matrix(
    rng: np.random.Generator,
    bits: int,
    K: int,
    N: int,
    group_size: int,
    symmetric: bool = False,
    bias: bool = False,
    scale_dtype: str = "f16",
) -> QuantizedMatrix:
    """Random codes, zeros and scales in which every value occurs. Group size -1 means K; the last group may be shorter.

    bf16 and f32 scales are chosen so that neither f16 nor the other type can represent them.
    """
    group_size = K if group_size == -1 else group_size
    codes = rng.integers(0, 1 << bits, (K, N), dtype=np.uint8)
    G = -(-K // group_size)
    zeros = rng.integers(0, 1 << bits, (G, N), dtype=np.uint8)
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    scales = ((0.25 + rng.random((G, N))) * 2.0**-bits).astype(np.float16 if scale_dtype == "f16" else np.float32)
    if scale_dtype == "bf16":
        scales = ((scales * np.float32(2.0**-20)).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    b = rng.standard_normal(N).astype(np.float16) if bias else None
    return QuantizedMatrix(
        bits,
        group_size,
        K,
        N,
        scales,
        zeros,
        None,
        b,
        lambda start, stop: codes[:, start:stop],
        scale_dtype=scale_dtype,
    )


def dequantize(matrix: QuantizedMatrix) -> np.ndarray:
    """W [K, N], exact in float64; rows in sorted order."""
    group = np.arange(matrix.K) // matrix.group_size
    codes = matrix.codes(0, matrix.N).astype(np.float64)
    return matrix.scales.astype(np.float64)[group] * (codes - matrix.zeros[group])


def bias_of(matrix: QuantizedMatrix) -> np.ndarray:
    return np.zeros(matrix.N) if matrix.bias is None else matrix.bias.astype(np.float64)


def sum_bound(x: np.ndarray, matrix: QuantizedMatrix) -> np.ndarray:
    """Largest error of an f32 sum of these products, [T, N].

    Tensor cores add 4 products (sm_75) or more at a time and truncate each sum to 24 bits; then every group and slice
    adds one rounding. A partial sum is never larger than the sum of magnitudes.
    """
    num_roundings = matrix.K / 4 + 2 * matrix.num_groups + 16
    magnitude = np.abs(x) @ np.abs(dequantize(matrix)) + np.abs(bias_of(matrix))
    return num_roundings * 2.0**-23 * magnitude


def rms_norm(h: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return h / np.sqrt((h**2).mean(axis=1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """Hendrycks and Gimpel, Gaussian Error Linear Units (2016), the approximation by tanh."""
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def layer_norm(h: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Ba, Kiros and Hinton, Layer Normalization (2016), without the bias; the variance is that of the row itself."""
    centred = h - h.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps) * weight


def tile_sumsq(h: np.ndarray) -> np.ndarray:
    """Sums of squares of 16 channels each, [T, ceil(N / 16)]."""
    T, N = h.shape
    padded = np.zeros((T, -(-N // 16) * 16))
    padded[:, :N] = h
    return (padded**2).reshape(T, -1, 16).sum(axis=2)
