"""Attention in float64, from its definition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl.layout.pages import PageLayout, k_code_places, k_scale_places, v_code_places, v_scale_places


def attention(
    q: NDArray,
    k: NDArray,
    v: NDArray,
    places: NDArray,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: NDArray | None = None,
) -> NDArray[np.float64]:
    """q [n, H, D] at ``places`` of a sequence with k and v [length, Hkv, D] -> [n, H, D].

    ``sinks`` [H]: one more score of each head, as if of a token whose value is 0 (transformers' gpt-oss)."""
    n, H, D = q.shape
    group = H // k.shape[1]
    out = np.zeros((n, H, D))
    for i, place in enumerate(places):
        first = 0 if window is None else max(0, place - window + 1)
        for head in range(H):
            scores = k[first : place + 1, head // group].astype(np.float64) @ q[i, head].astype(np.float64) * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            sink = -np.inf if sinks is None else float(sinks[head])
            top = max(scores.max(), sink)
            weights = np.exp(scores - top)
            out[i, head] = (
                weights / (weights.sum() + np.exp(sink - top)) @ v[first : place + 1, head // group].astype(np.float64)
            )
    return out


def rotate(x: NDArray, positions: NDArray, theta: float) -> NDArray[np.float64]:
    """RoPE (Su et al., 2021) of x [n, heads, D]: channels i and i + D / 2 turn by position * theta^(-2i / D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * theta ** (-np.arange(half) / half)
    low, high = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
    return np.concatenate([low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], -1)


def bytes_of_tokens(layout: PageLayout, count: int) -> np.ndarray:
    """Offsets of the bytes of a page that hold its first tokens."""
    found = []
    for places, bits in ((k_code_places(layout)[0], layout.k_bits), (v_code_places(layout)[0], layout.v_bits)):
        found += [places[:count], places[:count] + 1] if bits == 16 else [places[:count]]
    if layout.quantized:
        scales = [k_scale_places(layout)[:count], v_scale_places(layout)[:count]]
        found += [*scales, *(at + 1 for at in scales)]
    return np.unique(np.concatenate([at.ravel() for at in found]))
