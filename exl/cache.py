"""The KV cache: one slab, allocated once, in pages of 64 tokens.

``KVCache`` owns the bytes. ``PagePool`` owns who uses which page; here the trivial one: it hands out the lowest free
pages first, so that a sequence's pages are neighbours and attention reads them as one view.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import torch

from exl.batch import PAGE_SIZE
from exl.errors import MemoryBudgetError
from exl.layout import KVLayout

_DTYPES = {"f32": torch.float32, "f16": torch.float16}


class KVCache:
    """K and V of all layers and pages. Zeroed once: an attention weight of 0 times stale NaN would be NaN."""

    def __init__(self, layout: KVLayout, num_pages: int, device: torch.device) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.slab = torch.zeros(layout.slab_shape(num_pages), dtype=_DTYPES[layout.kind], device=device)

    def layer(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, each [page, token, kv_head, D]."""
        return self.slab[layer_idx, 0], self.slab[layer_idx, 1]


class PagePool:
    """Which pages are free. Raises ``MemoryBudgetError`` when more are asked for than there are."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap: sorted is one

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        if count > len(self._free):
            raise MemoryBudgetError(
                f"KV cache: {count} pages of {PAGE_SIZE} tokens asked for, {len(self._free)} of {self.num_pages} free"
            )
        return [heapq.heappop(self._free) for _ in range(count)]

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            heapq.heappush(self._free, page)
