"""Attention of up to 8 new tokens per sequence, appended to the cache in the same launch (``attention_decode.cu``)."""

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
from exl.kernels.attention_io import (
    AttentionParams,
    QkvRows,
    check_dims,
    check_rows,
    check_used_pages,
)
from exl.kernels.checks import check_tensor
from exl.kernels.launch import Backend, launch
from exl.kernels.linear_io import OUT_TYPES
from exl.kernels.spec import KernelSpec, Variant
from exl.layout.attention import COLUMNS, MAX_NEW_TOKENS, column_tiles, items_of, num_items, scratch_shapes
from exl.layout.pages import PageLayout

NUM_WARPS = 4
MMA_ARCH = 75  # tensor cores with f16 inputs; below: f32 arithmetic


def shared_bytes(head_dim: int, arch: int) -> int:
    """``kSharedBytes`` of the kernel: 48 KB, sm_61's limit, at head size 256 below sm_75."""
    padded, row = -(-head_dim // 32) * 32, head_dim + 2 * COLUMNS + 4
    if arch < MMA_ARCH:
        row, q = max(row, COLUMNS * PAGE_SIZE), COLUMNS * padded * 4
    else:
        q = COLUMNS * (padded + 8) * 2
    return NUM_WARPS * (row + COLUMNS * head_dim) * 4 + q


@dataclass(frozen=True)
class DecodeTables:
    """What a step's sequences have: on the device, all i32; and bounds, which the grid and the scratch are made for:
    what is within them is read on the device."""

    query_start: torch.Tensor  # [B + 1]: rows
    context_len: torch.Tensor  # [B]: tokens, the new ones included; 0: an empty sequence
    page_table: torch.Tensor  # [B, max_pages]
    slots: torch.Tensor  # [T]: page * 64 + place of each new token, -1: not kept
    first_part: torch.Tensor  # [B]: items (``items_of`` the lengths) of the sequences before: ``first_parts``
    most_items: int  # of all sequences together
    max_context: int  # of all sequences
    max_new: int = 1  # new tokens of a sequence


@dataclass(frozen=True)
class DecodeScratch:
    """Sums on their way between blocks: see ``scratch_shapes``."""

    partial: torch.Tensor  # f32
    arrived: torch.Tensor  # i32, zero; the kernel leaves it zero


def check_tables(
    query_start: NDArray[np.int32],
    context_len: NDArray[np.int32],
    page_table: NDArray[np.int32],
    slots: NDArray[np.int32],
    num_pages: int,
) -> None:
    """A batch's tables on the host, before they are copied. Raises ``KernelError`` that names the first that is wrong:
    the device believes them."""
    if not len(context_len):
        return
    num_new, room = np.diff(query_start), page_table.shape[1] * PAGE_SIZE
    wrong = num_new.view(np.uint32) > MAX_NEW_TOKENS  # negative ones, too
    if wrong.any():
        b = int(wrong.argmax())
        raise KernelError(f"sequence {b} has {num_new[b]} new tokens: expected 0 to {MAX_NEW_TOKENS}")
    wrong = (context_len < num_new) | (context_len > room)
    if wrong.any():
        b = int(wrong.argmax())
        raise KernelError(
            f"sequence {b} has a context of {context_len[b]}: expected {num_new[b]} to {room}, the tokens of its "
            f"{page_table.shape[1]} pages"
        )
    check_used_pages(context_len, page_table, num_pages)
    row = np.arange(query_start[0], query_start[-1])
    sequence = np.repeat(np.arange(len(context_len)), num_new)
    place = row + (context_len - query_start[1:])[sequence]
    wanted = page_table[sequence, place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE
    found = slots[query_start[0] : query_start[-1]]
    wrong = (found != wanted) & (found != -1)
    if wrong.any():
        i = int(wrong.argmax())
        raise KernelError(f"slot {found[i]} of token {place[i]} of sequence {sequence[i]}: expected {wanted[i]} or -1")


def first_parts(context_len: NDArray[np.int32], per_launch: int) -> NDArray[np.int32]:
    """``DecodeTables.first_part`` of sequences that are attended ``per_launch`` at a time."""
    items = items_of(context_len)
    before = np.cumsum(items, dtype=np.int32) - items
    if per_launch < len(items):
        before -= np.repeat(before[::per_launch], per_launch)[: len(items)]
    return before


def attention_decode(
    backend: Backend,
    layout: PageLayout,
    rows: QkvRows,
    tables: DecodeTables,
    pages: torch.Tensor,
    out: torch.Tensor,
    scratch: DecodeScratch,
    params: AttentionParams,
    *,
    channel_map: torch.Tensor | None = None,
    dependent: bool = False,
) -> None:
    """out f16 [T, H * D] = attention of ``rows`` over their sequences, after appending their K and V to ``pages``.

    ``rows`` and ``pages`` as of ``append_kv``. ``tables`` have been through ``check_tables``. ``channel_map`` i32
    [H * D]: where a consumer under act-order expects each channel. A row's bits depend on its own sequence and nothing
    else. Raises ``KernelError``.
    """
    device, D = backend.device, layout.head_dim
    check_dims("pages", pages, 3)
    check_dims("page_table", tables.page_table, 2)
    if not isinstance(out, torch.Tensor) or out.dim() != 2 or out.shape[1] % D or not out.numel():
        raise KernelError(f"out: expected [T, heads * {D}], found {getattr(out, 'shape', type(out))}")
    num_tokens, num_heads, num_kv_heads = out.shape[0], out.shape[1] // D, pages.shape[1]
    (num_sequences, max_pages), max_context, max_new = tables.page_table.shape, tables.max_context, tables.max_new
    if not num_kv_heads or num_heads % num_kv_heads:
        raise KernelError(f"{num_heads} heads, {num_kv_heads} kv heads: expected whole groups")
    if not 1 <= max_new <= MAX_NEW_TOKENS or not 1 <= max_context <= max_pages * PAGE_SIZE:
        raise KernelError(
            f"{max_new} new tokens, a context of {max_context}: expected 1 to {MAX_NEW_TOKENS} and 1 to "
            f"{max_pages * PAGE_SIZE}"
        )
    params.check(num_heads, device)
    check_tensor("out", out, (torch.float16,), (num_tokens, num_heads * D), device)
    check_tensor("pages", pages, (torch.uint8,), (pages.shape[0], num_kv_heads, layout.num_bytes), device, 16)
    check_rows(rows, num_tokens, num_heads, num_kv_heads, D, device)
    check_tensor("query_start", tables.query_start, (torch.int32,), (num_sequences + 1,), device)
    check_tensor("context_len", tables.context_len, (torch.int32,), (num_sequences,), device)
    check_tensor("page_table", tables.page_table, (torch.int32,), (num_sequences, max_pages), device)
    check_tensor("slots", tables.slots, (torch.int32,), (num_tokens,), device)
    check_tensor("first_part", tables.first_part, (torch.int32,), (num_sequences,), device)
    if channel_map is not None:
        check_tensor("channel_map", channel_map, (torch.int32,), (num_heads * D,), device)
    shapes = scratch_shapes(num_sequences, tables.most_items, num_heads, num_kv_heads, D, max_new)
    for name, dtype in (("partial", torch.float32), ("arrived", torch.int32)):
        tensor = getattr(scratch, name)
        check_tensor(f"scratch.{name}", tensor, (dtype,), (tensor.numel(),), device)
        if tensor.numel() < shapes[name][1]:
            raise KernelError(f"scratch.{name} has {tensor.numel()} elements: expected {shapes[name][1]} or more")
    tiles = column_tiles(num_heads, num_kv_heads, max_new)
    args = [*rows.pointers(), ptr(tables.slots), ptr(tables.query_start), ptr(tables.context_len)]
    args += [ptr(tables.page_table), ptr(tables.first_part), ptr(pages), ptr(out), ptr(channel_map)]
    args += [ptr(scratch.partial), ptr(scratch.arrived), ptr(params.sinks)]
    args += [i32(num_heads), i32(num_kv_heads), i32(tiles), i32(max_pages), i32(rows.half_dim)]
    args += [i32(OUT_TYPES[rows.qkv.dtype]), i32(rows.qkv.stride(0)), i32(params.window or 0)]
    args += [f32(params.scale), f32(params.softcap or 0.0), f32(rows.norms.eps)]
    grid = (num_items(max_context), num_kv_heads * tiles, num_sequences)
    function = backend.load(_spec(layout, backend.arch, params.macros))
    launch(function, grid, (32 * NUM_WARPS,), args, shared_bytes(D, backend.arch), dependent=dependent)


def _spec(layout: PageLayout, arch: int, more: Mapping[str, int]) -> KernelSpec:
    macros = {"EXL_D": layout.head_dim, "EXL_K_BITS": layout.k_bits, "EXL_V_BITS": layout.v_bits}
    return KernelSpec("attention_decode.cu", "attention_decode", macros | more, arch)


def variants(arch: int) -> Iterator[Variant]:
    for layout in compiled_layouts():
        yield Variant(_spec(layout, arch, {}))
    for layout in layouts_with_sinks():
        yield Variant(_spec(layout, arch, {"EXL_SINKS": 1}))
