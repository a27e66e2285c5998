"""Causal attention of many new tokens over pages that ``append_kv`` has filled (``attention_prefill.cu``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from exl.batch import PAGE_SIZE
from exl.errors import KernelError
from exl.kernels.append_kv import compiled_layouts, layouts_with_sinks
from exl.kernels.args import f32, i32, ptr
from exl.kernels.attention_io import AttentionParams, check_dims, check_used_pages
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.spec import KernelSpec, Variant
from exl.layout.pages import PageLayout

MMA_ARCH = 75  # tensor cores with f16 inputs; below: f32 arithmetic


@dataclass(frozen=True)
class PrefillTables:
    """What a chunk's sequences have, on the device, all i32; and a bound that the grid is made for."""

    query_start: torch.Tensor  # [B + 1]: rows
    context_len: torch.Tensor  # [B]: tokens, the new ones included; 0: an empty sequence
    page_table: torch.Tensor  # [B, max_pages]
    max_new: int  # new tokens of a sequence


def check_pages(
    query_start: NDArray[np.int32], context_len: NDArray[np.int32], page_table: NDArray[np.int32], num_pages: int
) -> None:
    """A chunk's tables on the host, before they are copied. Raises ``KernelError`` that names the first wrong one."""
    if not len(context_len):
        return
    num_new, room = np.diff(query_start), page_table.shape[1] * PAGE_SIZE
    wrong = (num_new < 0) | (num_new > context_len) | (context_len > room)
    if wrong.any():
        b = int(wrong.argmax())
        raise KernelError(
            f"sequence {b} has {num_new[b]} new tokens in a context of {context_len[b]}: expected no more than the "
            f"context, and that no more than the {room} of its {page_table.shape[1]} pages"
        )
    check_used_pages(context_len, page_table, num_pages)


def column_groups(head_dim: int, arch: int) -> int:
    """Eights of columns that a warp's registers have room for: a last part of a tile takes some too."""
    return 2 if arch >= MMA_ARCH and (head_dim <= 96 or head_dim == 128) else 1


def num_warps(head_dim: int, arch: int) -> int:
    """Of a block: four, two where four would need more than sm_61's 48 KB of shared memory."""
    return 4 if head_dim <= 128 or arch >= MMA_ARCH else 2


def shared_bytes(head_dim: int, arch: int) -> int:
    """Of a block: each warp's q, and in its place eight columns of O in f32; below sm_75 q and O in f32 and the
    probabilities of eight columns and 64 tokens."""
    padded, o = -(-head_dim // 32) * 32, 8 * head_dim * 4
    if arch < MMA_ARCH:
        return num_warps(head_dim, arch) * (o + 8 * padded * 4 + 8 * PAGE_SIZE * 4)
    return num_warps(head_dim, arch) * max(8 * column_groups(head_dim, arch) * (padded + 8) * 2, o)


def attention_prefill(
    backend: Backend,
    layout: PageLayout,
    q: torch.Tensor,
    tables: PrefillTables,
    pages: torch.Tensor,
    out: torch.Tensor,
    params: AttentionParams,
    *,
    channel_map: torch.Tensor | None = None,
    dependent: bool = False,
) -> None:
    """out f16 [T, H * D] = attention of q f16 [T, H, D], as ``append_kv`` leaves it, over its sequences' pages.

    ``tables`` have been through ``check_pages``. ``channel_map`` i32 [H * D]: where a consumer under act-order expects
    each channel. Raises ``KernelError``.
    """
    device, D = backend.device, layout.head_dim
    for name, tensor, dims in (("q", q, 3), ("pages", pages, 3), ("page_table", tables.page_table, 2)):
        check_dims(name, tensor, dims)
    num_tokens, num_heads, num_kv_heads = q.shape[0], q.shape[1], pages.shape[1]
    (num_sequences, max_pages), max_new = tables.page_table.shape, tables.max_new
    if not num_tokens or not num_kv_heads or not num_heads or num_heads % num_kv_heads:
        raise KernelError(f"{num_tokens} tokens, {num_heads} heads, {num_kv_heads} kv heads: expected whole groups")
    if not 1 <= max_new <= num_tokens:
        raise KernelError(f"{max_new} new tokens of a sequence at most: expected 1 to {num_tokens}")
    params.check(num_heads, device)
    check_tensor("q", q, (torch.float16,), (num_tokens, num_heads, D), device, 16)
    check_tensor("pages", pages, (torch.uint8,), (pages.shape[0], num_kv_heads, layout.num_bytes), device, 16)
    check_tensor("out", out, (torch.float16,), (num_tokens, num_heads * D), device)
    check_tensor("query_start", tables.query_start, (torch.int32,), (num_sequences + 1,), device)
    check_tensor("context_len", tables.context_len, (torch.int32,), (num_sequences,), device)
    check_tensor("page_table", tables.page_table, (torch.int32,), (num_sequences, max_pages), device)
    if channel_map is not None:
        check_tensor("channel_map", channel_map, (torch.int32,), (num_heads * D,), device)
    args = [ptr(q), ptr(tables.query_start), ptr(tables.context_len), ptr(tables.page_table), ptr(pages), ptr(out)]
    args += [ptr(channel_map), ptr(params.sinks), i32(num_heads), i32(num_kv_heads), i32(max_pages)]
    args += [i32(params.window or 0), f32(params.scale), f32(params.softcap or 0.0)]
    warps = num_warps(D, backend.arch)
    columns = warps * 8 * column_groups(D, backend.arch)
    grid = (-(-num_heads // num_kv_heads * max_new // columns), num_kv_heads, num_sequences)
    function = backend.load(_spec(layout, backend.arch, params.macros))
    launch(function, grid, (32 * warps,), args, shared_bytes(D, backend.arch), dependent=dependent)


def _spec(layout: PageLayout, arch: int, more: Mapping[str, int]) -> KernelSpec:
    D = layout.head_dim
    macros = {"EXL_D": D, "EXL_K_BITS": layout.k_bits, "EXL_V_BITS": layout.v_bits}
    macros |= {"EXL_N": column_groups(D, arch), "EXL_WARPS": num_warps(D, arch)}
    return KernelSpec("attention_prefill.cu", "attention_prefill", macros | more, arch)


def variants(arch: int) -> Iterator[Variant]:
    """On sm_75 with quantized pages of head size 128, ptxas keeps a few registers in local memory."""
    for layout in compiled_layouts():
        yield Variant(_spec(layout, arch, {}), may_spill=arch == 75 and layout.head_dim == 128 and layout.quantized)
    for layout in layouts_with_sinks():
        yield Variant(_spec(layout, arch, {"EXL_SINKS": 1}))
