"""The slab of the KV cache, on the CPU and on a GPU, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from exl.batch import PAGE_SIZE
from exl.layout.fields import FIELD_ALIGN, Field, FieldPacker, align_up

# Bits of a K and of a V element, by the name of the cache type.
KV_BITS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"f32": (32, 32), "f16": (16, 16), "q8": (8, 8), "k8v4": (8, 4), "q4": (4, 4)}
)
KV_GROUP = 32  # channels that share a scale


@dataclass(frozen=True)
class KVLayout:
    """The cache's slab for torch's kernels on the CPU: [layer][K|V][page][token][kv_head][D], so that adjacent pages
    are one view.

    Quantized types hold codes u8 [page, token, kv_head, D * bits / 8] and scales f16 [page, token, kv_head, G], one for
    every 32 channels (the last may have fewer). What codes and scales mean: ``docs/memory.md``.
    """

    kind: str  # a key of KV_BITS
    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def quantized(self) -> bool:
        return KV_BITS[self.kind][0] < 16

    @property
    def hadamard_size(self) -> int:
        """Channels that one Hadamard rotation mixes: the largest power of two that divides the head size."""
        return self.head_dim & -self.head_dim if self.quantized else 1

    def fields(self, num_pages: int) -> dict[str, Field]:
        """One layer's arrays by name: k, v, and for quantized types k_scales, v_scales."""
        pack = FieldPacker()
        tokens = (num_pages, PAGE_SIZE, self.num_kv_heads)
        for name, bits in zip(("k", "v"), KV_BITS[self.kind], strict=True):
            if self.quantized:
                pack.add(name, "u8", (*tokens, self.head_dim * bits // 8))
                pack.add(f"{name}_scales", "f16", (*tokens, -(-self.head_dim // KV_GROUP)))
            else:
                pack.add(name, f"f{bits}", (*tokens, self.head_dim))
        return pack.fields

    def layer_bytes(self, num_pages: int) -> int:
        last = max(self.fields(num_pages).values(), key=lambda field: field.offset)
        return align_up(last.offset + last.num_bytes, FIELD_ALIGN)

    def slab_bytes(self, num_pages: int) -> int:
        return self.num_layers * self.layer_bytes(num_pages)


class PageOffsets(NamedTuple):
    """Bytes from the start of one page of one kv head, [K codes | K scales | V codes | V scales]: on a GPU, and where
    the CPU's own kernels attend."""

    k_scales: int
    v_codes: int
    v_scales: int
    num_bytes: int  # of the whole page


def page_offsets(kind: str, head_dim: int) -> PageOffsets:
    """``kind``: a key of KV_BITS; one f16 scale per token and 32 channels, if it is quantized."""
    k_bits, v_bits = KV_BITS[kind]
    scales = PAGE_SIZE * 2 * -(-head_dim // KV_GROUP) if k_bits < 16 else 0
    k_codes, v_codes = (PAGE_SIZE * head_dim * bits // 8 for bits in (k_bits, v_bits))
    return PageOffsets(k_codes, k_codes + scales, k_codes + scales + v_codes, k_codes + v_codes + 2 * scales)


@dataclass(frozen=True)
class DeviceKVLayout:
    """The cache's slab on a GPU, and on a CPU for exl's own kernels: [layer][page][kv_head][K codes | K scales |
    V codes | V scales], 64 tokens a page.

    The order inside of a page is the attention kernels': ``exl/layout/pages.py``, ``exl/layout/cpu_pages.py``.
    """

    kind: str  # a key of KV_BITS; on a GPU f32 left out
    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def head_page_bytes(self) -> int:
        """4 bits, 128 channels: 2 * (64 * 64 + 64 * 4 * 2) = 9216."""
        return page_offsets(self.kind, self.head_dim).num_bytes

    def layer_bytes(self, num_pages: int) -> int:
        return num_pages * self.num_kv_heads * self.head_page_bytes

    def slab_bytes(self, num_pages: int) -> int:
        return self.num_layers * self.layer_bytes(num_pages)
