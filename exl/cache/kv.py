"""The memory of the KV cache: one slab for all layers, in pages of 64 tokens. Allocated once, never grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from exl.layout.kv import DeviceKVLayout, KVLayout
from exl.memory.device import device_tensor

_DTYPES = {"u8": torch.uint8, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class KVPages:
    """One layer's pages for torch's kernels on the CPU: k and v [page, token, kv_head, ...], scales if any."""

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None

    def arrays(self) -> list[torch.Tensor]:
        return [array for array in (self.k, self.v, self.k_scales, self.v_scales) if array is not None]


class KVCache:
    """K and V of all layers and pages. Zeroed once: an attention weight of 0 times a stale NaN would be NaN."""

    def __init__(self, layout: KVLayout | DeviceKVLayout, num_pages: int, device: torch.device) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.slab = device_tensor(layout.slab_bytes(num_pages), device, "KV cache")
        blobs = self.slab.split(layout.layer_bytes(num_pages))
        self._layers: list[KVPages | torch.Tensor]
        if isinstance(layout, DeviceKVLayout):
            shape = (num_pages, layout.num_kv_heads, layout.head_page_bytes)
            self._layers = [blob.view(shape) for blob in blobs]
        else:
            self._layers = [_cpu_pages(layout, num_pages, blob) for blob in blobs]

    def layer(self, layer_idx: int) -> KVPages | torch.Tensor:
        """One layer's pages as its backend reads them: u8 [page, kv_head, head_page_bytes]; torch's kernels KVPages."""
        return self._layers[layer_idx]

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """All layers' contents of pages ``src`` to as many other pages ``dst``. Page by page: an index that is a list
        would be copied to a GPU in every layer, and waited for."""
        if set(src) & set(dst) or len(src) != len(dst):
            raise ValueError(f"pages {list(src)} to {list(dst)}: expected as many others")
        for pages in self._layers:
            for array in [pages] if isinstance(pages, torch.Tensor) else pages.arrays():
                for one, other in zip(src, dst, strict=True):
                    array[other].copy_(array[one])


def _cpu_pages(layout: KVLayout, num_pages: int, blob: torch.Tensor) -> KVPages:
    fields = layout.fields(num_pages)
    return KVPages(
        **{
            name: blob[f.offset : f.offset + f.num_bytes].view(_DTYPES[f.dtype]).view(f.shape)
            for name, f in fields.items()
        }
    )
