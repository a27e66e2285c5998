"""One random layer in a checkpoint file, for tests of the formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from exl.checkpoint.checkpoint import Checkpoint
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.formats.tensors import to_float

NAME = "model.layers.0.mlp.up_proj"


def random_layer(seed: object, K: int, N: int, group_size: int, bits: int, *, zeros: object = None):
    """Codes u8 [K, N], zeros u8 [G, N] as given, or random and with the extremes, and scales f16 [G, N]. The last group
    may be shorter."""
    rng = np.random.default_rng([int(byte) for byte in repr(seed).encode()])
    G = -(-K // group_size)
    codes = rng.integers(0, 2**bits, (K, N), dtype=np.uint8)
    if zeros is None:
        zeros = rng.integers(0, 2**bits, (G, N), dtype=np.uint8)
        zeros[0, :4] = [0, 1, 2**bits - 1, 2 ** (bits - 1)]
    scales = rng.uniform(1e-3, 1e-2, (G, N)).astype(np.float16)
    return codes, np.broadcast_to(np.asarray(zeros, np.uint8), (G, N)), scales


def open_layer(folder: Path, tensors: dict, name: str = NAME) -> Checkpoint:
    """Writes a module's tensors, of NumPy or torch, by the ends of their names."""
    as_torch = {
        f"{name}.{ending}": value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        for ending, value in tensors.items()
    }
    save_file(as_torch, folder / "model.safetensors")
    return Checkpoint.open(folder)


def expect_matrix(matrix: QuantizedMatrix, codes, zeros, scales, g_idx=None) -> None:
    """Exactly these, in sorted order of groups; codes also by blocks of columns, and as words if there are any."""
    K, N = codes.shape
    order = list(range(K)) if g_idx is None else sorted(range(K), key=lambda k: g_idx[k])
    assert (matrix.K, matrix.N) == (K, N)
    assert (None if matrix.order is None else matrix.order.tolist()) == (None if order == list(range(K)) else order)
    for start, stop in ((0, N), (0, 1), (3, N - 2), (N - 1, N), (5, 5)):
        block = matrix.codes(start, stop)
        assert (block.dtype, block.shape) == (np.uint8, (K, stop - start))
        np.testing.assert_array_equal(block, codes[order][:, start:stop])
    assert matrix.zeros.dtype == np.uint8
    np.testing.assert_array_equal(matrix.zeros, zeros)
    np.testing.assert_array_equal(matrix.scales.astype(np.float64), np.asarray(scales, np.float64))
    if matrix.read_words is not None:
        words = matrix.read_words()
        assert (words.dtype, words.shape, words.flags.c_contiguous) == (np.uint32, (K * matrix.bits // 32, N), True)
        for n in (0, N - 1):  # one column's stream of bits, lowest first
            stream = sum(int(word) << (32 * i) for i, word in enumerate(words[:, n].tolist()))
            assert [stream >> (matrix.bits * k) & (2**matrix.bits - 1) for k in range(K)] == codes[:, n].tolist()


def dense_values(matrix: DenseMatrix) -> np.ndarray:
    """f32 [N, K]."""
    return to_float(matrix.rows(0, matrix.N), matrix.dtype)
