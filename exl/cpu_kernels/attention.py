"""Attention over the pages of the KV cache: decode and prefill, with the same bits for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llvmlite import ir

from exl.cpu_kernels.attention_items import ITEM
from exl.cpu_kernels.attention_tiles import NONE, SPLIT, Tiles, combine, finish, queries_of_a_block, with_sink
from exl.cpu_kernels.heads import num_vectors, store_head
from exl.cpu_kernels.ir import F32, I32, I64, LANES, F, Kernel
from exl.cpu_kernels.kernel import KernelSpec

_UNLIMITED = 1 << 40


def partial_bytes(head_dim: int) -> int:
    """What decode hands to the merge for a row, a head and a split: the sum f32 [D padded to 16], then m and l."""
    return 4 * (LANES * num_vectors(head_dim) + 2)


@dataclass(frozen=True)
class _Attention(KernelSpec):
    kind: str  # a key of KV_BITS
    head_dim: int  # even
    softcap: bool = False
    verb: ClassVar[str]

    @property
    def name(self) -> str:
        return f"{self.verb}_{self.kind}_{self.head_dim}" + ("_softcap" if self.softcap else "")

    def emit(self, k: Kernel) -> None:
        work = _Work(k, self.kind, self.head_dim)
        softcap = k.number(10) if self.softcap else None
        with k.loop(work.num_queries, step=queries_of_a_block(self.head_dim)) as first:
            count = k.smaller(queries_of_a_block(self.head_dim), k.b.sub(work.num_queries, first))
            work.load_queries(first, count)
            self._emit_block(k, work, first, count, softcap)

    def _emit_block(self, k: Kernel, work: _Work, first: ir.Value, count: ir.Value, softcap: ir.Value | None) -> None:
        """Queries ``first`` to ``first + count - 1`` of the item, which are loaded."""
        raise NotImplementedError


@dataclass(frozen=True)
class DecodeAttention(_Attention):
    """Attention of sequences with few rows, cut by tokens: partial results, which ``MergeAttention`` puts together.

    Row r of a sequence's n rows sees tokens up to its own position, context - n + r, and of these the last ``window``.

    Slots, for H query heads, Hkv heads of K and V, D channels:
    0 q f32 [T][H][D], made ready by ``AppendKV``; 1 the layer's pages u8 [page][Hkv][bytes of a page];
    2 page table i32 [B][P]; 3 P; 4 items i32 [n][8] of ``decode_items``;
    5 partials out: [partial rows][H][``partial_bytes``]; 6 H; 7 Hkv; 8 scale of scores f32; 9 window, 0: all tokens;
    10 softcap f32 (only with ``softcap``: scores become softcap * tanh(score / softcap)).

    Chunk: item * Hkv + head of K and V; n * Hkv in all.
    """

    verb: ClassVar = "attend_split"

    def _emit_block(self, k: Kernel, work: _Work, first: ir.Value, count: ir.Value, softcap: ir.Value | None) -> None:
        tiles, partials, vectors = work.tiles, k.pointer(5), num_vectors(self.head_dim)
        tiles.attend(count, k.mul(work.item(4), SPLIT), softcap)
        with k.loop(count) as i:
            index = work.place(k.add(first, i), work.item(5))
            target, source = k.at(partials, k.mul(index, partial_bytes(self.head_dim))), k.mul(i, tiles.stride)
            for v in range(vectors):
                k.store(k.load(F, tiles.sums, k.add(source, 64 * v), 64), target, 64 * v)
            k.store(k.load(F32, tiles.maxima, k.mul(i, 4)), target, 64 * vectors)
            k.store(k.load(F32, tiles.totals, k.mul(i, 4)), target, 64 * vectors + 4)


@dataclass(frozen=True)
class PrefillAttention(_Attention):
    """Attention of any rows, cut by rows: the bits of ``DecodeAttention`` and ``MergeAttention``.

    Slots as for ``DecodeAttention``, but 4 items i32 [n][8] of ``prefill_items``, 5 out f32 [T][H][D], and with
    ``sinks`` 11 f32 [H], one more score of each head. Rows of no item are not written.

    Chunk: item * Hkv + head of K and V; n * Hkv in all.
    """

    sinks: bool = False
    verb: ClassVar = "attend_rows"

    @property
    def name(self) -> str:
        return super().name + ("_sinks" if self.sinks else "")

    def _emit_block(self, k: Kernel, work: _Work, first: ir.Value, count: ir.Value, softcap: ir.Value | None) -> None:
        tiles, most, vectors = work.tiles, queries_of_a_block(self.head_dim), num_vectors(self.head_dim)
        sums, maxima, totals = k.memory(most * tiles.stride), k.memory(4 * most), k.memory(4 * most)
        start = k.b.and_(tiles.first_token(), I64(-SPLIT))
        with k.loop(work.position(k.add(first, count, -1), 1), start, SPLIT) as split:
            tiles.attend(count, split, softcap)
            with k.loop(count) as i:
                low, high = tiles.visible(i, split)
                with k.b.if_then(k.b.icmp_signed("<", low, high)):
                    self._add(k, tiles, sums, maxima, totals, i, tiles.begins(i, split))
        with k.loop(count) as i:
            index, source = work.place(k.add(first, i), work.item(1)), k.mul(i, tiles.stride)
            result = [k.load(F, sums, k.add(source, 64 * v), 64) for v in range(vectors)]
            top, total = (k.load(F32, of, k.mul(i, 4)) for of in (maxima, totals))
            total = with_sink(k, top, total, k.pointer(11) if self.sinks else None, work.head(k.add(first, i)))
            result = finish(k, result, total, self.kind, self.head_dim)
            store_head(k, result, self.head_dim, k.at(k.pointer(5), k.mul(index, 4 * self.head_dim)))

    def _add(
        self, k: Kernel, tiles: Tiles, sums: ir.Value, maxima: ir.Value, totals: ir.Value, i: ir.Value, fresh: ir.Value
    ) -> None:
        """The split that ``tiles`` holds, to what query ``i`` has; nothing if ``fresh``."""
        b, number = k.b, k.mul(i, 4)
        top = b.select(fresh, F32(NONE), k.load(F32, maxima, number))
        total = b.select(fresh, F32(0.0), k.load(F32, totals, number))
        more = (k.load(F32, of, number) for of in (tiles.maxima, tiles.totals))
        top, total, old, new = combine(k, top, total, *more)
        k.store(top, maxima, number)
        k.store(total, totals, number)
        for v in range(num_vectors(self.head_dim)):
            place = k.add(k.mul(i, tiles.stride), 64 * v)
            before = b.select(fresh, k.splat(0.0), k.load(F, sums, place, 64))
            k.store(k.fma(before, old, b.fmul(k.load(F, tiles.sums, place, 64), new)), sums, place, 64)


class _Work:
    """A chunk's item and head of K and V, while code is written for it. A query is row * group + head of the group."""

    def __init__(self, k: Kernel, kind: str, head_dim: int) -> None:
        b = k.b
        self._k, self._head_dim = k, head_dim
        self._num_heads, num_kv = k.size(6), k.size(7)
        self._group = b.sdiv(self._num_heads, num_kv)
        self._item = k.at(k.pointer(4), k.mul(4 * ITEM, b.sdiv(k.chunk, num_kv)))
        self._kv = b.srem(k.chunk, num_kv)
        self.num_queries = k.mul(self.item(2), self._group)
        table = k.at(k.pointer(2), k.mul(4, k.mul(self.item(0), k.size(3))))
        self.tiles = Tiles(k, kind, head_dim, k.pointer(1), table, self._kv, num_kv)

    def item(self, number: int) -> ir.Value:
        return self._k.b.sext(self._k.load(I32, self._item, 4 * number), I64)

    def place(self, query: ir.Value, first_row: ir.Value) -> ir.Value:
        """The number of a query in [rows][H], where the item's first row is ``first_row``."""
        k = self._k
        row = k.add(first_row, k.b.sdiv(query, self._group))
        return k.add(k.mul(row, self._num_heads), self.head(query))

    def head(self, query: ir.Value) -> ir.Value:
        return self._k.add(self._k.mul(self._kv, self._group), self._k.b.srem(query, self._group))

    def position(self, query: ir.Value, more: int = 0) -> ir.Value:
        return self._k.add(self.item(3), self._k.b.sdiv(query, self._group), more)

    def load_queries(self, first: ir.Value, count: ir.Value) -> None:
        k = self._k
        window = k.size(9)
        window = k.b.select(k.b.icmp_signed("==", window, I64(0)), I64(_UNLIMITED), window)
        with k.loop(count) as i:
            query = k.add(first, i)
            source = k.at(k.pointer(0), k.mul(self.place(query, self.item(1)), 4 * self._head_dim))
            self.tiles.load_query(i, source, k.number(8), self.position(query), window)
