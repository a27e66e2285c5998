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
    """K and V of all layers and pages. Zeroed once: an attention weight of 0 times a stale NaN would be NaN.

    Whole pages are moved as words of 64 bits. On a GPU all that is queued on the current stream, and the host waits for
    nothing except in ``read_page`` and ``write_page``. On a CPU ``Ops.fence`` must have come before: a thread may be
    late in the last step.
    """

    def __init__(
        self,
        layout: KVLayout | DeviceKVLayout,
        num_pages: int,
        device: torch.device,
        layers: Sequence[int] | None = None,
        *,
        windowed: bool = False,
    ) -> None:
        """``layers``: which of a model's layers these are, as many as ``layout`` has; None: all, from 0 on.
        ``windowed``: they have a window and pages of their own: see ``ForwardBatch.places``."""
        self.layout = layout
        self.num_pages = num_pages
        self.windowed = windowed
        self.slab = device_tensor(layout.slab_bytes(num_pages), device, "KV cache")
        blobs = self.slab.split(layout.layer_bytes(num_pages))
        pages: list[KVPages | torch.Tensor]
        if isinstance(layout, DeviceKVLayout):
            shape = (num_pages, layout.num_kv_heads, layout.head_page_bytes)
            pages = [blob.view(shape) for blob in blobs]
        else:
            pages = [_cpu_pages(layout, num_pages, blob) for blob in blobs]
        self._layers = dict(zip(range(len(pages)) if layers is None else layers, pages, strict=True))
        self._arrays = _page_words(layout, num_pages, self.slab)
        self.page_bytes = sum(array[:, 0].nbytes for array in self._arrays) if num_pages else 0

    def layer(self, layer_idx: int) -> KVPages | torch.Tensor:
        """One layer's pages as its backend reads them: u8 [page, kv_head, head_page_bytes]; torch's kernels KVPages."""
        return self._layers[layer_idx]

    def __contains__(self, layer_idx: int) -> bool:
        """Whether a layer's pages are here."""
        return layer_idx in self._layers

    def page_words(self, page: int) -> list[torch.Tensor]:
        """All bytes of a page, views i64 [layer, words]: on a GPU and for exl's own kernels one, for torch's kernels
        those of K, V and their scales."""
        return [array[:, page] for array in self._arrays]

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """All layers' contents of pages ``src`` to as many other pages ``dst``: one kernel a page on a GPU. Indices
        would have to be copied there first, and take memory for what they gather."""
        if set(src) & set(dst) or len(src) != len(dst) or len(set(dst)) != len(dst):
            raise ValueError(f"pages {list(src)} to {list(dst)}: expected as many others")
        for one, other in zip(src, dst, strict=True):
            for array in self._arrays:
                array[:, other].copy_(array[:, one])

    def zero_pages(self, pages: Sequence[int]) -> None:
        """One kernel a page on a GPU."""
        for page in pages:
            for array in self._arrays:
                array[:, page].zero_()

    def read_page(self, page: int, out: torch.Tensor) -> None:
        """A page's bytes, array by array and in each layer by layer, to ``out``: u8 [page_bytes] on the host."""
        for words, part in zip(self.page_words(page), self.split_words(out), strict=True):
            part.copy_(words)

    def write_page(self, page: int, data: torch.Tensor) -> None:
        """What ``read_page`` gave."""
        for words, part in zip(self.page_words(page), self.split_words(data), strict=True):
            words.copy_(part)

    def split_words(self, data: torch.Tensor) -> list[torch.Tensor]:
        """u8 [page_bytes] as ``page_words`` has a page: views, contiguous each."""
        if data.dtype != torch.uint8 or data.shape != (self.page_bytes,):
            raise ValueError(f"{data.dtype} {list(data.shape)}: expected uint8 [{self.page_bytes}]")
        sizes = [array[:, 0].numel() for array in self._arrays]
        parts = data.view(torch.int64).split(sizes)
        return [part.view(len(array), -1) for part, array in zip(parts, self._arrays, strict=True)]


def _page_words(layout: KVLayout | DeviceKVLayout, num_pages: int, slab: torch.Tensor) -> list[torch.Tensor]:
    """The slab's arrays as views i64 [layer, page, words]. Fields begin at multiples of 64 bytes, and 64 tokens of any
    type are whole words."""
    words = slab.view(torch.int64).view(layout.num_layers, -1)
    if isinstance(layout, DeviceKVLayout):
        return [words.unflatten(1, (num_pages, -1))] if num_pages else []
    fields = layout.fields(num_pages)
    arrays = [fields[name] for name in ("k", "v", "k_scales", "v_scales") if name in fields]
    spans = [(field.offset // 8, (field.offset + field.num_bytes) // 8) for field in arrays]
    return [words[:, start:stop].unflatten(1, (num_pages, -1)) for start, stop in spans] if num_pages else []


def _cpu_pages(layout: KVLayout, num_pages: int, blob: torch.Tensor) -> KVPages:
    fields = layout.fields(num_pages)
    return KVPages(
        **{
            name: blob[f.offset : f.offset + f.num_bytes].view(_DTYPES[f.dtype]).view(f.shape)
            for name, f in fields.items()
        }
    )
