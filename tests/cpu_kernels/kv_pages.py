"""Pages of random keys and values, with what they mean in float64, and attention over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import PAGE_SIZE
from exl.layout.cpu_pages import PageArrays, page_arrays
from exl.layout.kv import page_offsets
from exl.ops.torch_kv import dequantize_rows


@dataclass
class Cache:
    """B sequences on pages in random order. ``keys`` and ``values``: f64 [context][Hkv][D] of each."""

    kind: str
    head_dim: int
    pages: NDArray[np.uint8]  # [page][Hkv][bytes of a page]
    table: NDArray[np.int32]  # [B][P]
    context_len: NDArray[np.int32]
    keys: list[NDArray[np.float64]]
    values: list[NDArray[np.float64]]

    @property
    def num_kv_heads(self) -> int:
        return self.pages.shape[1]

    @property
    def arrays(self) -> PageArrays:
        return page_arrays(self.pages, self.kind, self.head_dim)

    def place(self, sequence: int, token: int) -> tuple[int, int]:
        """(page, token in it)."""
        return int(self.table[sequence, token // PAGE_SIZE]), token % PAGE_SIZE


def plain(kind: str, codes: NDArray, scales: NDArray, head_dim: int) -> NDArray[np.float64]:
    """[..., D] of codes and scales as ``exl.ops.torch_kv`` reads them."""
    if kind in ("f32", "f16"):
        return codes.astype(np.float64)
    codes, scales = (torch.from_numpy(np.ascontiguousarray(x)) for x in (codes.view(np.uint8), scales))
    return dequantize_rows(codes, scales, head_dim).double().numpy()


def random_cache(kind: str, head_dim: int, num_kv_heads: int, context_len: list[int], seed: int = 0) -> Cache:
    """Every page holds random bits that mean numbers around 1, also tokens beyond a context."""
    rng = np.random.default_rng(seed)
    num_sequences, width = len(context_len), max(-(-length // PAGE_SIZE) for length in context_len)
    num_pages = num_sequences * width + 3
    table = rng.permutation(num_pages)[: num_sequences * width].reshape(num_sequences, width).astype(np.int32)
    pages = np.zeros((num_pages, num_kv_heads, page_offsets(kind, head_dim).num_bytes), np.uint8)
    arrays = page_arrays(pages, kind, head_dim)
    for codes in (arrays.k, arrays.v):
        if codes.dtype.kind == "f":
            codes[...] = rng.standard_normal(codes.shape)
        else:
            codes[...] = rng.integers(0, 256, codes.shape).astype(np.uint8).view(codes.dtype)
    for scales, codes in ((arrays.k_scales, arrays.k), (arrays.v_scales, arrays.v)):
        scales[...] = rng.standard_normal(scales.shape) / (8 if codes.dtype == np.uint8 else 100)
    k = plain(kind, arrays.k.swapaxes(-1, -2), arrays.k_scales.swapaxes(-1, -2), head_dim)
    v = plain(kind, arrays.v, arrays.v_scales, head_dim)
    keys, values = (
        [x[table[b]].swapaxes(1, 2).reshape(-1, num_kv_heads, head_dim)[:n] for b, n in enumerate(context_len)]
        for x in (k, v)
    )
    return Cache(kind, head_dim, pages, table, np.array(context_len, np.int32), keys, values)


def hadamard_matrix(head_dim: int) -> NDArray[np.float64]:
    """[D, D]; the matrix of docs/memory.md for each run of channels."""
    size = head_dim & -head_dim
    i = np.arange(size)
    ones = np.array([bin(x).count("1") for x in range(size)])
    return np.kron(np.eye(head_dim // size), (-1.0) ** ones[i[:, None] & i[None]] / np.sqrt(size))


def exact_attention(
    cache: Cache, q: NDArray[np.float32], query_start: NDArray[np.int32], scale: float,
    window: int | None = None, softcap: float | None = None, sinks: NDArray | None = None,
) -> NDArray[np.float64]:  # fmt: skip
    """f64 [T, H, D], rows of the sequences' last tokens. ``sinks`` [H]: one more score of each head, of no value."""
    out = np.zeros(q.shape)
    group = q.shape[1] // cache.num_kv_heads
    for b, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        start, stop = query_start[b : b + 2]
        for row in range(start, stop):
            high = len(keys) - (stop - row) + 1
            low = 0 if window is None else max(0, high - window)
            for head in range(q.shape[1]):
                scores = keys[low:high, head // group] @ q[row, head].astype(np.float64) * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                sink = -np.inf if sinks is None else float(sinks[head])
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                out[row, head] = weights / (weights.sum() + np.exp(sink - top)) @ values[low:high, head // group]
    return out if cache.kind in ("f32", "f16") else out @ hadamard_matrix(cache.head_dim)
