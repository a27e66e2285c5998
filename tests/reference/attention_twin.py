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
) -> NDArray[np.float64]:
    """q [n, H, D] at ``places`` of a sequence with k and v [length, Hkv, D] -> [n, H, D]."""
    n, H, D = q.shape
    group = H // k.shape[1]
    out = np.zeros((n, H, D))
    for i, place in enumerate(places):
        first = 0 if window is None else max(0, place - window + 1)
        for head in range(H):
            scores = k[first : place + 1, head // group].astype(np.float64) @ q[i, head].astype(np.float64) * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights / weights.sum() @ v[first : place + 1, head // group].astype(np.float64)
    return out


def bytes_of_tokens(layout: PageLayout, count: int) -> np.ndarray:
    """Offsets of the bytes of a page that hold its first tokens."""
    found = []
    for places, bits in ((k_code_places(layout)[0], layout.k_bits), (v_code_places(layout)[0], layout.v_bits)):
        found += [places[:count], places[:count] + 1] if bits == 16 else [places[:count]]
    if layout.quantized:
        scales = [k_scale_places(layout)[:count], v_scale_places(layout)[:count]]
        found += [*scales, *(at + 1 for at in scales)]
    return np.unique(np.concatenate([at.ravel() for at in found]))
