"""New tokens' queries made ready, their keys and values put into the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llvmlite import ir

from exl.batch import PAGE_SIZE
from exl.cpu_kernels.heads import hadamard, load_exact, load_head, num_vectors, runs, store_exact, store_head
from exl.cpu_kernels.ir import F16, F32, I1, I8, I16, I32, I64, LANES, Kernel, vec
from exl.cpu_kernels.kernel import KernelSpec
from exl.cpu_kernels.norm import rms_factor
from exl.layout.kv import KV_BITS, KV_GROUP, page_offsets

_F16_MAX = 65504.0
_SIGN = 0x7FFFFFFF  # all bits of an f32 but its sign


@dataclass(frozen=True)
class AppendKV(KernelSpec):
    """q, k, v of new tokens -> q for attention, K and V in the cache's pages (``exl/layout/cpu_pages.py``).

    Of each head of q and k: RMS norm if there is one, then RoPE (channel i turns with channel i + ``half``, for i below
    ``half``; channels from 2 * half on stay). Quantized caches: q, K and V are rotated by Hadamard's matrix. What is
    stored is what ``exl.ops.torch_kv`` defines, of f32 values; f16 saturates, NaN stays NaN in every type.

    Slots, for T rows, H query heads, Hkv heads of K and V, D channels:
    0 qkv f32 [T][row stride]: H heads of q, Hkv of k, Hkv of v, then anything; 1 row stride in elements;
    2 q out f32 [T][H][D]; 3 the layer's pages u8 [page][Hkv][bytes of a page]; 4 slots i32 [T], page * 64 + token,
    negative: not stored; 5 cos f32 [T][half]; 6 sin f32 [T][half]; 7 H; 8 Hkv;
    9 weight of q's norm f32 [D]; 10 its eps f32; 11 weight of k's norm f32 [D]; 12 its eps f32 (9 to 12: 0 without).
    ``row_norms``: weights are f32 [H * D] and [Hkv * D], and what a head is multiplied by besides is that of its row:
    13 f32 [T][2], for q and for k, of ``RowFactors``. ``scaled``: 14 f32 [T], what a row's q is multiplied by at last.

    Chunk: row * Hkv + head of K and V, with the query heads that share it; T * Hkv in all.
    """

    kind: str  # a key of KV_BITS
    head_dim: int  # even
    half: int  # angles of a row: half of the channels that turn, at most head_dim / 2
    q_norm: bool = False
    k_norm: bool = False
    row_norms: bool = False  # the norms there are go over the channels of all heads together
    scaled: bool = False

    @property
    def name(self) -> str:
        ends = ("_rows" if self.row_norms else "") + ("_scaled" if self.scaled else "")
        return f"append_kv_{self.kind}_{self.head_dim}_{self.half}_{self.q_norm:d}{self.k_norm:d}{ends}"

    @property
    def _quantized(self) -> bool:
        return KV_BITS[self.kind][0] < 16

    def emit(self, k: Kernel) -> None:
        b, D = k.b, self.head_dim
        num_heads, num_kv = k.size(7), k.size(8)
        row, kv = b.sdiv(k.chunk, num_kv), b.srem(k.chunk, num_kv)
        group = b.sdiv(num_heads, num_kv)
        source = k.at(k.pointer(0), k.mul(4, k.mul(row, k.size(1))))
        scratch = k.memory(4 * max(LANES * num_vectors(D), KV_GROUP * -(-D // KV_GROUP)))
        with k.loop(group) as i:
            head = k.add(k.mul(kv, group), i)
            norm = self._norm(k, 9, row, head) if self.q_norm else None
            x = self._ready(k, k.at(source, k.mul(head, 4 * D)), row, scratch, norm)
            if self.scaled:
                scale = k.splat(k.load(F32, k.pointer(14), k.mul(4, row)))
                x = [b.fmul(v, scale) for v in x]
            store_head(k, x, D, k.at(k.pointer(2), k.mul(4 * D, k.add(k.mul(row, num_heads), head))))
        slot = b.sext(k.load(I32, k.pointer(4), k.mul(4, row)), I64)
        with b.if_then(b.icmp_signed(">=", slot, I64(0))):
            offsets = page_offsets(self.kind, D)
            index = k.add(k.mul(b.ashr(slot, I64(6)), num_kv), kv)
            page, token = k.at(k.pointer(3), k.mul(index, offsets.num_bytes)), b.and_(slot, I64(PAGE_SIZE - 1))
            key, value = (k.at(source, k.mul(k.add(num_heads, more, kv), 4 * D)) for more in (0, num_kv))
            x = self._ready(k, key, row, scratch, self._norm(k, 11, row, kv) if self.k_norm else None)
            self._put(k, x, KV_BITS[self.kind][0], scratch, _Rows(k, page, offsets.k_scales, token, D, across=True))
            x = load_head(k, D, value)
            x = hadamard(k, x, D) if self._quantized else x
            page = k.at(page, offsets.v_codes)
            scales = offsets.v_scales - offsets.v_codes
            self._put(k, x, KV_BITS[self.kind][1], scratch, _Rows(k, page, scales, token, D, across=False))

    def _ready(
        self, k: Kernel, head: ir.Value, row: ir.Value, scratch: ir.Value, norm: _HeadNorm | None
    ) -> list[ir.Value]:
        x = load_head(k, self.head_dim, head)
        if norm is not None:
            x = self._normalized(k, x, norm)
        if self.half:
            store_head(k, x, self.head_dim, scratch)
            self._rotate(k, scratch, row)
            x = load_head(k, self.head_dim, scratch)
        return hadamard(k, x, self.head_dim) if self._quantized else x

    def _norm(self, k: Kernel, slot: int, row: ir.Value, head: ir.Value) -> _HeadNorm:
        """Of a head of q (``slot`` 9) or k (11)."""
        if not self.row_norms:
            return _HeadNorm(k.pointer(slot), k.number(slot + 1))
        place = k.add(k.mul(8, row), 4 * (slot > 9))
        weight = k.at(k.pointer(slot), k.mul(head, 4 * self.head_dim))
        return _HeadNorm(weight, k.number(slot + 1), k.load(F32, k.pointer(13), place))

    def _normalized(self, k: Kernel, x: Sequence[ir.Value], norm: _HeadNorm) -> list[ir.Value]:
        factor = norm.factor
        if factor is None:
            squares = k.splat(0.0)
            for v in x:
                squares = k.fma(v, v, squares)
            factor = rms_factor(k, k.total(squares, k.b.fadd), I64(self.head_dim), norm.eps)
        factor, weights = k.splat(factor), load_head(k, self.head_dim, norm.weight)
        return [k.b.fmul(k.b.fmul(v, factor), w) for v, w in zip(x, weights, strict=True)]

    def _rotate(self, k: Kernel, scratch: ir.Value, row: ir.Value) -> None:
        """In ``scratch``. Pairs lie ``half`` apart, which need not be a whole number of vectors."""
        angles = k.mul(row, 4 * self.half)
        for first, count in runs(self.half):
            low_at, high_at = 4 * first, 4 * (self.half + first)
            cos, sin = (load_exact(k, F32, count, k.at(k.pointer(slot), angles), low_at) for slot in (5, 6))
            low, high = (load_exact(k, F32, count, scratch, offset) for offset in (low_at, high_at))
            store_exact(k, k.fma(low, cos, k.b.fneg(k.b.fmul(high, sin))), count, scratch, low_at)
            store_exact(k, k.fma(high, cos, k.b.fmul(low, sin)), count, scratch, high_at)

    def _put(self, k: Kernel, x: Sequence[ir.Value], bits: int, scratch: ir.Value, rows: _Rows) -> None:
        """A token's channels, stored as elements of ``bits`` bits."""
        D = self.head_dim
        if bits >= 16:
            x = x if bits == 32 else [_as_f16(k, v) for v in x]
            rows.put(x, F32 if bits == 32 else F16, D)
            return
        for i in range(KV_GROUP * -(-D // KV_GROUP) // LANES):
            k.store(x[i] if i < len(x) else k.splat(0.0), scratch, 64 * i)
        codes = k.memory(KV_GROUP * -(-D // KV_GROUP))
        with k.loop(-(-D // KV_GROUP)) as group:
            scale, values = _quantized(k, k.at(scratch, k.mul(group, 4 * KV_GROUP)), bits)
            rows.put_scale(scale, group)
            k.store(values, codes, k.mul(group, KV_GROUP))
        bytes_ = [load_exact(k, I8, count, codes, first) for first, count in runs(D if bits == 8 else D // 2)]
        if bits == 4:
            eight, four = k.splat(8, vec(I8)), k.splat(4, vec(I8))
            for i, (first, count) in enumerate(runs(D // 2)):
                high = load_exact(k, I8, count, codes, D // 2 + first)
                bytes_[i] = k.b.or_(k.b.add(bytes_[i], eight), k.b.shl(k.b.add(high, eight), four))
        rows.put(bytes_, I8, D if bits == 8 else D // 2)


class _HeadNorm(NamedTuple):
    """A head's norm, while code is written for it."""

    weight: ir.Value
    eps: ir.Value
    factor: ir.Value | None = None  # known already; None: of the head's own channels


class _Rows:
    """Where a token's elements go: ``across`` as a column of [elements][64 tokens], else as a row of [64][elements]."""

    def __init__(
        self, k: Kernel, codes: ir.Value, scales_at: int, token: ir.Value, head_dim: int, *, across: bool
    ) -> None:
        self._k, self._codes, self._scales, self._token = k, codes, k.at(codes, scales_at), token
        self._groups, self._across = -(-head_dim // KV_GROUP), across

    def put(self, vectors: Sequence[ir.Value], element: ir.Type, size: int) -> None:
        """``size`` elements in vectors of 16."""
        k, width = self._k, {F32: 4, F16: 2, I8: 1}[element]
        if not self._across:
            for vector, (first, count) in zip(vectors, runs(size), strict=True):
                store_exact(k, vector, count, self._codes, k.add(k.mul(self._token, size * width), first * width))
            return
        plain = {4: I32, 2: I16, 1: I8}[width]
        line = k.memory(LANES * width * len(vectors))
        for i, vector in enumerate(vectors):
            k.store(vector, line, LANES * width * i)
        column = k.at(self._codes, k.mul(self._token, width))
        with k.loop(size) as i:
            k.store(k.load(plain, line, k.mul(i, width)), column, k.mul(i, PAGE_SIZE * width))

    def put_scale(self, scale: ir.Value, group: ir.Value) -> None:
        k = self._k
        if self._across:
            index = k.add(k.mul(group, PAGE_SIZE), self._token)
        else:
            index = k.add(k.mul(self._token, self._groups), group)
        k.store(scale, self._scales, k.mul(index, 2))


def _as_f16(k: Kernel, x: ir.Value) -> ir.Value:
    return k.b.fptrunc(_between(k, x, -_F16_MAX, _F16_MAX), vec(F16))


def _between(k: Kernel, x: ir.Value, low: float, high: float) -> ir.Value:
    """x, or the bound that it is beyond; NaN stays. A scalar or a vector."""
    for bound, sign in ((low, "<"), (high, ">")):
        bound = k.splat(bound, x.type) if isinstance(x.type, ir.VectorType) else x.type(bound)
        x = k.b.select(k.b.fcmp_ordered(sign, x, bound), bound, x)
    return x


def _quantized(k: Kernel, group: ir.Value, bits: int) -> tuple[ir.Value, ir.Value]:
    """32 channels f32 in memory -> their scale f16 and codes i8 [32], as ``torch_kv.quantize_rows`` defines.

    The largest magnitude is found among the values' bits, whose order as integers is that of the magnitudes, with NaN
    above infinity: so a NaN makes the scale NaN, and all that is read back.
    """
    b, wide, ints = k.b, vec(F32, KV_GROUP), vec(I32, KV_GROUP)
    x = k.load(wide, group)
    sizes = b.and_(b.bitcast(x, ints), k.splat(_SIGN, ints))
    top = k.total(sizes, lambda p, q: b.select(b.icmp_signed(">", p, q), p, q))
    if bits == 8:
        scale = b.fdiv(b.bitcast(top, F32), F32(127.0))
    else:
        equal = b.bitcast(b.icmp_signed("==", sizes, k.splat(top, ints)), I32)
        first = k.call("llvm.cttz.i32", I32, equal, I1(0))
        scale = b.fdiv(k.load(F32, group, k.mul(4, b.zext(first, I64))), F32(-8.0))
    scale = b.fptrunc(_between(k, scale, -_F16_MAX, _F16_MAX), F16)
    step = b.fpext(scale, F32)
    codes = k.unary("rint", b.fdiv(x, k.splat(step, wide)))
    codes = _between(k, codes, *((-127.0, 127.0) if bits == 8 else (-8.0, 7.0)))
    codes = b.select(b.fcmp_ordered("!=", step, F32(0.0)), codes, k.splat(0.0, wide))
    return scale, b.trunc(b.fptosi(codes, ints), vec(I8, KV_GROUP))
