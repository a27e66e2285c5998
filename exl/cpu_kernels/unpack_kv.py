"""Keys and values of some tokens, from their pages to plain f32.

A code times its scale has at most 7 + 11 bits, so the f32 values are exact, and all cache types are one to attention.
"""

from __future__ import annotations

from llvmlite import ir

from exl.batch import PAGE_SIZE
from exl.cpu_kernels.heads import load_exact, runs, store_exact
from exl.cpu_kernels.ir import F16, F32, I8, I32, I64, LANES, F, I, Kernel, vec
from exl.layout.kv import KV_BITS, KV_GROUP, page_offsets

_FLOATS = {32: F32, 16: F16}


def unpack_keys(
    k: Kernel, kind: str, head_dim: int, page: ir.Value, first: ir.Value, count: int, out: ir.Value, ahead: ir.Value
) -> None:
    """``count`` tokens (a multiple of 16) from ``first`` on, of a page of one kv head -> f32 [head_dim][count].

    ``out`` is aligned to 64. ``ahead``: where the same bytes of the page lie that is read next.
    """
    bits, offsets = KV_BITS[kind][0], page_offsets(kind, head_dim)
    b, starts = k.b, range(0, count, LANES)
    if bits >= 16:
        with k.loop(head_dim) as channel:
            _prefetch(k, ahead, channel, PAGE_SIZE * bits // 8)
            line = k.at(page, k.mul(bits // 8, k.add(k.mul(channel, PAGE_SIZE), first)))
            for start in starts:
                value = k.widen(f"f{bits}", LANES, line, start * bits // 8)
                k.store(value, out, k.add(k.mul(channel, 4 * count), 4 * start), 64)
        return
    with k.loop(-(-head_dim // KV_GROUP)) as group:
        line = k.at(page, k.add(offsets.k_scales, k.mul(2, k.add(k.mul(group, PAGE_SIZE), first))))
        scales = [b.fpext(k.load(vec(F16), line, 2 * start), F) for start in starts]
        begin = k.mul(group, KV_GROUP)
        with k.loop(k.smaller(k.add(begin, KV_GROUP), head_dim), begin) as channel:
            _prefetch(k, ahead, channel, PAGE_SIZE * bits // 8)
            row, shift = channel, None
            if bits == 4:
                upper = b.icmp_signed(">=", channel, I64(head_dim // 2))
                row = b.select(upper, b.sub(channel, I64(head_dim // 2)), channel)
                shift = k.splat(b.select(upper, I32(4), I32(0)), I)
            line = k.at(page, k.add(k.mul(row, PAGE_SIZE), first))
            for start, scale in zip(starts, scales, strict=True):
                codes = _codes(k, k.load(vec(I8), line, start), shift)
                k.store(b.fmul(codes, scale), out, k.add(k.mul(channel, 4 * count), 4 * start), 64)


def unpack_value(
    k: Kernel, kind: str, head_dim: int, page: ir.Value, token: ir.Value, out: ir.Value, ahead: ir.Value
) -> None:
    """One token's channels -> f32, whole vectors of 16; lanes beyond the head hold anything. ``ahead``: as for keys."""
    bits, offsets = KV_BITS[kind][1], page_offsets(kind, head_dim)
    _prefetch(k, k.at(ahead, offsets.v_codes), token, head_dim * bits // 8)
    if bits >= 16:
        line = k.at(page, k.add(offsets.v_codes, k.mul(token, head_dim * bits // 8)))
        for first, count in runs(head_dim):
            value = load_exact(k, _FLOATS[bits], count, line, first * bits // 8)
            k.store(value if bits == 32 else k.b.fpext(value, F), out, 4 * first, 64)
        return
    groups = -(-head_dim // KV_GROUP)
    scales = k.load(vec(F16, groups), page, k.add(offsets.v_scales, k.mul(token, 2 * groups)))
    scales = k.b.fpext(scales, vec(F32, groups))

    def put(codes: ir.Value, first: int, count: int) -> None:
        scale = k.shuffle(scales, scales, [min((first + i) // KV_GROUP, groups - 1) for i in range(LANES)])
        store_exact(k, k.b.fmul(codes, scale), LANES if first % LANES == 0 else count, out, 4 * first)

    line = k.at(page, k.add(offsets.v_codes, k.mul(token, head_dim * bits // 8)))
    pieces = [(first, count, load_exact(k, I8, count, line, first)) for first, count in runs(head_dim * bits // 8)]
    if bits == 8:
        for first, count, codes in pieces:
            put(_codes(k, codes, None), first, count)
        return
    for half in (0, 1):  # in this order: whole vectors of the first half may reach into the second
        for first, count, codes in pieces:
            put(_codes(k, codes, k.splat(4 * half, I)), half * head_dim // 2 + first, count)


def _codes(k: Kernel, bytes_: ir.Value, shift: ir.Value | None) -> ir.Value:
    """Signed codes as f32: bytes, or with ``shift`` (i32 lanes, 0 or 4) halves of bytes, minus 8."""
    if shift is None:
        return k.b.sitofp(k.b.sext(bytes_, I), F)
    nibbles = k.b.and_(k.b.lshr(k.b.zext(bytes_, I), shift), k.splat(15, I))
    return k.b.sitofp(k.b.sub(nibbles, k.splat(8, I)), F)


def _prefetch(k: Kernel, start: ir.Value, line: ir.Value, num_bytes: int) -> None:
    """Line number ``line`` of ``num_bytes`` bytes each."""
    at = k.mul(line, num_bytes)
    for offset in range(0, num_bytes, 64):
        k.prefetch(start, k.add(at, offset), cache=2)
