"""The pages of the KV cache as the CPU's own kernels read them: one (page, kv head) after the other.

A page of one kv head is ``[K codes | K scales | V codes | V scales]`` of 64 tokens (``page_offsets``), and a layer's
slab u8 [page][kv_head][bytes of a page]. Inside, with D channels and G = ceil(D / 32):

    K codes   [D][64 tokens]; 4 bits: [D/2][64], channel j in the low half of a byte, channel j + D/2 in the high half
    K scales  f16 [G][64]
    V codes   [64][D]; 4 bits: [64][D/2], halves as for K
    V scales  f16 [64][G]

So a vector's lanes are tokens when scores are computed and channels when values are summed: neither needs sums across
lanes. Every byte belongs to one token. What codes and scales mean is in ``docs/memory.md``; 4-bit codes are stored
plus 8, and f32 and f16 elements are stored as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exl.batch import PAGE_SIZE
from exl.layout.kv import KV_BITS, KV_GROUP, page_offsets

_CODES = {32: np.float32, 16: np.float16, 8: np.int8, 4: np.uint8}


class PageArrays(NamedTuple):
    """The arrays of pages [...], views of their bytes. Scales have no elements (G = 0) in f32 and f16."""

    k: NDArray  # [..., D or D/2, 64]
    k_scales: NDArray[np.float16]  # [..., G, 64]
    v: NDArray  # [..., 64, D or D/2]
    v_scales: NDArray[np.float16]  # [..., 64, G]


def page_arrays(pages: NDArray[np.uint8], kind: str, head_dim: int) -> PageArrays:
    """``pages``: u8 [..., bytes of a page], the last axis contiguous. ``kind``: a key of ``KV_BITS``."""
    offsets, (k_bits, v_bits) = page_offsets(kind, head_dim), KV_BITS[kind]
    groups = -(-head_dim // KV_GROUP) if k_bits < 16 else 0

    def view(start: int, stop: int, dtype: type, *shape: int) -> NDArray:
        return pages[..., start:stop].view(dtype).reshape(*pages.shape[:-1], *shape)

    k_rows, v_rows = (head_dim // 2 if bits == 4 else head_dim for bits in (k_bits, v_bits))
    return PageArrays(
        view(0, offsets.k_scales, _CODES[k_bits], k_rows, PAGE_SIZE),
        view(offsets.k_scales, offsets.v_codes, np.float16, groups, PAGE_SIZE),
        view(offsets.v_codes, offsets.v_scales, _CODES[v_bits], PAGE_SIZE, v_rows),
        view(offsets.v_scales, offsets.num_bytes, np.float16, PAGE_SIZE, groups),
    )


def copy_tokens(
    source: NDArray[np.uint8], target: NDArray[np.uint8], num_tokens: int, kind: str, head_dim: int
) -> None:
    """The first ``num_tokens`` tokens of pages, both u8 [..., bytes of a page]."""
    a, b = page_arrays(source, kind, head_dim), page_arrays(target, kind, head_dim)
    for old, new in ((a.k, b.k), (a.k_scales, b.k_scales)):
        new[..., :num_tokens] = old[..., :num_tokens]
    for old, new in ((a.v, b.v), (a.v_scales, b.v_scales)):
        new[..., :num_tokens, :] = old[..., :num_tokens, :]
