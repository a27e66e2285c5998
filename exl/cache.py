"""The KV cache's bytes: one slab for all layers, allocated once, in pages of 64 tokens. Never grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from exl.host_memory import host_tensor
from exl.layout import KVLayout

_DTYPES = {"u8": torch.uint8, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class KVPages:
    """One layer's pages: k and v [page, token, kv_head, ...] in the cache's type, scales where it has any."""

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None

    def arrays(self) -> list[torch.Tensor]:
        return [array for array in (self.k, self.v, self.k_scales, self.v_scales) if array is not None]


class KVCache:
    """K and V of all layers and pages. Zeroed once: an attention weight of 0 times stale NaN would be NaN."""

    def __init__(self, layout: KVLayout, num_pages: int, device: torch.device) -> None:
        self.layout = layout
        self.num_pages = num_pages
        if device.type != "cpu":
            raise ValueError(f"no cache layout for {device}")
        self.slab = host_tensor([layout.slab_bytes(num_pages)], torch.uint8, "KV cache")
        fields = layout.fields(num_pages)
        stride = layout.layer_bytes(num_pages)
        self._layers = []
        for layer_idx in range(layout.num_layers):
            blob = self.slab[layer_idx * stride : (layer_idx + 1) * stride]
            self._layers.append(
                KVPages(
                    **{
                        name: blob[f.offset : f.offset + f.num_bytes].view(_DTYPES[f.dtype]).view(f.shape)
                        for name, f in fields.items()
                    }
                )
            )

    def layer(self, layer_idx: int) -> KVPages:
        return self._layers[layer_idx]

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """All layers' contents of pages ``src`` to pages ``dst``."""
        for pages in self._layers:
            for array in pages.arrays():
                array[list(dst)] = array[list(src)]
