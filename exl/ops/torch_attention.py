"""Causal attention over a paged cache on the CPU, through torch's fused kernel."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from exl.batch import PAGE_SIZE, ForwardBatch
from exl.cache.kv import KVCache
from exl.layout.steps import SCORES
from exl.ops.base import AttentionSpec, Norm
from exl.ops.rope import query_scales
from exl.ops.rope_tables import rope_tables
from exl.ops.torch_kv import as_stored, dequantize_rows, hadamard, quantize_rows
from exl.threads import Threads

_ALIGNED_BYTES = 64  # as torch allocates
_QUERY_BLOCK = 128  # rows that share a mask: bounds the mask to 128 x context, and skips keys that no row sees


class Places(NamedTuple):
    """Where a batch's rows go in the cache, and where its sequences' pages are."""

    slots: torch.Tensor  # i64 [T]
    cached_rows: torch.Tensor | None  # i64; rows that are cached; None: all
    page_table: NDArray[np.int32]  # [B, P]


class StagedBatch:
    """A batch's index arrays as tensors, and values derived from them that all layers share."""

    def __init__(self, batch: ForwardBatch, token_ids: torch.Tensor) -> None:
        self.batch = batch
        self.token_ids = token_ids  # i64 [T]
        self.logit_rows = torch.from_numpy(batch.logit_rows).long()
        self._rope_tables: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self._places: dict[bool, Places] = {}

    def places(self, windowed: bool) -> Places:
        """Of layers that keep all tokens, or of those with a window and pages of their own."""
        if windowed not in self._places:
            of_batch, table = self.batch.places(windowed)
            slots = torch.from_numpy(of_batch).long()
            rows = None if bool((slots >= 0).all()) else torch.nonzero(slots >= 0).view(-1)
            self._places[windowed] = Places(slots, rows, table)
        return self._places[windowed]

    def rope(self, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each f32 [T, 1, rotary_dim / 2]; computed at the first call, then cached."""
        key = (spec.rope, spec.head_dim)
        if key not in self._rope_tables:
            cosine, sine = rope_tables(self.batch, spec.rope, spec.head_dim)
            self._rope_tables[key] = (cosine[:, None], sine[:, None])
        return self._rope_tables[key]


def attend(
    qkv: torch.Tensor,
    spec: AttentionSpec,
    staged: StagedBatch,
    layer_idx: int,
    kv: KVCache,
    out: torch.Tensor,
    threads: Threads,
) -> None:
    """See ``Ops.attend``. Decode rows attend one at a time, so that no bit of a row depends on other rows.

    In f32, products inside torch's fused kernel differ in bits between one thread and several, so that their number is
    always the same; in f16 they do not.
    """
    batch = staged.batch
    T, H, Hkv, D = batch.num_rows, spec.num_heads, spec.num_kv_heads, spec.head_dim
    heads = qkv.view(T, H + 2 * Hkv, D)
    q, k, v = heads[:, :H], heads[:, H : H + Hkv], heads[:, H + Hkv :]
    for part, norm in ((q, spec.q_norm), (k, spec.k_norm)):
        if norm is not None:
            _normalize(part.view(T, -1) if spec.norm_rows else part, norm)
    _rotate(heads[:, : H + Hkv], *staged.rope(spec))
    if spec.rope.query_beta:
        q.mul_(torch.from_numpy(query_scales(spec.rope, batch.positions))[:, None, None])
    pages, places = kv.layer(layer_idx), staged.places(kv.windowed)
    size = kv.layout.hadamard_size
    if kv.layout.quantized:
        hadamard(heads, size)
    _append(k, pages.k, pages.k_scales, places)
    _append(v, pages.v, pages.v_scales, places)
    if not kv.layout.quantized:
        q = q.to(pages.k.dtype)
    attended = out.view(T, H, D)
    for b in range(batch.num_sequences):
        start, stop = int(batch.query_start[b]), int(batch.query_start[b + 1])
        context = int(batch.context_len[b])
        step = 1 if start < batch.num_decode_rows else _block_rows(spec, context)
        for first in range(start, stop, step):
            last = min(stop, first + step)
            seen = context - (stop - last)  # number of keys up to and including the last row's own
            low = 0 if spec.window is None else max(0, seen - (last - first) - spec.window + 1)
            k_run = _read(pages.k, pages.k_scales, places.page_table[b], low, seen, D)
            v_run = _read(pages.v, pages.v_scales, places.page_table[b], low, seen, D)
            fixed = k_run.dtype == torch.float32 or not _is_fused(spec)
            with threads.all() if fixed else nullcontext():
                attended[first:last] = _attend_run(q[first:last], k_run, v_run, spec)
    if kv.layout.quantized:
        hadamard(attended, size)  # its own inverse


def _block_rows(spec: AttentionSpec, context: int) -> int:
    return _QUERY_BLOCK if _is_fused(spec) else max(1, min(_QUERY_BLOCK, SCORES // (spec.num_heads * context)))


def _normalize(x: torch.Tensor, norm: Norm) -> None:
    """Over the last axis, in place."""
    if norm.kind == "layer":
        x.sub_(x.mean(-1, keepdim=True))
    x.mul_(torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)).mul_(norm.weight)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates channel i with channel i + rotary_dim / 2 (Hugging Face order). x [T, heads, D], in place."""
    half = cos.shape[-1]
    low, high = x[..., :half], x[..., half : 2 * half]
    turned = low * cos - high * sin
    high.mul_(cos).add_(low * sin)
    low.copy_(turned)


def _append(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None, places: Places) -> None:
    slots = places.slots
    if places.cached_rows is not None:
        rows, slots = rows[places.cached_rows], slots[places.cached_rows]
    if scales is None:
        _tokens(codes).index_copy_(0, slots, as_stored(rows, codes.dtype))
        return
    new_codes, new_scales = quantize_rows(rows, 8 * codes.shape[-1] // rows.shape[-1])
    _tokens(codes).index_copy_(0, slots, new_codes)
    _tokens(scales).index_copy_(0, slots, new_scales)


def _tokens(pages: torch.Tensor) -> torch.Tensor:
    """[page, token, ...] -> [page * token, ...]."""
    return pages.view(-1, *pages.shape[2:])


def _read(
    codes: torch.Tensor, scales: torch.Tensor | None, table: np.ndarray, low: int, high: int, head_dim: int
) -> torch.Tensor:
    """Tokens ``low:high`` of a sequence, [high - low, Hkv, D], in the cache's type; f32 if the cache is quantized."""
    run = _run(codes, table, low, high)
    return run if scales is None else dequantize_rows(run, _run(scales, table, low, high), head_dim)


def _run(pages: torch.Tensor, table: np.ndarray, low: int, high: int) -> torch.Tensor:
    """Tokens ``low:high`` of a sequence: a view if the pages are contiguous, else a copy."""
    first, last = low // PAGE_SIZE, -(-high // PAGE_SIZE)
    ids = table[first:last]
    if len(ids) == 0:
        return _tokens(pages[:0])
    if ((ids[1:] - ids[:-1]) == 1).all():
        run = pages[int(ids[0]) : int(ids[0]) + len(ids)]
    else:
        run = pages.index_select(0, torch.from_numpy(ids).long())
    offset = first * PAGE_SIZE
    return _tokens(run)[low - offset : high - offset]


def _attend_run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """q [n, H, D], k and v [S, Hkv, D] -> [n, H, D]; the rows of q are the last n of the S tokens."""
    n, S, Hkv = q.shape[0], k.shape[0], spec.num_kv_heads
    group = spec.num_heads // Hkv
    # The query group becomes rows: [Hkv, group * n, D] against [Hkv, S, D], no copy of the keys.
    rows = q.view(n, Hkv, group, -1).permute(1, 2, 0, 3).reshape(1, Hkv, group * n, -1)
    if rows.data_ptr() % _ALIGNED_BYTES:  # products would be summed in another order than where a row is alone
        rows = rows.clone()
    mask = None if n == 1 else _causal_mask(n, S, spec.window, q.dtype).repeat(group, 1)
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if _is_fused(spec):
        mixed = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=spec.scale)
    else:
        scores = rows.float() @ k.float().transpose(-1, -2)
        if spec.softcap is None:
            scores.mul_(spec.scale)
        else:
            scores.mul_(spec.scale / spec.softcap).tanh_().mul_(spec.softcap)
        if mask is not None:
            scores.add_(mask)
        if spec.sinks is not None:
            sinks = spec.sinks.view(1, Hkv, group, 1).expand(-1, -1, -1, n).reshape(1, Hkv, group * n, 1)
            scores = torch.cat([scores, sinks], dim=-1)
        mixed = torch.softmax(scores, dim=-1)[..., :S] @ v.float()
    return mixed.view(Hkv, group, n, -1).permute(2, 0, 1, 3).reshape(n, spec.num_heads, -1)


def _is_fused(spec: AttentionSpec) -> bool:
    """Whether torch's fused kernel computes it."""
    return spec.softcap is None and spec.sinks is None


def _causal_mask(n: int, S: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Mask [n, S] for the last n of S tokens: 0 if row i sees key j, else -inf."""
    behind = torch.arange(S - n, S)[:, None] - torch.arange(S)[None]  # how far key j lies behind row i
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    return torch.zeros(n, S, dtype=dtype).masked_fill_(hidden, -torch.inf)
