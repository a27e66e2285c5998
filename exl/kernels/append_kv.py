"""New tokens into the KV cache, and q as attention wants it (``append_kv.cu``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from exl.batch import PAGE_SIZE
from exl.errors import KernelError
from exl.kernels.args import f32, i32, ptr
from exl.kernels.attention_io import QkvRows, check_dims, check_rows
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.linear_io import OUT_TYPES
from exl.kernels.spec import KernelSpec, Variant
from exl.layout.pages import KINDS, PageLayout

NUM_WARPS = 8


def check_slots(slots: Sequence[int], num_pages: int) -> None:
    """A batch's slots, on the host, before they are copied. Raises ``KernelError`` that names the first that is neither
    a slot of the cache nor -1."""
    found = np.asarray(slots)
    wrong = (found < -1) | (found >= num_pages * PAGE_SIZE)
    if wrong.any():
        i = int(wrong.argmax())
        raise KernelError(f"slot {found[i]} at row {i}: expected -1 to {num_pages * PAGE_SIZE - 1}")


def append_kv(
    backend: Backend,
    layout: PageLayout,
    rows: QkvRows,
    slots: torch.Tensor,
    pages: torch.Tensor,
    q: torch.Tensor,
    *,
    dependent: bool = False,
) -> None:
    """K and V of ``rows`` into pages u8 [pages, Hkv, bytes]; q f16 [T, H, D].

    ``slots`` i32 [T], checked by ``check_slots`` while they are still on the host. Raises ``KernelError``.
    """
    device, D = backend.device, layout.head_dim
    check_dims("q", q, 3)
    check_dims("pages", pages, 3)
    (num_tokens, num_heads), num_kv_heads = q.shape[:2], pages.shape[1]
    if not num_tokens or not num_heads or not num_kv_heads or num_heads % num_kv_heads:
        raise KernelError(f"{num_tokens} tokens, {num_heads} heads, {num_kv_heads} kv heads: expected whole groups")
    check_tensor("q", q, (torch.float16,), (num_tokens, num_heads, D), device)
    check_tensor("pages", pages, (torch.uint8,), (pages.shape[0], num_kv_heads, layout.num_bytes), device, 16)
    check_rows(rows, num_tokens, num_heads, num_kv_heads, D, device)
    check_tensor("slots", slots, (torch.int32,), (num_tokens,), device)
    args = [*rows.pointers(), ptr(slots), ptr(pages), ptr(q), i32(num_heads), i32(num_kv_heads), i32(rows.half_dim)]
    args += [i32(OUT_TYPES[rows.qkv.dtype]), i32(rows.qkv.stride(0)), f32(rows.norms.eps)]
    grid = (-(-(num_heads + 2 * num_kv_heads) // NUM_WARPS), num_tokens)
    function = backend.load(_spec(layout, backend.arch))
    launch(function, grid, (32 * NUM_WARPS,), args, NUM_WARPS * D * 4, dependent=dependent)


def _spec(layout: PageLayout, arch: int) -> KernelSpec:
    macros = {"EXL_D": layout.head_dim, "EXL_K_BITS": layout.k_bits, "EXL_V_BITS": layout.v_bits}
    return KernelSpec("append_kv.cu", "append_kv", macros, arch)


def compiled_layouts() -> Iterator[PageLayout]:
    """Of models: all cache types at head size 128, the two that differ most at the others, and one that ends with half
    a tile. Others are compiled when they are needed, as these are."""
    for kind in KINDS:
        yield PageLayout(kind, 128)
    for head_dim in (64, 80, 96, 256):
        for kind in ("f16", "q4"):
            yield PageLayout(kind, head_dim)
    yield PageLayout("q4", 120)


def layouts_with_sinks() -> Iterator[PageLayout]:
    """Of models whose attention has sinks (gpt-oss): head size 64."""
    for kind in ("f16", "q4"):
        yield PageLayout(kind, 64)


def variants(arch: int) -> Iterator[Variant]:
    for layout in compiled_layouts():
        yield Variant(_spec(layout, arch))
